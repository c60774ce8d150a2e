//! What a build is asked to do, already read and checked by whoever asks. Knows no command line.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use slipway_dockerfile::instruction::DeviceName;
use slipway_image::Reference;

use crate::cancel::Cancel;
use crate::devices::DeviceGrants;
use crate::error::StepError;

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
    /// Whether a RUN may ask for the host's network: a Dockerfile cannot give it to itself.
    pub allow_host_network: bool,
    /// The CDI devices that every RUN gets.
    pub devices: Vec<DeviceName>,
    /// Those that a RUN may ask for besides: a Dockerfile cannot give them to itself.
    pub allow_devices: DeviceGrants,
    /// `--secret`, by id.
    pub secrets: BTreeMap<String, Secret>,
}

/// What a RUN may see with `--mount=type=secret`, and nobody else: it has no `Display`, and its `Debug` shows nothing.
#[derive(Clone)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// The most bytes a secret may have: BuildKit's limit.
    pub const MOST: usize = 500 << 10;

    /// Takes the bytes, which may be anything.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(bytes.into())
    }

    pub(crate) fn expose(&self) -> &[u8] {
        &self.0
    }

    /// As the value of a variable.
    pub(crate) fn text(&self) -> Result<String, StepError> {
        match std::str::from_utf8(&self.0) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(StepError::BinarySecret),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl BuildRequest {
    /// Whether steps may have the host's network.
    #[must_use]
    pub fn grants_host_network(&self) -> bool {
        self.allow_host_network || self.network == Network::Host
    }
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

    /// The bytes; they can be read once. Reading ends with an error when `cancel` is set.
    ///
    /// # Errors
    /// When the descriptor cannot be shared.
    pub fn read(&self, cancel: &Cancel) -> io::Result<impl Read + Send + 'static> {
        let rest = Interruptible::new(self.rest.try_clone()?, cancel.clone());
        Ok(io::Cursor::new(self.start.clone()).chain(rest))
    }
}

/// A pipe, terminal or file that is read until a [`Cancel`] is set: whoever writes to it may never write again.
#[derive(Debug)]
pub struct Interruptible {
    file: File,
    cancel: Cancel,
}

impl Interruptible {
    /// How often it looks whether it was cancelled while nothing comes.
    const PATIENCE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };

    /// Reads `file`.
    #[must_use]
    pub fn new(file: File, cancel: Cancel) -> Interruptible {
        Interruptible { file, cancel }
    }
}

impl Read for Interruptible {
    /// # Errors
    /// The operating system's; one of its own when it was cancelled.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.cancel.is_set() {
                return Err(io::Error::other("cancelled"));
            }
            let mut ready = [PollFd::new(&self.file, PollFlags::IN)];
            match rustix::event::poll(&mut ready, Some(&Interruptible::PATIENCE)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                // Whatever there is to say, end and errors included, reading says it.
                Ok(_) => return self.file.read(buffer),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_nobody_writes_to_is_left_when_the_build_is_cancelled() {
        let (reader, mut writer) = io::pipe().unwrap();
        let cancel = Cancel::new();
        let mut stream = Interruptible::new(std::os::fd::OwnedFd::from(reader).into(), cancel.clone());
        io::Write::write_all(&mut writer, b"abc").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(stream.read(&mut buffer).unwrap(), 3);
        let waiting = std::thread::spawn(move || stream.read(&mut [0; 8]).map_err(|e| e.to_string()));
        cancel.set();
        assert_eq!(waiting.join().unwrap().unwrap_err(), "cancelled");
        drop(writer);
    }

    #[test]
    fn a_secret_is_not_shown_and_only_text_is_a_variables_value() {
        let secret = Secret::new(b"hush".to_vec());
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        assert_eq!(secret.text().unwrap(), "hush");
        assert!(Secret::new(b"a\0b".to_vec()).text().is_err());
        assert!(Secret::new(vec![0xff]).text().is_err());
    }
}
