//! Why a build failed: where in the Dockerfile, at what, and what the failed command said.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use slipway_dockerfile::Span;
use slipway_image::StoreError;

use crate::context::ContextError;
use crate::copy::CopyError;
use crate::estate::EstateError;
use crate::layer::{PrepareError, SealError};
use crate::progress::StepLabel;

/// A build that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The context or the Dockerfile cannot be read.
    #[error("cannot read the build's input")]
    Context(#[from] ContextError),
    /// The Dockerfile is wrong.
    #[error("{error}{excerpt}")]
    Dockerfile {
        /// What and where.
        error: Box<slipway_dockerfile::Error>,
        /// The lines.
        excerpt: Excerpt,
    },
    /// A step failed.
    #[error("{0}")]
    Step(Box<StepFailure>),
    /// A device that every RUN is to have is not there.
    #[error("cannot give the build its devices")]
    Device(#[source] DeviceError),
    /// A base image cannot be had.
    #[error("{span}: cannot use the image {image}: {}{excerpt}", crate::chain(&**error))]
    Base {
        /// The image, as written.
        image: String,
        /// Its FROM or --from.
        span: Span,
        /// The lines.
        excerpt: Excerpt,
        /// Why. It stands before the lines, so it is no `source`, which would be printed after them.
        error: Box<BaseError>,
    },
    /// The store said no.
    #[error("cannot {act}")]
    Store {
        /// What was attempted.
        act: &'static str,
        /// Why.
        #[source]
        source: Box<StoreError>,
    },
    /// The layers cannot be completed.
    #[error("cannot complete the image's layers")]
    Seal(#[source] Arc<SealError>),
    /// A file or directory of the build's own.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something asked for that does not exist yet.
    #[error("{what} is not built yet")]
    Unsupported {
        /// What.
        what: String,
    },
    /// A defect of ours.
    #[error("internal error: the build of stage {stage} ended without a result")]
    Panicked {
        /// The stage's name or number.
        stage: String,
        /// How.
        #[source]
        source: tokio::task::JoinError,
    },
    /// The build ended well or badly, and something of it could not be removed.
    #[error(
        "the build left something behind; the next slipway command or slipwayd will try again to remove it"
    )]
    Leftovers(#[from] Box<EstateError>),
    /// Interrupted by the user.
    #[error("cancelled")]
    Cancelled,
}

/// A device that was asked for cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("a device that was asked for cannot be had{}", self.hint())]
pub struct DeviceError {
    /// Which, and where it was looked for.
    pub source: Box<slipway_cdi::ResolveError>,
}

impl DeviceError {
    fn hint(&self) -> &'static str {
        match *self.source {
            slipway_cdi::ResolveError::Unknown { .. } => {
                " (slipway build --cdi-spec-dir names other folders to look in)"
            }
            _ => "",
        }
    }
}

