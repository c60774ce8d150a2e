//! What an engine does: instructions after expansion. Knows nothing of how it is done.

use crate::git::GitReference;
use crate::image::History;
use crate::instruction::{Device, Mount, Network, Security};
use crate::span::Span;
use serde::Serialize;

/// The number of a stage in the file, from 0; those that ONBUILD triggers bring in come after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct StageId(pub usize);

/// Where files come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The build context.
    Context,
    /// Another stage's result.
    Stage(StageId),
    /// An image that is only a source of files, for the stage's platform.
    Image(String),
    /// A context given by name (`--build-context`).
    Named(String),
    /// Nothing.
    Scratch,
}

/// One instruction, evaluated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is to be done.
    pub action: Action,
    /// What to show: keyword in upper case, variables expanded, secrets masked.
    pub name: String,
    /// The instruction as written, on one line.
    pub original: String,
    /// Where it stands; a trigger of an image stands at the FROM that brought it.
    pub span: Span,
    /// It is an ONBUILD trigger.
    pub on_build: bool,
    /// Its number among the stage's steps that make a layer, from 1; the loading of a base image is one of them.
    /// None: it only writes the config.
    pub number: Option<usize>,
    /// The entry it adds to the image's history; ONBUILD adds none.
    pub history: Option<History>,
}

/// What is to be done. `serde_json::to_string` of it, with the stage's platform, names all that
/// determines its result, apart from the files themselves: it is meant for a cache key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Nothing: only the image's config changes.
    Config,
    /// Make the directory where it is not there.
    Workdir(WorkdirStep),
    /// Run a process.
    Run(Box<RunStep>),
    /// Bring files in.
    Copy(Box<CopyStep>),
}

/// WORKDIR. No step where the directory is `/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkdirStep {
    /// Absolute. New directories, parents included, get mode 0755.
    pub path: String,
    /// Their owner: USER as it stands; empty is root.
    pub user: String,
}

/// RUN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunStep {
    /// The program and its arguments, the shell's included.
    pub argv: Vec<String>,
    /// ENV, and ARG that have a value, in the order of definition, names unique; PATH is always among them.
    /// HOME is not, unless set: it comes from the image's passwd.
    pub env: Vec<(String, String)>,
    /// Proxy variables in both cases, those not in `env`. Not part of the cache key, by the rule of the language.
    #[serde(skip)]
    pub proxy_env: Vec<(String, String)>,
    /// Absolute; made where it is not there.
    pub cwd: String,
    /// USER as it stands; empty is root.
    pub user: String,
    /// `--mount`.
    pub mounts: Vec<Mount>,
    /// `--network`.
    pub network: Network,
    /// `--security`.
    pub security: Security,
    /// `--device`.
    pub devices: Vec<Device>,
    /// A heredoc that starts with `#!`: a file, mode 0755, mounted read-only, that argv runs.
    pub script: Option<Script>,
}

/// A script written as a heredoc.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Script {
    /// Its absolute path in the container: `/dev/pipes/EOF`.
    pub path: String,
    /// Its content.
    pub content: String,
}

/// COPY or ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyStep {
    /// Whose files `CopySource::Path`s name.
    pub from: Source,
    /// In order; later ones win.
    pub sources: Vec<CopySource>,
    /// Absolute and clean.
    pub destination: String,
    /// The destination was written as a directory: it ended in `/` or was `.`.
    pub destination_is_directory: bool,
    /// `user[:group]`, names or numbers, to be looked up in the image. None: 0:0 for what comes from the context.
    pub chown: Option<String>,
    /// `--chmod`.
    pub chmod: Option<crate::chmod::Chmod>,
    /// `--link`.
    pub link: bool,
    /// `--parents`: see [`CopySource::Path`].
    pub parents: bool,
    /// `--exclude`, in the language of .dockerignore.
    pub exclude: Vec<String>,
    /// Local archives are unpacked: what ADD does unless told otherwise.
    pub unpack: bool,
    /// The instruction was ADD.
    pub is_add: bool,
}

/// One source of a COPY or ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CopySource {
    /// A path or a glob in `from`. A literal one must exist.
    Path {
        /// Absolute in `from` and clean (`..` never leaves it). With `--parents`: the directory before the
        /// pivot `/./`, `/` without one.
        path: String,
        /// `--parents`: what to take below `path`, a pattern in which `**` is known; keeps its directories.
        below: Option<String>,
        /// Whether `*`, `?` or `[` are in `path` or `below`: that nothing matches is then no error by itself.
        wildcard: bool,
    },
    /// A URL (ADD).
    Url {
        /// http or https.
        url: String,
        /// The file's name where the destination is a directory.
        file_name: String,
        /// `sha256:…`
        checksum: Option<String>,
        /// Unpack what was fetched (`--unpack`).
        unpack: bool,
    },
    /// A git repository (ADD).
    Git(GitReference),
    /// A heredoc: a file of mode 0644.
    Document {
        /// Its name where the destination is a directory.
        name: String,
        /// Its content, variables expanded.
        content: String,
    },
}
