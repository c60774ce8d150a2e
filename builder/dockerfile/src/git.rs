//! Git repositories as ADD names them: `https://host/repo.git#ref:dir`, `git@host:repo?branch=…`. Fetches nothing.

use crate::path;
use crate::percent;
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
    #[serde(skip)]
    keep_git_dir_given: Option<bool>,
}

impl GitReference {
    /// Reads what names a git repository: `ssh://` and `git://` always do, `http(s)://` when the path ends in
    /// `.git`, and `user@host:path`. None: it is something else.
    ///
    /// # Errors
    /// A query that contradicts itself or is unknown.
    pub fn parse(text: &str) -> Option<Result<GitReference, String>> {
        let (address, fragment) = text.split_once('#').unwrap_or((text, ""));
        let (remote, query) = address.split_once('?').unwrap_or((address, ""));
        let is_git = match remote.split_once("://") {
            Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
                "ssh" | "git" => true,
                "http" | "https" => rest
                    .split_once('/')
                    .is_some_and(|(_, path)| path.ends_with(".git")),
                _ => false,
            },
            None => is_scp_style(remote),
        };
        is_git.then(|| GitReference::read(remote, fragment, query))
    }

    fn read(remote: &str, fragment: &str, query: &str) -> Result<GitReference, String> {
        let fragment = percent::decoded(fragment);
        let (reference, subdir) = fragment.split_once(':').unwrap_or((&fragment, ""));
        let subdir = path::join("/", subdir);
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let mut git = GitReference {
            remote: remote.to_owned(),
            reference: given(reference),
            subdir: given(subdir.trim_start_matches('/')),
            submodules: true,
            ..GitReference::default()
        };
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&key) {
                return Err(format!("the query has two values for {key}"));
            }
            seen.push(key);
            git.set(key, percent::decoded(&value.replace('+', " ")))?;
        }
        if seen.contains(&"tag") && seen.contains(&"branch") {
            return Err("the query names a tag and a branch".to_owned());
        }
        Ok(git)
    }

    fn set(&mut self, key: &str, value: String) -> Result<(), String> {
        let flag = || match value.as_str() {
            "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(format!("{key} is true or false, not {value:?}")),
        };
        match key {
            "keep-git-dir" => self.keep_git_dir_given = Some(flag()?),
            "submodules" => self.submodules = flag()?,
            "fetch-by-commit" => self.fetch_by_commit = flag()?,
            "ref" | "tag" | "branch" | "subdir" | "checksum" | "commit" | "mtime" if value.is_empty() => {
                return Err(format!("{key} has no value"));
            }
            "ref" => self.refer(value)?,
            "tag" => self.refer(prefixed("refs/tags/", value))?,
            "branch" => self.refer(prefixed("refs/heads/", value))?,
            "subdir" => match &self.subdir {
                Some(subdir) if *subdir != value => {
                    return Err(format!("two directories are named: {subdir} and {value}"));
                }
                _ => self.subdir = Some(value),
            },
            "checksum" | "commit" => self.checksum = Some(value),
            "mtime" => match value.as_str() {
                "commit" => self.mtime_of_commit = true,
                "checkout" => {}
                _ => return Err(format!("mtime is checkout or commit, not {value:?}")),
            },
            _ => return Err(format!("the query has an unknown key {key:?}")),
        }
        Ok(())
    }

    fn refer(&mut self, reference: String) -> Result<(), String> {
        match &self.reference {
            Some(first) if *first != reference => {
                Err(format!("two versions are named: {first} and {reference}"))
            }
            _ => {
                self.reference = Some(reference);
                Ok(())
            }
        }
    }

    /// What `--keep-git-dir` and `--checksum` say, too; they may not contradict the query.
    pub(crate) fn with_flags(
        mut self,
        keep_git_dir: Option<bool>,
        checksum: Option<&str>,
    ) -> Result<GitReference, String> {
        match (self.keep_git_dir_given, keep_git_dir) {
            (Some(query), Some(flag)) if query != flag => {
                return Err("--keep-git-dir contradicts the query".to_owned());
            }
            (query, flag) => self.keep_git_dir = query.or(flag).unwrap_or_default(),
        }
        match (&self.checksum, checksum) {
            (Some(query), Some(flag)) if query != flag => {
                return Err(format!("--checksum={flag} contradicts {query}"));
            }
            (None, Some(flag)) => self.checksum = Some(flag.to_owned()),
            _ => {}
        }
        Ok(self)
    }
}

fn prefixed(prefix: &str, name: String) -> String {
    if name.starts_with(prefix) {
        name
    } else {
        format!("{prefix}{name}")
    }
}

/// `user@host:path`
fn is_scp_style(text: &str) -> bool {
    let Some((user, rest)) = text.split_once('@') else {
        return false;
    };
    let Some((host, _)) = rest.split_once(':') else {
        return false;
    };
    let sound = |text: &str, more: &str| {
        !text.is_empty()
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    sound(user, "-_") && sound(host, "-.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<(String, String, String)> {
        let git = GitReference::parse(text)?.unwrap();
        Some((
            git.remote,
            git.reference.unwrap_or_default(),
            git.subdir.unwrap_or_default(),
        ))
    }

    #[test]
    fn repositories_are_told_from_urls_and_paths() {
        for (text, remote, reference, subdir) in [
            ("https://x.y/foo.git", "https://x.y/foo.git", "", ""),
            (
                "https://x.y/foo.git#release/1.2:a/../b",
                "https://x.y/foo.git",
                "release/1.2",
                "b",
            ),
            ("https://x.y/foo.git#:dir", "https://x.y/foo.git", "", "dir"),
            (
                "https://x.y/foo.git?tag=v1&subdir=d",
                "https://x.y/foo.git",
                "refs/tags/v1",
                "d",
            ),
            (
                "https://u:p@x.y/foo.git?branch=b",
                "https://u:p@x.y/foo.git",
                "refs/heads/b",
                "",
            ),
            ("git@x.y:foo/bar?ref=r", "git@x.y:foo/bar", "r", ""),
            ("git://x.y/foo", "git://x.y/foo", "", ""),
            ("ssh://git@x.y/foo", "ssh://git@x.y/foo", "", ""),
        ] {
            let expected = (remote.to_owned(), reference.to_owned(), subdir.to_owned());
            assert_eq!(read(text), Some(expected), "{text}");
        }
        for text in [
            "https://x.y/",
            "https://x.y/foo",
            "https://x.y/foo.git/",
            "http://x.y/d.git:#b",
            "github.com/a/b.git",
            "./.git",
            "a@b",
            "a/b@c:d",
            "file:///x.git",
            "https://x.git",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for query in [
            "?ref=a#b",
            "?ref=a&tag=b",
            "?tag=a&branch=b",
            "?mtime=x",
            "?x=1",
            "?ref=a&ref=a",
            "?keep-git-dir=maybe",
            "?subdir=a#:b",
            "?ref=",
        ] {
            let text = format!("https://x.y/foo.git{query}");
            assert!(GitReference::parse(&text).unwrap().is_err(), "{text}");
        }
        let git = |query: &str| {
            GitReference::parse(&format!("https://x.y/f.git{query}"))
                .unwrap()
                .unwrap()
        };
        assert!(git("?keep-git-dir").with_flags(Some(false), None).is_err());
        assert!(git("?commit=abc").with_flags(None, Some("abd")).is_err());
        assert!(
            git("?keep-git-dir")
                .with_flags(None, Some("abc"))
                .unwrap()
                .keep_git_dir
        );
    }
}
