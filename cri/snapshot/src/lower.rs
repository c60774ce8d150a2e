//! What lies below a tree: the merged view of the parents' directories, read as overlayfs reads them.
//!
//! Used where a layer's meaning depends on its parents: unchanged copy-ups, implied directories, hard links into
//! lower layers. Refuses to change anything.

use crate::attributes::{is_opaque, is_whiteout, kind};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Several trees as one, nearest first.
pub(crate) struct View {
    roots: Vec<OwnedFd>,
    /// The trees carry overlay's marks (not when the view is one mounted tree).
    marks: bool,
}

/// The trees in which a merged directory exists, nearest first; empty when nothing lies below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MergedDir {
    layers: Vec<usize>,
}

/// What a name means in the view.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nothing, or something deleted.
    Nothing,
    /// Anything but a directory.
    Entry {
        /// Which tree has it.
        layer: usize,
        /// What it is.
        stat: Stat,
    },
    /// A directory.
    Directory {
        /// Where it continues.
        dir: MergedDir,
        /// Of the nearest one.
        stat: Stat,
    },
}

impl MergedDir {
    /// The nearest tree that has the directory.
    pub(crate) fn nearest(&self) -> Option<usize> {
        self.layers.first().copied()
    }
}

impl View {
    /// Opens the parents' own trees, nearest first.
    pub(crate) fn of_layers<P: AsRef<Path>>(layers: &[P]) -> io::Result<View> {
        let roots = layers
            .iter()
            .map(|layer| open_root(layer.as_ref()))
            .collect::<io::Result<_>>()?;
        Ok(View { roots, marks: true })
    }

    /// Opens one tree that is mounted already.
    pub(crate) fn of_mounted(tree: &Path) -> io::Result<View> {
        Ok(View {
            roots: vec![open_root(tree)?],
            marks: false,
        })
    }

    /// The root directory: it merges in all trees, whatever their marks (overlayfs does not look at a root's).
    pub(crate) fn root(&self) -> MergedDir {
        MergedDir {
            layers: (0..self.roots.len()).collect(),
        }
    }

    /// How many trees there are.
    pub(crate) fn layers(&self) -> usize {
        self.roots.len()
    }

    /// The tree's root as a descriptor.
    pub(crate) fn root_of(&self, layer: usize) -> BorrowedFd<'_> {
        self.roots[layer].as_fd()
    }

    /// What `path` (relative, without links on the way) means, given its parent directory.
    pub(crate) fn lookup(&self, parent: &MergedDir, path: &Path) -> io::Result<Found> {
        let mut dir = MergedDir::default();
        let mut nearest: Option<Stat> = None;
        for &layer in &parent.layers {
            let Some(entry) = self.open_at(layer, path, OFlags::PATH | OFlags::NOFOLLOW)? else {
                continue;
            };
            let stat = rustix::fs::fstat(&entry)?;
            if self.marks && is_whiteout(&stat) {
                break;
            }
            if kind(&stat) != FileType::Directory {
                if nearest.is_none() {
                    return Ok(Found::Entry { layer, stat });
                }
                break;
            }
            dir.layers.push(layer);
            nearest.get_or_insert(stat);
            if self.marks && self.opaque(layer, path)? {
                break;
            }
        }
        Ok(nearest.map_or(Found::Nothing, |stat| Found::Directory { dir, stat }))
    }

    /// What a whole path means, walking down from the root.
    pub(crate) fn find(&self, path: &Path) -> io::Result<Found> {
        let mut dir = self.root();
        let mut so_far = std::path::PathBuf::new();
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            so_far.push(component);
            let found = self.lookup(&dir, &so_far)?;
            if components.peek().is_none() {
                return Ok(found);
            }
            match found {
                Found::Directory { dir: next, .. } => dir = next,
                _ => return Ok(Found::Nothing),
            }
        }
        match dir.nearest() {
            Some(layer) => Ok(Found::Directory {
                stat: rustix::fs::fstat(self.root_of(layer))?,
                dir,
            }),
            None => Ok(Found::Nothing),
        }
    }

    /// Opens something in one tree; `None` when it is not there. No link is followed on the way.
    pub(crate) fn open_at(&self, layer: usize, path: &Path, flags: OFlags) -> io::Result<Option<OwnedFd>> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(
            &self.roots[layer],
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        ) {
            Ok(fd) => Ok(Some(fd)),
            // A file or link where the path wants a directory is nothing, too. With PATH | NOFOLLOW, ELOOP can
            // only come from a component on the way.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn opaque(&self, layer: usize, path: &Path) -> io::Result<bool> {
        match self.open_at(layer, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)? {
            Some(dir) => is_opaque(dir.as_fd()),
            None => Ok(false),
        }
    }
}

fn open_root(tree: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        CWD,
        tree,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}
