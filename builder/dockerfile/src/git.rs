//! Git repositories as ADD names them: `https://host/repo.git#ref:dir`, `?branch=…`. Fetches nothing.

use serde::Serialize;

/// A git repository, what of it and which version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GitReference {
    /// What `git fetch` is given, without fragment and query.
    pub remote: String,
    /// A branch, a tag or a commit; None: the default branch.
    pub reference: Option<String>,
    /// The directory in it that is taken.
    pub subdir: Option<String>,
    /// The commit that `reference` must be, or a prefix of it.
    pub checksum: Option<String>,
    /// Keep `.git`.
    pub keep_git_dir: bool,
    /// Fetch submodules (true unless the query says otherwise).
    pub submodules: bool,
    /// `commit`: files get the commit's time; else the time of checkout.
    pub mtime_of_commit: bool,
    /// Fetch `checksum` itself instead of comparing it with what the reference points to.
    pub fetch_by_commit: bool,
}
