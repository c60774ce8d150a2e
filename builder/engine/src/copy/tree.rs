//! A tree of files to copy from: a build context seen through its .dockerignore, or a mounted
//! snapshot. Paths never leave it, symlinks are followed inside it. Knows nothing of destinations.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use slipway_dockerfile::ignore::Matcher;
use slipway_snapshot::Root;

use super::CopyError;

/// Each level holds a descriptor; no real tree comes near it, and no layer may be as deep.
const MAX_DEPTH: usize = 400;
/// Links on the way to a file, as in the kernel.
const MAX_LINKS: usize = 40;

/// Whose numbers the files of a tree have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// As they are: files of an image.
    Kept,
    /// 0:0, whoever owns the context.
    Root,
}

/// A tree to copy from.
pub struct Tree {
    root: Root,
    ignore: Option<Matcher>,
    owners: Owners,
    /// How messages call it: "the build context", "stage build".
    pub name: String,
}

/// One file, directory or other node that was found.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Below the top of the selection; empty: the top itself.
    pub path: PathBuf,
    /// As lstat tells, ownership by [`Owners`], a socket as the empty file it becomes.
    pub stat: Stat,
    /// Of a symlink.
    pub target: Option<OsString>,
    /// A socket in truth: becomes an empty file, and cannot be opened.
    pub socket: bool,
}

impl Entry {
    /// Kind of node.
    #[must_use]
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
}

/// A node named by a COPY: one match of a path or a wildcard.
#[derive(Clone, Debug)]
pub struct Found {
    /// The last component as the user (or the wildcard) named it: its name in a destination directory.
    pub name: OsString,
    /// Where it is, symlinks resolved, relative to the tree.
    pub real: PathBuf,
    /// What it is.
    pub stat: Stat,
    /// As [`Entry::socket`].
    pub socket: bool,
}

impl Found {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        FileType::from_raw_mode(self.stat.st_mode) == FileType::Directory
    }
}

/// Says which entries below a selection's top are taken.
pub trait Filter {
    /// Whether `path` (below the top) is taken, and whether to look below it if it is a directory.
    fn take(&self, path: &Path) -> Verdict;
}

/// What a [`Filter`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Taken.
    Take,
    /// Not taken itself; something below may be, then with its directories.
    Below,
    /// Neither it nor anything below.
    Skip,
}

/// Takes everything.
pub struct All;

impl Filter for All {
    fn take(&self, _: &Path) -> Verdict {
        Verdict::Take
    }
}

impl Tree {
    /// Opens the tree at `dir`; `name` is for messages.
    ///
    /// # Errors
    /// When `dir` is not a directory that can be opened.
    pub fn open(dir: &Path, ignore: Option<Matcher>, owners: Owners, name: &str) -> Result<Tree, CopyError> {
        let root = Root::open(dir).map_err(|e| CopyError::at("open", name, dir, e))?;
        Ok(Tree {
            root,
            ignore,
            owners,
            name: name.to_owned(),
        })
    }