/// Why a base image cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseError {
    /// The name is no reference.
    #[error("{name:?} is not the name of an image")]
    Name {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: slipway_image::ReferenceError,
    },
    /// It cannot be pulled.
    #[error("it is not in the store, and pulling it failed")]
    Pull(#[source] Box<slipway_image::PullError>),
    /// The store said no.
    #[error("the store cannot give it")]
    Store(#[source] Box<StoreError>),
    /// Its configuration cannot be read.
    #[error("its configuration cannot be read")]
    Config(#[source] serde_json::Error),
    /// It vanished.
    #[error("it was removed from the store while the build wanted to use it")]
    Gone,
    /// Interrupted.
    #[error("cancelled")]
    Cancelled,
}

/// A step that failed, with all that helps to see why.
#[derive(Debug)]
pub struct StepFailure {
    /// Where it stands.
    pub span: Span,
    /// Which step of which stage.
    pub label: StepLabel,
    /// Its lines.
    pub excerpt: Excerpt,
    /// Why.
    pub error: StepError,
    /// The last lines of its output.
    pub tail: Vec<String>,
}

impl fmt::Display for StepFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.label.bracket(), self.label.text)?;
        if !self.tail.is_empty() {
            writeln!(f, "\nThe end of its output:")?;
            for line in &self.tail {
                writeln!(f, "  {line}")?;
            }
        }
        write!(
            f,
            "\n{}: {}{}",
            self.span,
            crate::chain(&self.error),
            self.excerpt
        )
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// The command ended with a code.
    #[error(
        "`{command}` exited with code {code}{}{}",
        hint(*code),
        if *disk_full { "; there is no space left on the file system of the store" } else { "" }
    )]
    Exit {
        /// The command, shortened.
        command: String,
        /// Its exit code.
        code: u32,
        /// The store's file system had no room when it ended: the likely reason.
        disk_full: bool,
    },
    /// The kernel killed it for want of memory.
    #[error(
        "`{command}` was killed because the memory was full (out of memory); give the build more, or use less"
    )]
    OutOfMemory {
        /// The command, shortened.
        command: String,
    },
    /// Its files cannot be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The container cannot be described.
    #[error("cannot make a container for the command")]
    Spec(#[source] Box<slipway_spec::SpecError>),
    /// The shim said no.
    #[error("cannot {act} the command's container")]
    Shim {
        /// What was attempted.
        act: &'static str,
        /// Why.
        #[source]
        source: Box<slipway_shim_client::Error>,
    },
    /// There is no shim to run it.
    #[error("RUN needs the shim's programs, which are not there")]
    NoShim(#[source] Arc<slipway_shim_client::Error>),
    /// No network.
    #[error("cannot connect the command to a network")]
    Network(#[source] Box<slipway_network::CniError>),
    /// The store said no.
    #[error("cannot {act}")]
    Store {
        /// What was attempted.
        act: &'static str,
        /// Why.
        #[source]
        source: Box<StoreError>,
    },
    /// A snapshot cannot be mounted.
    #[error("cannot {act} the step's file system")]
    Mount {
        /// What was attempted.
        act: &'static str,
        /// Why.
        #[source]
        source: slipway_snapshot::SnapshotError,
    },
    /// A secret that the step needs was not given to the build.
    #[error(
        "the build has no secret {id}, which the step requires: give it with --secret id={id},src=FILE (or env=NAME)"
    )]
    NoSecret {
        /// Which.
        id: String,
    },
    /// A secret cannot be the value of a variable.
    #[error("a secret that is to be a variable is not text without NUL bytes: mount it as a file instead")]
    BinarySecret,
    /// A file of the build's own.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its cache key cannot be made.
    #[error("cannot write the step down for its key in the build cache")]
    Key {
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// An image that files are taken from.
    #[error("cannot take files from the image {image}")]
    Source {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: Box<BaseError>,
    },
    /// The layers below failed.
    #[error("the steps before could not be completed")]
    Below(#[source] Arc<SealError>),
    /// What it made cannot be a layer.
    #[error("what it made cannot be kept")]
    Layer(#[source] Arc<SealError>),
    /// Not there yet.
    #[error("{what} is not built yet")]
    Unsupported {
        /// The instruction or flag.
        what: String,
    },
    /// It asks for something that whoever started the build did not grant.
    #[error("{what} is not granted to this build; give slipway build {flag} to allow it")]
    NotGranted {
        /// What it asks for.
        what: String,
        /// The flags that grant it.
        flag: String,
    },
    /// A device that the step requires is not there.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A file of a device's is not there.
    #[error(
        "the CDI file of the step's device names {}, which cannot be had: was the driver changed since it was written?",
        path.display()
    )]
    DeviceFile {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is put into a cache mount stays there.
    #[error(
        "a device of the step has {} inside the cache mount {}, which would keep the point that it is mounted on; \
         give the cache another target",
        path.display(), cache.display()
    )]
    DeviceInCache {
        /// Where the device's mount or node is.
        path: PathBuf,
        /// The cache mount's target.
        cache: PathBuf,
    },
    /// What is made in a cache mount stays there.
    #[error(
        "a device of the step has {} written by the loader's ldconfig inside the cache mount {}, where it would stay; give \
         the cache another target",
        path.display(), cache.display()
    )]
    LoaderInCache {
        /// A folder of libraries, or the loader's cache.
        path: PathBuf,
        /// The cache mount's target.
        cache: PathBuf,
    },
    /// Work in the background ended without an answer.
    #[error("a task of the build ended unexpectedly: {reason}")]
    Task {
        /// How.
        reason: String,
    },
    /// The build was cancelled, or another step failed.
    #[error("cancelled")]
    Cancelled,
}

impl From<StoreError> for BaseError {
    fn from(error: StoreError) -> BaseError {
        BaseError::Store(Box::new(error))
    }
}

impl BuildError {
    /// The store said no to `act`.
    pub(crate) fn store(act: &'static str) -> impl Fn(StoreError) -> BuildError {
        move |source| BuildError::Store {
            act,
            source: Box::new(source),
        }
    }
}

