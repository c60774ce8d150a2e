//! Paths inside a tree somebody hostile may have made, or may be changing while we look.
//!
//! Every path is taken as the processes living in the tree would see it: absolute links and `..` stay inside the root.
//! Lookups are `openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)`; what has to create, walks one component at a time
//! holding a descriptor of each directory, so that a directory moved under our feet cannot lead outside.
//! Refuses to know what the tree is for.

use crate::error::{failed, invalid};
use crate::remove::remove_tree_at;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// The same bound as the kernel's on links followed in one lookup.
const MAX_LINKS: usize = 40;
/// openat2 answers EAGAIN when a rename raced with a `..`; so many tries before giving up.
const MAX_RACES: usize = 128;

/// A directory that paths are resolved in and cannot leave.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens `dir` (`O_PATH`); `dir` itself is trusted and follows links as usual.
    ///
    /// # Errors
    /// What `open(2)` says, naming `dir`.
    pub fn open(dir: &Path) -> io::Result<Root> {
        let fd = rustix::fs::openat(
            CWD,
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(failed(|| format!("open root directory {}", dir.display())))?;
        Ok(Root {
            dir: fd,
            path: dir.to_path_buf(),
        })
    }

    /// A root from a directory descriptor; `path` is only for messages.
    pub fn from_fd(dir: OwnedFd, path: &Path) -> Root {
        Root {
            dir,
            path: path.to_path_buf(),
        }
    }

    /// The directory's `O_PATH` descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    fn name(&self, path: &Path) -> String {
        format!("{} in {}", path.display(), self.path.display())
    }

    fn openat2(&self, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let inner = if path.as_os_str().is_empty() {
            Path::new("/")
        } else {
            path
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.dir, inner, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN | Errno::INTR) if tries < MAX_RACES => tries += 1,
                other => return other,
            }
        }
    }

    /// Opens an existing file; the last link is followed inside the root. Never becomes a controlling terminal.
    ///
    /// A FIFO or device of the tree is opened like any other: pass `OFlags::NONBLOCK` where that could hang, or use
    /// [`Root::read`].
    ///
    /// # Errors
    /// What `openat2(2)` says, naming path and root.
    pub fn open_file(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        self.openat2(path, (flags - OFlags::CREATE) | OFlags::NOCTTY, Mode::empty())
            .map(File::from)
            .map_err(failed(|| format!("open {}", self.name(path))))
    }

    /// Creates a regular file, or empties the one that is there; the parent directory must exist.
    ///
    /// A last component that is a link is followed inside the root; an existing device, FIFO, socket or directory is
    /// refused, and never opened.
    ///
    /// # Errors
    /// What the calls say, naming path and root; `InvalidInput` where something other than a file is in the way.
    pub fn create_file(&self, path: &Path, mode: u32) -> io::Result<File> {
        let act = || format!("create {}", self.name(path));
        for _ in 0..MAX_RACES {
            match self.openat2(path, OFlags::PATH, Mode::empty()) {
                Ok(found) => {
                    let kind = file_type(&rustix::fs::fstat(&found).map_err(failed(act))?);
                    if kind != FileType::RegularFile {
                        return Err(failed(act)(invalid(format!("there is a {kind:?} in the way"))));
                    }
                    let file = reopen(found.as_fd(), OFlags::RDWR | OFlags::TRUNC).map_err(failed(act))?;
                    return Ok(File::from(file));
                }
                Err(Errno::NOENT) => {
                    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
                    let (dir, name) = self.walk_parent(path, true).map_err(failed(act))?;
                    let made = rustix::fs::openat(
                        &dir,
                        name.as_os_str(),
                        flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                        Mode::from_raw_mode(mode),
                    );
                    match made {
                        Ok(file) => return Ok(File::from(file)),
                        Err(Errno::EXIST) => {}
                        Err(e) => return Err(failed(act)(e)),
                    }
                }
                Err(e) => return Err(failed(act)(e)),
            }
        }
        Err(failed(act)(Errno::AGAIN))
    }

    /// Reads a regular file of at most `limit` bytes; `None` when there is none (nor its directory).
    ///
    /// # Errors
    /// `InvalidInput` when it is larger than `limit` or no regular file; else what the calls say.
    pub fn read(&self, path: &Path, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let act = || format!("read {}", self.name(path));
        let found = match self.openat2(path, OFlags::PATH, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(failed(act)(e)),
        };
        let stat = rustix::fs::fstat(&found).map_err(failed(act))?;
        let kind = file_type(&stat);
        if kind != FileType::RegularFile {
            return Err(failed(act)(invalid(format!("it is a {kind:?}, not a file"))));
        }
        let file = File::from(reopen(found.as_fd(), OFlags::RDONLY).map_err(failed(act))?);
        let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size).unwrap_or(0).min(limit));
        file.take(limit as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(failed(act))?;
        if bytes.len() > limit {
            return Err(failed(act)(invalid(format!("it is larger than {limit} bytes"))));
        }
        Ok(Some(bytes))
    }

    /// The metadata of what a path leads to, links followed inside the root; `None` when there is nothing.
    ///
    /// # Errors
    /// What `openat2(2)` says, naming path and root.
    pub fn metadata(&self, path: &Path) -> io::Result<Option<Stat>> {
        self.stat(path, OFlags::PATH)
    }

    /// As [`Root::metadata`], but a link as last component is itself the answer.
    ///
    /// # Errors
    /// What `openat2(2)` says, naming path and root.
    pub fn symlink_metadata(&self, path: &Path) -> io::Result<Option<Stat>> {
        self.stat(path, OFlags::PATH | OFlags::NOFOLLOW)
    }

    fn stat(&self, path: &Path, flags: OFlags) -> io::Result<Option<Stat>> {
        let act = || format!("stat {}", self.name(path));
        match self.openat2(path, flags, Mode::empty()) {
            Ok(fd) => rustix::fs::fstat(&fd).map(Some).map_err(failed(act)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(e) => Err(failed(act)(e)),
        }
    }

    /// Makes a directory and those above it that are missing; links on the way are followed inside the root, also
    /// those that lead to nothing yet. Returns what it created (real paths below the root, outermost first), so that
    /// the caller can undo. `mode` and `owner` hold for the created ones only, whatever the umask.
    ///
    /// # Errors
    /// `NotADirectory` when something else is in the way; else what the calls say. What was created before a failure
    /// stays.
    pub fn mkdir_all(&self, path: &Path, mode: u32, owner: Option<(u32, u32)>) -> io::Result<Vec<PathBuf>> {
        if self
            .openat2(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
            .is_ok()
        {
            return Ok(Vec::new());
        }
        let mut walk = Walk::new(self, Some(Make { mode, owner }));
        walk.follow(path)
            .map_err(failed(|| format!("make directory {}", self.name(path))))?;
        Ok(walk.created)
    }

    /// The directory a path lies in (resolved inside the root, `O_PATH`) and its last component, for `*at` calls.
    /// The last component is not looked at.
    ///
    /// # Errors
    /// `InvalidInput` when the path ends in `..` or is the root itself; else what the calls say.
    pub fn parent(&self, path: &Path) -> io::Result<(OwnedFd, OsString)> {
        self.walk_parent(path, false)
            .map_err(failed(|| format!("find the directory of {}", self.name(path))))
    }

    fn walk_parent(&self, path: &Path, follow_last: bool) -> io::Result<(OwnedFd, OsString)> {
        let name = last_component(path)?;
        let mut walk = Walk::new(self, None);
        walk.follow(path.parent().unwrap_or(Path::new("/")))?;
        if !follow_last {
            return Ok((walk.into_fd()?, name));
        }
        // A link that leads to nothing yet: where would it be?
        let mut name = name;
        loop {
            let Some(target) = walk.link_at(&name)? else {
                return Ok((walk.into_fd()?, name));
            };
            let target = PathBuf::from(target);
            name = last_component(&target)?;
            if target.is_absolute() {
                walk.go_to_root();
            }
            walk.follow_relative(target.parent().unwrap_or(Path::new("")))?;
        }
    }

    /// Removes a file, link or directory tree; nothing there is fine. Links are removed, never followed; a mount point
    /// inside is an error and is left alone.
    ///
    /// # Errors
    /// What the calls say (`EXDEV`: something is mounted inside), naming path and root.
    pub fn remove_all(&self, path: &Path) -> io::Result<()> {
        let act = || format!("remove {}", self.name(path));
        match self.walk_parent(path, false) {
            Ok((dir, name)) => remove_tree_at(dir.as_fd(), &name).map_err(failed(act)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed(act)(e)),
        }
    }

    /// The real path, below the root, of what `path` leads to: absolute, without links or `..` ("/usr/lib").
    ///
    /// # Errors
    /// `NotFound` when it leads to nothing; else what the calls say.
    pub fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        let mut walk = Walk::new(self, None);
        walk.allow_file = true;
        walk.follow(path)
            .map_err(failed(|| format!("resolve {}", self.name(path))))?;
        Ok(walk.path())
    }
}

