//! A layer's tar into a directory of overlay's form, whatever the tar tries.

/// What one layer may hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files together; `None`: what the filesystem has free.
    pub bytes: Option<u64>,
    /// Entries.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { bytes: None, entries: 20_000_000 }
    }
}

/// A layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// Not built yet.
    #[error("unpacking is not ready yet")]
    NotReady,
}