impl BuildError {
    /// There is no snapshot to `act` with.
    pub(crate) fn prepare(act: &'static str) -> impl Fn(PrepareError) -> BuildError {
        move |error| match error {
            PrepareError::Store(source) => BuildError::store(act)(source),
            PrepareError::Below(source) => BuildError::Seal(source),
        }
    }
}

impl StepError {
    /// There is no snapshot to `act` with.
    pub(crate) fn prepare(act: &'static str) -> impl Fn(PrepareError) -> StepError {
        move |error| match error {
            PrepareError::Store(source) => StepError::store(act)(source),
            PrepareError::Below(source) => StepError::Below(source),
        }
    }

    /// The store said no to `act`.
    pub(crate) fn store(act: &'static str) -> impl Fn(StoreError) -> StepError {
        move |source| StepError::Store {
            act,
            source: Box::new(source),
        }
    }

    /// The shim said no to `act`.
    pub(crate) fn shim(act: &'static str) -> impl Fn(slipway_shim_client::Error) -> StepError {
        move |source| StepError::Shim {
            act,
            source: Box::new(source),
        }
    }

    /// Whether it is only the echo of another failure or of an interrupt.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        match self {
            StepError::Cancelled | StepError::Copy(CopyError::Cancelled) => true,
            StepError::Below(e) | StepError::Layer(e) => e.is_cancelled(),
            StepError::Source { source, .. } => matches!(**source, BaseError::Cancelled),
            _ => false,
        }
    }
}

fn hint(code: u32) -> String {
    match code {
        126 => " (the program is there but cannot be run)".to_owned(),
        127 => " (there is no such program)".to_owned(),
        129..=192 => {
            let name = match code - 128 {
                1 => "HUP",
                2 => "INT",
                3 => "QUIT",
                4 => "ILL, an instruction this processor does not have",
                6 => "ABRT",
                7 => "BUS",
                8 => "FPE",
                9 => "KILL",
                11 => "SEGV, a crash",
                13 => "PIPE",
                15 => "TERM",
                n => return format!(" (signal {n})"),
            };
            format!(" (signal {}: {name})", code - 128)
        }
        _ => String::new(),
    }
}

/// Some lines of a Dockerfile with those that matter marked; prints itself below an error.
#[derive(Debug, Clone, Default)]
pub struct Excerpt {
    lines: Vec<(u32, String, bool)>,
}

impl Excerpt {
    /// The lines of `span` in `text` (at most ten) with two around them. Empty for another file's span.
    #[must_use]
    pub fn of(text: &[u8], span: &Span) -> Excerpt {
        if span.start == 0 {
            return Excerpt::default();
        }
        let last = span.end.min(span.start + 9);
        let wanted = span.start.saturating_sub(2)..=last + 1;
        let lines = String::from_utf8_lossy(text)
            .lines()
            .zip(1u32..)
            .filter(|(_, n)| wanted.contains(n))
            .map(|(line, n)| {
                let line: String = line
                    .chars()
                    .filter(|c| !c.is_control() || *c == '\t')
                    .take(200)
                    .collect();
                (n, line, (span.start..=last).contains(&n))
            })
            .collect();
        Excerpt { lines }
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(last) = self.lines.last() else {
            return Ok(());
        };
        let width = last.0.to_string().len();
        for (n, line, marked) in &self.lines {
            let mark = if *marked { ">" } else { " " };
            write!(f, "\n {mark} {n:>width$} | {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_marks_the_lines_that_matter() {
        let span = Span {
            file: "Dockerfile".into(),
            start: 3,
            end: 4,
        };
        let text = b"FROM a\nENV b=c\nRUN x \\\n  y\nCMD z\nCMD w\n";
        assert_eq!(
            Excerpt::of(text, &span).to_string(),
            "\n   1 | FROM a\n   2 | ENV b=c\n > 3 | RUN x \\\n > 4 |   y\n   5 | CMD z"
        );
    }

    #[test]
    fn why_a_base_cannot_be_had_stands_before_the_lines() {
        let span = Span {
            file: "Dockerfile".into(),
            start: 1,
            end: 1,
        };
        let error = BuildError::Base {
            image: "a:1".into(),
            excerpt: Excerpt::of(b"FROM a:1\nRUN x\n", &span),
            span,
            error: Box::new(BaseError::Gone),
        };
        assert_eq!(
            crate::chain(&error).to_string(),
            "Dockerfile:1: cannot use the image a:1: it was removed from the store while the build wanted to use it\n > 1 | FROM a:1\n   2 | RUN x"
        );
    }
}