fn last_component(path: &Path) -> io::Result<OsString> {
    match path.components().next_back() {
        Some(Component::Normal(name)) => Ok(name.to_os_string()),
        _ => Err(invalid(format!(
            "{} names no entry of a directory",
            path.display()
        ))),
    }
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Opens again, with other flags, what an `O_PATH` descriptor holds: nobody can exchange it in between.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(rustix::fs::openat(
        CWD,
        path,
        flags | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )?)
}

struct Make {
    mode: u32,
    owner: Option<(u32, u32)>,
}

/// A lookup by hand: the descriptors of the directories from the root down to where we are.
struct Walk<'a> {
    root: &'a Root,
    at: Vec<(OwnedFd, OsString)>,
    links: usize,
    make: Option<Make>,
    created: Vec<PathBuf>,
    /// The last component may be something else than a directory.
    allow_file: bool,
    file: Option<OsString>,
}

impl<'a> Walk<'a> {
    fn new(root: &'a Root, make: Option<Make>) -> Walk<'a> {
        Walk {
            root,
            at: Vec::new(),
            links: 0,
            make,
            created: Vec::new(),
            allow_file: false,
            file: None,
        }
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.at.last().map_or(self.root.dir.as_fd(), |(fd, _)| fd.as_fd())
    }

    fn go_to_root(&mut self) {
        self.at.clear();
    }

    fn path(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        path.extend(self.at.iter().map(|(_, name)| name));
        path.extend(&self.file);
        path
    }

    fn into_fd(mut self) -> io::Result<OwnedFd> {
        match self.at.pop() {
            Some((fd, _)) => Ok(fd),
            None => self.root.dir.try_clone(),
        }
    }

    fn follow(&mut self, path: &Path) -> io::Result<()> {
        self.go_to_root();
        self.follow_relative(path)
    }

    fn follow_relative(&mut self, path: &Path) -> io::Result<()> {
        let mut rest: Vec<OsString> = Vec::new();
        push_components(&mut rest, path);
        while let Some(name) = rest.pop() {
            if name == ".." {
                self.at.pop();
                continue;
            }
            if let Some(target) = self.step(&name, rest.is_empty())? {
                let target = PathBuf::from(target);
                if target.is_absolute() {
                    self.go_to_root();
                }
                push_components(&mut rest, &target);
            }
        }
        Ok(())
    }

    /// Enters one entry; returns a link's target instead.
    fn step(&mut self, name: &OsStr, last: bool) -> io::Result<Option<OsString>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut made = false;
        loop {
            match rustix::fs::openat(self.here(), name, flags, Mode::empty()) {
                Ok(fd) => {
                    return match file_type(&rustix::fs::fstat(&fd)?) {
                        FileType::Directory => {
                            self.enter(fd, name, made)?;
                            Ok(None)
                        }
                        FileType::Symlink => self.read_link(fd.as_fd()).map(Some),
                        _ if last && self.allow_file => {
                            self.file = Some(name.to_os_string());
                            Ok(None)
                        }
                        _ => Err(Errno::NOTDIR.into()),
                    };
                }
                Err(Errno::NOENT) if self.make.is_some() && !made => {
                    let mode = self.make.as_ref().map_or(0, |m| m.mode);
                    match rustix::fs::mkdirat(self.here(), name, Mode::from_raw_mode(mode)) {
                        Ok(()) => made = true,
                        Err(Errno::EXIST) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn enter(&mut self, fd: OwnedFd, name: &OsStr, made: bool) -> io::Result<()> {
        self.at.push((fd, name.to_os_string()));
        if made && let Some(make) = &self.make {
            let dir = reopen(self.here(), OFlags::RDONLY | OFlags::DIRECTORY)?;
            if let Some((uid, gid)) = make.owner {
                std::os::unix::fs::fchown(&dir, Some(uid), Some(gid))?;
            }
            rustix::fs::fchmod(&dir, Mode::from_raw_mode(make.mode))?;
            let path = self.path();
            self.created.push(path);
        }
        Ok(())
    }

    fn read_link(&mut self, link: BorrowedFd<'_>) -> io::Result<OsString> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = rustix::fs::readlinkat(link, "", Vec::new())?.into_bytes();
        if target.is_empty() {
            return Err(Errno::NOENT.into());
        }
        Ok(OsString::from_vec(target))
    }

    fn link_at(&mut self, name: &OsStr) -> io::Result<Option<OsString>> {
        match rustix::fs::readlinkat(self.here(), name, Vec::new()) {
            Ok(target) => {
                self.links += 1;
                if self.links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                Ok(Some(OsString::from_vec(target.into_bytes())))
            }
            Err(Errno::NOENT | Errno::INVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Pushes the components in reverse, so that `pop` yields the first; "." and "/" are dropped.
fn push_components(rest: &mut Vec<OsString>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => rest.push(name.to_os_string()),
            Component::ParentDir => rest.push(OsString::from("..")),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
}
