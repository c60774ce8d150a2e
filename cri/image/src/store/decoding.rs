//! One layer's blob on its way: its digest and size, its tar's DiffID, and either a directory or nothing made of it.
//!
//! Knows nothing of the catalog.

use super::LayerSource;
use super::unpack::unpack_error;
use crate::codec::{Format, Window, WindowTooLarge, decoder};
use crate::digest::{DiffId, Digest};
use crate::error::{Result, StoreError};
use sha2::Digest as _;
use slipway_snapshot::tar::TarError;
use slipway_snapshot::unpack::{Options, UnpackError, Unpacked, unpack};
use std::cell::RefCell;
use std::io::{self, Read};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Read at a time where nothing is made of it.
const BUFFER: usize = 256 << 10;

/// What a blob turned out to be.
pub(super) struct Streamed {
    pub(super) format: Format,
    pub(super) tar_bytes: u64,
    /// What was made of it; `None` where it was only looked at.
    pub(super) unpacked: Option<Unpacked>,
}

/// What is done with the tar.
pub(super) enum Into<'a> {
    /// Its files go into a directory.
    Directory(PathBuf, &'a Options<'a>),
    /// Nothing: the files are there, and it is only proven that the blob holds them.
    Proof {
        /// As long as the tar that they came in.
        tar_bytes: u64,
        cancelled: &'a AtomicBool,
    },
}

/// Reads one blob to its end, and checks it and its tar on the way.
pub(super) fn stream(
    source: &mut LayerSource,
    what: &str,
    into: &Into<'_>,
    window: Window,
) -> Result<Streamed> {
    let expected = Digest::try_from(source.descriptor.digest()).map_err(|source| StoreError::Digest {
        what: "a layer's descriptor",
        source,
    })?;
    let checked = Checked::new(&mut source.reader, source.descriptor.size(), source.verified);
    let blob = Rc::new(RefCell::new(checked));
    let streamed = decode(&blob, what, &source.diff_id, into, window);
    // A wrong blob shows in many ways; that it is wrong is what matters. (Not so when the disk, the caller or the source
    // ended it.)
    let beside = |error: &StoreError| {
        error.is_disk_full() || is_cancelled(error) || wants_large_window(error) || blob.borrow().failed
    };
    if !source.verified && !streamed.as_ref().is_err_and(beside) {
        blob.borrow_mut().check(what, &expected)?;
    }
    streamed
}

fn decode(
    blob: &Rc<RefCell<Checked<'_>>>,
    what: &str,
    diff_id: &DiffId,
    into: &Into<'_>,
    window: Window,
) -> Result<Streamed> {
    let read = |source| StoreError::Read {
        what: what.to_owned(),
        source,
    };
    let (format, decoded) = decoder(Box::new(Shared(Rc::clone(blob))), window).map_err(read)?;
    let mut tar = Hashed {
        inner: decoded,
        hash: sha2::Sha256::new(),
        bytes: 0,
    };
    let unpacked = match into {
        Into::Directory(dir, options) => {
            let unpacked = unpack(dir, &mut tar, options);
            Some(unpacked.map_err(|source| unpack_error(what.to_owned(), source))?)
        }
        Into::Proof { tar_bytes, cancelled } => {
            let mut buffer = vec![0; BUFFER];
            // One byte more than there should be is enough to know that it is wrong.
            while tar.bytes <= *tar_bytes {
                if cancelled.load(Ordering::Relaxed) {
                    return Err(StoreError::Cancelled {
                        what: what.to_owned(),
                    });
                }
                match tar.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(source) => return Err(read(source)),
                }
            }
            None
        }
    };
    let found = Digest::from_hash(tar.hash);
    if found != *diff_id.digest() {
        let what = format!("the uncompressed tar of {what}");
        return Err(StoreError::DigestMismatch {
            what,
            expected: *diff_id.digest(),
            found,
        });
    }
    Ok(Streamed {
        format,
        tar_bytes: tar.bytes,
        unpacked,
    })
}

/// Counts and hashes a blob's bytes as they are read.
struct Checked<'a> {
    inner: &'a mut dyn Read,
    hash: Option<sha2::Sha256>,
    read: u64,
    size: u64,
    failed: bool,
}

impl<'a> Checked<'a> {
    fn new(inner: &'a mut dyn Read, size: u64, verified: bool) -> Checked<'a> {
        Checked {
            inner,
            hash: (!verified).then(sha2::Sha256::new),
            read: 0,
            size,
            failed: false,
        }
    }

    /// Reads what the decoder left, and compares.
    fn check(&mut self, what: &str, expected: &Digest) -> Result<()> {
        let mut buffer = vec![0u8; 64 << 10];
        while self.read <= self.size {
            match self.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(StoreError::Read {
                        what: what.to_owned(),
                        source,
                    });
                }
            }
        }
        if self.read != self.size {
            return Err(StoreError::SizeMismatch {
                what: what.to_owned(),
                expected: self.size,
                found: self.read,
            });
        }
        let found = Digest::from_hash(self.hash.take().unwrap_or_default());
        if found != *expected {
            return Err(StoreError::DigestMismatch {
                what: what.to_owned(),
                expected: *expected,
                found,
            });
        }
        Ok(())
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // One byte more than there should be is enough to know that it is wrong.
        let room = usize::try_from((self.size + 1).saturating_sub(self.read)).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        let read = self.inner.read(&mut buffer[..room]);
        match &read {
            Ok(n) => {
                self.read += *n as u64;
                if let Some(hash) = &mut self.hash {
                    hash.update(&buffer[..*n]);
                }
            }
            Err(e) => self.failed = e.kind() != io::ErrorKind::Interrupted,
        }
        read
    }
}

/// The blob, which the decoder reads and the check at the end reads on.
struct Shared<'a>(Rc<RefCell<Checked<'a>>>);

impl Read for Shared<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
    }
}

/// Hashes the tar as it is read.
struct Hashed<'a> {
    inner: Box<dyn Read + 'a>,
    hash: sha2::Sha256,
    bytes: u64,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

/// Whether a larger window is all that is missing.
pub(super) fn wants_large_window(error: &StoreError) -> bool {
    match error {
        StoreError::Unpack {
            source: UnpackError::Tar(TarError::Read(source)),
            ..
        }
        | StoreError::Read { source, .. } => WindowTooLarge::is_cause(source),
        _ => false,
    }
}

fn is_cancelled(error: &StoreError) -> bool {
    matches!(error, StoreError::Cancelled { .. })
}

/// Layers of other kinds (encrypted, WebAssembly, …) are nobody's root filesystem.
pub(super) fn check_media_type(what: &str, media_type: &str) -> Result<()> {
    let base = media_type.split(';').next().unwrap_or("").trim();
    let known = matches!(
        base,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    );
    if known {
        return Ok(());
    }
    Err(StoreError::MediaType {
        what: what.to_owned(),
        media_type: media_type.chars().take(100).collect(),
    })
}
