//! What a build is asked to do, already read and checked by whoever asks. Knows no command line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use slipway_image::Reference;

/// A build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The files that COPY and ADD take.
    pub context: ContextSource,
    /// The Dockerfile.
    pub dockerfile: DockerfileSource,
    /// Names of the image.
    pub tags: Vec<Reference>,
    /// `--build-arg`, values filled in.
    pub build_args: BTreeMap<String, String>,
    /// `--target`.
    pub target: Option<String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// Run every step, whatever the cache holds.
    pub no_cache: bool,
    /// Ask the registry for newer base images.
    pub pull: bool,
    /// The network of RUN.
    pub network: Network,
}

/// Where the build context is.
#[derive(Debug, Clone)]
pub enum ContextSource {
    /// A directory.
    Directory(PathBuf),
    /// A tar archive, packed or not.
    Archive(Stream),
    /// No files: a Dockerfile alone.
    Empty,
}

/// Where the Dockerfile is.
#[derive(Debug, Clone)]
pub enum DockerfileSource {
    /// `Dockerfile` (or `dockerfile`) of the context.
    Default,
    /// A path, relative to the working directory or absolute; in an archive: in the archive.
    Path(PathBuf),
    /// Its text, read from elsewhere.
    Text(Vec<u8>),
}

/// The network of RUN steps that do not ask for one themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// A network namespace through CNI where it is configured, else the host's.
    #[default]
    Default,
    /// The host's.
    Host,
    /// Loopback only.
    None,
}

/// A stream of which the first bytes were read already, to see what it is.
#[derive(Debug, Clone)]
pub struct Stream {
    start: Vec<u8>,
    rest: Arc<File>,
}

impl Stream {
    /// `start`, then all of `rest`.
    #[must_use]
    pub fn new(start: Vec<u8>, rest: File) -> Stream {
        Stream {
            start,
            rest: Arc::new(rest),
        }
    }

    /// The bytes; they can be read once.
    ///
    /// # Errors
    /// When the descriptor cannot be shared.
    pub fn read(&self) -> io::Result<impl Read + Send + 'static> {
        Ok(io::Cursor::new(self.start.clone()).chain(self.rest.try_clone()?))
    }
}
