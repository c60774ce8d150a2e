//! COPY and ADD of local files: what a source names ([`select`]), what it contains ([`digest`]),
//! and how it lands in a root file system ([`apply`], [`archive`]). Knows no cache and no store.

pub mod apply;
pub mod archive;
pub mod digest;
pub mod glob;
pub mod owner;
pub mod select;
pub mod tree;

#[cfg(test)]
mod tests_as_root;

use std::io;
use std::path::{Path, PathBuf};

/// Why files could not be copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The operating system said no.
    #[error("cannot {act} /{} in {place}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// Of which tree.
        place: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A source names nothing.
    #[error("{path}: not found in {place}")]
    NotFound {
        /// The source as it was given.
        path: String,
        /// Where it was looked for.
        place: String,
    },
    /// A source names something that .dockerignore hides.
    #[error("{path}: it is in {place}, but .dockerignore excludes it")]
    Ignored {
        /// The source as it was given.
        path: String,
        /// Where it was looked for.
        place: String,
    },
    /// No wildcard matched anything.
    #[error("{patterns}: nothing in {place} matches")]
    NothingMatches {
        /// The sources as they were given.
        patterns: String,
        /// Where they were looked for.
        place: String,
    },
    /// A wildcard that cannot be read.
    #[error("{pattern}: not a valid pattern (an unclosed [ or a trailing \\)")]
    BadPattern {
        /// The source as it was given.
        pattern: String,
    },
    /// A directory would have to replace something else.
    #[error("cannot copy to non-directory: /{}", path.display())]
    NotADirectory {
        /// The destination.
        path: PathBuf,
    },
    /// A file would have to replace a directory.
    #[error("cannot replace the directory /{} with a file", path.display())]
    IsADirectory {
        /// The destination.
        path: PathBuf,
    },
    /// The context changed under the build.
    #[error("/{} in {place} changed while it was being copied; build again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// Of which tree.
        place: String,
    },
    /// --chown or USER names somebody unknown.
    #[error("{asked}: the image's {file} has no {name}")]
    UnknownOwner {
        /// The option or instruction as given.
        asked: String,
        /// The user or group.
        name: String,
        /// /etc/passwd or /etc/group.
        file: &'static str,
    },
    /// --chown or USER cannot be read.
    #[error("{asked}: {reason}")]
    BadOwner {
        /// The option or instruction as given.
        asked: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// An archive cannot be unpacked.
    #[error("cannot unpack {archive}")]
    Archive {
        /// The archive's path.
        archive: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// More directories in each other than anybody has.
    #[error("{}… in {place} is too deep: directories in each other by hundreds", path.display())]
    TooDeep {
        /// The directory, shortened.
        path: PathBuf,
        /// Of which tree.
        place: String,
    },
    /// Symlinks go round in circles.
    #[error("too many symbolic links at /{}", path.display())]
    LinkLoop {
        /// The destination.
        path: PathBuf,
    },
    /// The build was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// Whether an extended attribute is overlay's own mark (also an escaped or an unprivileged one). What is copied or
/// unpacked may land in a layer's own directory: there it would hide files, or show others.
pub(crate) fn is_overlays(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// Overlay's mark for a deleted file is a character device 0:0: no file of an image can be one. On a mount the
/// kernel refuses it as well.
pub(crate) fn refuse_whiteout(kind: rustix::fs::FileType, device: rustix::fs::Dev) -> io::Result<()> {
    if kind == rustix::fs::FileType::CharacterDevice && device == 0 {
        let why = "a character device 0:0 would delete the file of its name below: an image cannot hold one";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(())
}

impl CopyError {
    pub(crate) fn at(act: &'static str, place: &str, path: &Path, source: io::Error) -> CopyError {
        let path = path.strip_prefix("/").unwrap_or(path).to_path_buf();
        CopyError::Io {
            act,
            path,
            place: place.to_owned(),
            source,
        }
    }
}
