//! The eighteen instructions as types, variables not yet expanded. Knows nothing of stages,
//! images or the order of instructions.
//!
//! Every flag of the language has a field; what an engine does not build yet it can see and refuse.

mod csv;
mod decode;
mod device;
mod flags;
pub(crate) mod health;
mod mount;

pub use decode::decode;
pub use device::{Device, DeviceName, DeviceNameError};
pub use mount::{Mount, MountKind, MountText, Sharing};

use crate::ast::Heredoc;
use crate::image::Healthcheck;
use crate::span::Span;
use serde::Serialize;

/// One instruction with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// What it says.
    pub instruction: Instruction,
    /// Where it stands.
    pub span: Span,
    /// The keyword in the author's case.
    pub keyword: String,
    /// The instruction on one line, heredoc bodies left out.
    pub original: String,
    /// The comment lines directly above.
    pub comments: Vec<String>,
}

/// An instruction as written: words still hold their quotes and variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    /// `ADD src… dest`
    Add(Transfer),
    /// `ARG name[=default]…`
    Arg(Vec<ArgDefinition>),
    /// `CMD`
    Cmd(Command),
    /// `COPY src… dest`
    Copy(Transfer),
    /// `ENTRYPOINT`
    Entrypoint(Command),
    /// `ENV name=value…`
    Env(Vec<crate::ast::Pair>),
    /// `EXPOSE port…`, sorted.
    Expose(Vec<String>),
    /// `FROM [--platform=…] image [AS name]`
    From(From),
    /// `HEALTHCHECK`
    Healthcheck(Healthcheck),
    /// `LABEL name=value…`
    Label(Vec<crate::ast::Pair>),
    /// `MAINTAINER name`
    Maintainer(String),
    /// `ONBUILD instruction`
    OnBuild(OnBuild),
    /// `RUN`
    Run(Run),
    /// `SHELL ["program", "argument"]`
    Shell(Vec<String>),
    /// `STOPSIGNAL signal`
    StopSignal(String),
    /// `USER name[:group]`
    User(String),
    /// `VOLUME path…`
    Volume(Vec<String>),
    /// `WORKDIR path`
    Workdir(String),
}

/// A command line in one of its two forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A string for the shell.
    Shell(String),
    /// A JSON array: no shell.
    Exec(Vec<String>),
}

/// `name` or `name=default` of an ARG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgDefinition {
    /// The name; never expanded.
    pub name: String,
    /// The default, if one is written.
    pub default: Option<String>,
}

/// FROM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct From {
    /// An image, a stage or `scratch`.
    pub base: String,
    /// The stage's name, in lower case.
    pub name: Option<String>,
    /// `--platform`.
    pub platform: Option<String>,
}

/// ONBUILD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnBuild {
    /// The trigger as it goes into the image's config, heredocs included.
    pub text: String,
    /// The trigger's typed form (it was checked to have one).
    pub trigger: Box<Instruction>,
}

/// RUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The command as written on the instruction's line.
    pub command: Command,
    /// Documents named in the command.
    pub heredocs: Vec<Heredoc>,
    /// `--mount`, in order.
    pub mounts: Vec<MountText>,
    /// `--network`.
    pub network: Network,
    /// `--security`.
    pub security: Security,
    /// `--device`, in order.
    pub devices: Vec<Device>,
}

/// `RUN --network`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The build's network.
    #[default]
    Default,
    /// Loopback only.
    None,
    /// The host's.
    Host,
}

/// `RUN --security`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// Confined.
    #[default]
    Sandbox,
    /// Privileged.
    Insecure,
}

/// COPY and ADD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Paths, globs; for ADD also URLs and git repositories. Heredocs are in `documents`.
    pub sources: Vec<String>,
    /// Files given as heredocs.
    pub documents: Vec<Document>,
    /// Where to.
    pub destination: String,
    /// COPY `--from`: a stage, its number, a named context or an image. Never holds a variable.
    pub from: Option<String>,
    /// `--chown=user[:group]`.
    pub chown: Option<String>,
    /// `--chmod`: octal or symbolic.
    pub chmod: Option<String>,
    /// `--link`: a layer independent of those below.
    pub link: bool,
    /// COPY `--parents`: keep the sources' directories.
    pub parents: bool,
    /// `--exclude` patterns.
    pub exclude: Vec<String>,
    /// ADD `--checksum`: the digest of a URL's content, the commit of a git repository.
    pub checksum: Option<String>,
    /// ADD `--unpack`: archives are unpacked, or not, wherever they come from.
    pub unpack: Option<bool>,
    /// ADD `--keep-git-dir`.
    pub keep_git_dir: Option<bool>,
}

/// A heredoc as a source of COPY or ADD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The file's name: the heredoc's.
    pub name: String,
    /// The content as written, leading tabs gone where asked.
    pub content: String,
    /// Whether variables in it are expanded.
    pub expand: bool,
}

impl Instruction {
    /// The keyword in upper case.
    pub fn keyword(&self) -> &'static str {
        match self {
            Instruction::Add(_) => "ADD",
            Instruction::Arg(_) => "ARG",
            Instruction::Cmd(_) => "CMD",
            Instruction::Copy(_) => "COPY",
            Instruction::Entrypoint(_) => "ENTRYPOINT",
            Instruction::Env(_) => "ENV",
            Instruction::Expose(_) => "EXPOSE",
            Instruction::From(_) => "FROM",
            Instruction::Healthcheck(_) => "HEALTHCHECK",
            Instruction::Label(_) => "LABEL",
            Instruction::Maintainer(_) => "MAINTAINER",
            Instruction::OnBuild(_) => "ONBUILD",
            Instruction::Run(_) => "RUN",
            Instruction::Shell(_) => "SHELL",
            Instruction::StopSignal(_) => "STOPSIGNAL",
            Instruction::User(_) => "USER",
            Instruction::Volume(_) => "VOLUME",
            Instruction::Workdir(_) => "WORKDIR",
        }
    }
}
