//! One blob being written: hashed on the way, durable before it is visible, readable while it grows.

use super::BlobFile;
use crate::digest::Digest;
use crate::error::{Result, StoreError};
use std::io::{self, Read, Write};

/// A blob being written. Dropping it unfinished removes what was written.
#[derive(Debug)]
pub struct Ingest {
    written: u64,
}

impl Ingest {
    /// Bytes so far: where a broken download goes on.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// A reader of the same bytes, from the start, that waits for those not yet written. It ends when the ingest
    /// is finished, and fails when the ingest is dropped or its digest is wrong: who reads to the end has
    /// read checked contents.
    ///
    /// # Errors
    /// When the file cannot be opened again.
    pub fn follow(&self) -> Result<Follower> {
        Err(StoreError::NotReady { what: "ingest" })
    }

    /// Checks digest and size, makes the blob durable and visible, and lets the lease hold it. A blob that is
    /// there already is fine.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::SizeMismatch`], [`StoreError::DiskFull`].
    pub fn finish(self, expected: Option<&Digest>, size: Option<u64>) -> Result<BlobFile> {
        let _ = (expected, size);
        Err(StoreError::NotReady { what: "ingest" })
    }
}

impl Write for Ingest {
    fn write(&mut self, _buf: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a blob while it is being written.
#[derive(Debug)]
pub struct Follower {}

impl Read for Follower {
    fn read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
