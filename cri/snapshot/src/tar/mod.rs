//! The tar format: our own reader and writer.
//!
//! Reads ustar, pax (also global headers), GNU long names and links, base-256 numbers, and v7; writes ustar with
//! pax records where ustar cannot hold a value, in bytes that depend on nothing but the entries.
//! Refuses to know the filesystem: an entry is a header and a stream of bytes, whatever its name tries.

mod block;
mod pax;
mod read;
mod write;

pub use read::{Reader, TarError};
pub use write::{Contents, Writer};

/// Tar's unit.
pub const BLOCK: usize = 512;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file with `size` bytes of contents.
    File,
    /// Another name of an entry of this archive (or of a layer below).
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// Seconds since 1970 and nanoseconds above them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// One entry's header, with what extended headers said already applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The name as the archive has it: neither cleaned nor checked.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// The target of a link, as the archive has it.
    pub link: Vec<u8>,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of contents; 0 for everything but files.
    pub size: u64,
    /// Last modification.
    pub mtime: Time,
    /// Device numbers of a device.
    pub device: (u32, u32),
    /// Extended attributes, by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Header {
    /// A header with nothing set but name and kind.
    pub fn new(path: impl Into<Vec<u8>>, kind: Kind) -> Header {
        Header {
            path: path.into(),
            kind,
            link: Vec::new(),
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Time::default(),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