    /// The tree's root.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// What `path` names, symlinks followed inside the tree; `None` when there is nothing, or it is ignored.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn find(&self, path: &Path) -> Result<Option<Found>, CopyError> {
        let fail = |e| CopyError::at("look up", &self.name, path, e);
        let Some(stat) = self.root.metadata(path).map_err(fail)? else {
            return Ok(None);
        };
        let real = self.root.resolve(path).map_err(fail)?;
        let real = real.strip_prefix("/").unwrap_or(&real).to_path_buf();
        if self.passes_ignored(path)? || !self.visible(&real, &stat, 0)? {
            return Ok(None);
        }
        let name = path.file_name().map(OsStr::to_owned).unwrap_or_default();
        Ok(Some(Found {
            name,
            real,
            stat: self.adjust(stat),
            socket: is_socket(&stat),
        }))
    }

    /// Whether anything of what .dockerignore hides would be at `path`: for a better message.
    #[must_use]
    pub fn is_ignored(&self, path: &Path) -> bool {
        self.ignore.is_some()
            && matches!(self.root.metadata(path), Ok(Some(_)))
            && matches!(self.find(path), Ok(None))
    }

    /// The names in a directory that are not ignored, sorted.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn names(&self, dir: &Path) -> Result<Vec<(OsString, Stat)>, CopyError> {
        let fail = |e: rustix::io::Errno| CopyError::at("read", &self.name, dir, e.into());
        let fd = self.open_dir(dir)?;
        let mut names = Vec::new();
        for name in list(&fd).map_err(fail)? {
            let stat = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
            if self.visible(&dir.join(&name), &stat, 0)? {
                names.push((name, stat));
            }
        }
        Ok(names)
    }

    /// Opens the directory at `real`.
    ///
    /// # Errors
    /// When it is none.
    pub fn open_dir(&self, real: &Path) -> Result<OwnedFd, CopyError> {
        let path = if real.as_os_str().is_empty() {
            Path::new("/")
        } else {
            real
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = self
            .root
            .open_file(path, flags)
            .map_err(|e| CopyError::at("open", &self.name, path, e))?;
        Ok(file.into())
    }

    /// All entries of a selection in the order they are to be made, its top first (path empty).
    /// A directory that is not taken itself comes along when something below it is.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn list(&self, found: &Found, filter: &dyn Filter) -> Result<Vec<Entry>, CopyError> {
        let parent = found.real.parent().unwrap_or(Path::new(""));
        let target = match (
            FileType::from_raw_mode(found.stat.st_mode),
            found.real.file_name(),
        ) {
            (FileType::Symlink, Some(name)) => {
                Some(self.read_link(&self.open_dir(parent)?, name, &found.real)?)
            }
            _ => None,
        };
        let mut walk = Walk {
            tree: self,
            top: &found.real,
            filter,
            entries: Vec::new(),
            pending: Vec::new(),
        };
        walk.entries.push(Entry {
            path: PathBuf::new(),
            stat: found.stat,
            target,
            socket: found.socket,
        });
        if FileType::from_raw_mode(found.stat.st_mode) == FileType::Directory {
            walk.directory(&self.open_dir(&found.real)?, Path::new(""), 0)?;
        }
        Ok(walk.entries)
    }

    fn read_link(&self, dir: &impl AsFd, name: &OsStr, path: &Path) -> Result<OsString, CopyError> {
        let link = rustix::fs::readlinkat(dir, name, Vec::new())
            .map_err(|e| CopyError::at("read the link", &self.name, path, e.into()))?;
        Ok(OsStr::from_bytes(link.as_bytes()).to_owned())
    }

    /// Ownership and kind as the copy shall see them.
    fn adjust(&self, mut stat: Stat) -> Stat {
        if self.owners == Owners::Root {
            stat.st_uid = 0;
            stat.st_gid = 0;
        }
        if is_socket(&stat) {
            // A socket cannot be copied; BuildKit makes an empty file of it, and so do we.
            stat.st_mode = (stat.st_mode & 0o7777) | FileType::RegularFile.as_raw_mode();
            stat.st_size = 0;
            stat.st_nlink = 1;
        }
        stat
    }

    /// Whether .dockerignore hides a link on the way along `path`, or `path` itself where it leads through links: what is
    /// hidden cannot be gone through either.
    fn passes_ignored(&self, path: &Path) -> Result<bool, CopyError> {
        let Some(ignore) = &self.ignore else {
            return Ok(false);
        };
        let parts = |path: &Path| -> Vec<OsString> {
            let parts = path.components().filter_map(|part| match part {
                Component::Normal(name) => Some(name.to_owned()),
                Component::ParentDir => Some("..".into()),
                _ => None,
            });
            parts.collect()
        };
        // The next part last.
        let mut pending = parts(path);
        pending.reverse();
        let (mut real, mut links) = (PathBuf::new(), 0);
        while let Some(part) = pending.pop() {
            if part == ".." {
                real.pop();
                continue;
            }
            let next = real.join(&part);
            let fail = |e| CopyError::at("look up", &self.name, &next, e);
            let Some(stat) = self.root.symlink_metadata(&next).map_err(fail)? else {
                return Ok(false);
            };
            if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                real = next;
                continue;
            }
            links += 1;
            if ignored(ignore, &next) || links > MAX_LINKS {
                return Ok(true);
            }
            let target = PathBuf::from(self.read_link(&self.open_dir(&real)?, &part, &next)?);
            if target.is_absolute() {
                real = PathBuf::new();
            }
            pending.extend(parts(&target).into_iter().rev());
        }
        let written: PathBuf = parts(path).into_iter().collect();
        Ok(links > 0 && ignored(ignore, &written))
    }

    /// Whether .dockerignore lets `real` through; an ignored directory is there if anything below it is.
    fn visible(&self, real: &Path, stat: &Stat, depth: usize) -> Result<bool, CopyError> {
        let Some(ignore) = &self.ignore else {
            return Ok(true);
        };
        if real.as_os_str().is_empty() || !ignored(ignore, real) {
            return Ok(true);
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory
            || ignore.skips_directory(&real.to_string_lossy())
        {
            return Ok(false);
        }
        if depth > MAX_DEPTH {
            return Err(self.too_deep(real));
        }
        let fail = |e: rustix::io::Errno| CopyError::at("read", &self.name, real, e.into());
        let fd = self.open_dir(real)?;
        for name in list(&fd).map_err(fail)? {
            let stat = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
            if self.visible(&real.join(&name), &stat, depth + 1)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn too_deep(&self, path: &Path) -> CopyError {
        let shown: String = path.to_string_lossy().chars().take(80).collect();
        CopyError::TooDeep {
            path: format!("/{shown}").into(),
            place: self.name.clone(),
        }
    }
}

fn is_socket(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Socket
}

fn ignored(matcher: &Matcher, path: &Path) -> bool {
    matcher.matches_or_parent(&path.to_string_lossy())
}

fn list(dir: &OwnedFd) -> Result<Vec<OsString>, rustix::io::Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

struct Walk<'a> {
    tree: &'a Tree,
    top: &'a Path,
    filter: &'a dyn Filter,
    entries: Vec<Entry>,
    /// Directories entered but not taken yet.
    pending: Vec<Entry>,
}

impl Walk<'_> {
    fn directory(&mut self, dir: &OwnedFd, below: &Path, depth: usize) -> Result<(), CopyError> {
        let tree = self.tree;
        if depth > MAX_DEPTH {
            return Err(tree.too_deep(&self.top.join(below)));
        }
        let fail = |e: rustix::io::Errno| CopyError::at("read", &tree.name, &self.top.join(below), e.into());
        for name in list(dir).map_err(fail)? {
            let path = below.join(&name);
            let real = self.top.join(&path);
            let fail = |e: rustix::io::Errno| CopyError::at("read", &tree.name, &real, e.into());
            let stat = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
            let verdict = self.verdict(&path, &real);
            let kind = FileType::from_raw_mode(stat.st_mode);
            if verdict == Verdict::Skip || (verdict == Verdict::Below && kind != FileType::Directory) {
                continue;
            }
            let target = if kind == FileType::Symlink {
                Some(tree.read_link(dir, &name, &real)?)
            } else {
                None
            };
            let entry = Entry {
                path: path.clone(),
                stat: tree.adjust(stat),
                target,
                socket: is_socket(&stat),
            };
            if kind != FileType::Directory {
                self.take(entry);
                continue;
            }
            let before = self.pending.len();
            if verdict == Verdict::Take {
                self.take(entry)
            } else {
                self.pending.push(entry)
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(dir, &name, flags, Mode::empty()).map_err(fail)?;
            self.directory(&fd, &path, depth + 1)?;
            self.pending.truncate(before);
        }
        Ok(())
    }

    fn take(&mut self, entry: Entry) {
        self.entries.append(&mut self.pending);
        self.entries.push(entry);
    }

    fn verdict(&self, path: &Path, real: &Path) -> Verdict {
        let ignore = match &self.tree.ignore {
            Some(m) if ignored(m, real) && m.skips_directory(&real.to_string_lossy()) => Verdict::Skip,
            Some(m) if ignored(m, real) => Verdict::Below,
            _ => Verdict::Take,
        };
        match (ignore, self.filter.take(path)) {
            (Verdict::Skip, _) | (_, Verdict::Skip) => Verdict::Skip,
            (Verdict::Below, _) | (_, Verdict::Below) => Verdict::Below,
            (Verdict::Take, Verdict::Take) => Verdict::Take,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_a_directory_holds_anything_is_not_asked_of_endless_depths() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("deep")).unwrap();
        let patterns = ["deep".to_owned(), "!deep/**/x".to_owned()];
        let ignore = Matcher::new(&patterns).unwrap();
        let tree = Tree::open(dir.path(), Some(ignore), Owners::Root, "the build context").unwrap();
        let stat = tree.root().metadata(Path::new("deep")).unwrap().unwrap();
        let visible = |depth| tree.visible(Path::new("deep"), &stat, depth);
        assert!(!visible(MAX_DEPTH).unwrap());
        let error = visible(MAX_DEPTH + 1).unwrap_err().to_string();
        assert!(
            error.starts_with("/deep… in the build context is too deep"),
            "{error}"
        );
    }
}
