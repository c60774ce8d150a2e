//! Directories of the layer by name, held by descriptor, and the resolution of names that nobody may lead astray.
//!
//! What exists only provisionally goes into the books. Knows no archives.

use super::books::{Books, NameBudget};
use super::{FixUps, UnpackError, at, shown};
use crate::attributes::{is_whiteout, kind, set_opaque, stat_at, times};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

/// Directories kept open: far below the usual limit of 1024 descriptors, with several layers at a time.
const OPEN_DIRECTORIES: usize = 96;
/// As the kernel: so many links in one name.
const MAX_LINKS: usize = 40;
/// So many components of links in one name: forty links of a thousand each would keep us busy for long.
const MAX_LINK_PARTS: usize = 1000;
/// The longest name the kernel resolves.
const MAX_PATH: usize = 4095;
/// Mode of a directory that nothing says anything about.
const IMPLIED_MODE: u32 = 0o755;

/// An open directory of the layer.
pub(super) struct Place {
    fd: OwnedFd,
    /// Where it really is, without links, relative to the layer; empty for the root.
    pub(super) real: Vec<u8>,
}

impl Place {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The real path of an entry.
    pub(super) fn path(&self, name: &[u8]) -> Vec<u8> {
        join(&self.real, name)
    }
}

/// What to do about directories that are missing on the way to a name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// Make them: the archive implies them.
    Make,
    /// Then the name means nothing here.
    Stop,
}

/// What links on the way to a name have cost so far.
#[derive(Default)]
struct Followed {
    links: usize,
    parts: usize,
}

/// The tree of one layer.
pub(super) struct Tree<'a> {
    root: Rc<Place>,
    open: HashMap<Vec<u8>, Rc<Place>>,
    pub(super) books: Books<'a>,
    /// Directories that were made, implied ones included.
    pub(super) implied_made: u64,
}

impl<'a> Tree<'a> {
    pub(super) fn open(dir: &Path, budget: &'a NameBudget) -> Result<Tree<'a>, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(CWD, dir, flags, Mode::empty()).map_err(|e| at("open", b"/")(e.into()))?;
        Ok(Tree {
            root: Rc::new(Place { fd, real: Vec::new() }),
            open: HashMap::new(),
            books: Books::new(budget),
            implied_made: 0,
        })
    }

    pub(super) fn root(&self) -> Rc<Place> {
        Rc::clone(&self.root)
    }

    /// The directory with this (cleaned) name; `None` when something is missing and is not to be made.
    pub(super) fn directory(
        &mut self,
        name: &[u8],
        missing: Missing,
    ) -> Result<Option<Rc<Place>>, UnpackError> {
        if name.is_empty() {
            return Ok(Some(self.root()));
        }
        if let Some(place) = self.open.get(name) {
            return Ok(Some(Rc::clone(place)));
        }
        // From the longest prefix that is open, one component at a time.
        let ends: Vec<usize> = (0..name.len())
            .filter(|i| name[*i] == b'/')
            .chain([name.len()])
            .collect();
        let known = ends.iter().rposition(|end| self.open.contains_key(&name[..*end]));
        let mut here = match known {
            Some(at) => Rc::clone(&self.open[&name[..ends[at]]]),
            None => self.root(),
        };
        let mut start = known.map_or(0, |at| ends[at] + 1);
        let mut links = Followed::default();
        for end in ends.into_iter().skip(known.map_or(0, |at| at + 1)) {
            match self.enter(&here, &name[start..end], missing, &mut links, name)? {
                Some(next) => here = next,
                None => return Ok(None),
            }
            if self.open.len() >= OPEN_DIRECTORIES {
                self.open.clear();
            }
            self.open.insert(name[..end].to_vec(), Rc::clone(&here));
            start = end + 1;
        }
        Ok(Some(here))
    }

    /// Enters one component, resolving links.
    fn enter(
        &mut self,
        here: &Rc<Place>,
        name: &[u8],
        missing: Missing,
        links: &mut Followed,
        entry: &[u8],
    ) -> Result<Option<Rc<Place>>, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(here.fd(), OsStr::from_bytes(name), flags, Mode::empty()) {
            Ok(fd) => {
                return Ok(Some(Rc::new(Place {
                    fd,
                    real: here.path(name),
                })));
            }
            Err(Errno::NOENT) if missing == Missing::Stop => return Ok(None),
            Err(Errno::NOENT) => return self.imply(here, name, true).map(Some),
            Err(Errno::NOTDIR | Errno::LOOP) => {}
            Err(e) => return Err(at("enter", &here.path(name))(e.into())),
        }
        let path = here.path(name);
        let stat = stat_at(here.fd(), OsStr::from_bytes(name)).map_err(at("look at", &path))?;
        match stat {
            Some(stat) if kind(&stat) == FileType::Symlink => {
                let target = rustix::fs::readlinkat(here.fd(), OsStr::from_bytes(name), Vec::new());
                let target = target.map_err(|e| at("read the link", &path)(e.into()))?;
                links.links += 1;
                links.parts += target.as_bytes().split(|b| *b == b'/').count();
                if links.links > MAX_LINKS || links.parts > MAX_LINK_PARTS {
                    let why = "it goes through too many links";
                    return Err(UnpackError::Escape {
                        entry: shown(entry),
                        why,
                    });
                }
                self.follow(here, target.as_bytes(), missing, links, entry)
            }
            // The layer deletes what lies below and goes on to put a directory there.
            Some(stat) if is_whiteout(&stat) && missing == Missing::Make => {
                rustix::fs::unlinkat(here.fd(), OsStr::from_bytes(name), AtFlags::empty())
                    .map_err(|e| at("replace", &path)(e.into()))?;
                let made = self.imply(here, name, false)?;
                set_opaque(made.fd()).map_err(at("mark", &path))?;
                Ok(Some(made))
            }
            Some(_) if missing == Missing::Stop => Ok(None),
            _ => Err(UnpackError::NotADirectory {
                entry: shown(entry),
                parent: shown(&path),
            }),
        }
    }

    /// Resolves a link's target: absolute ones from the layer's root, as a process inside would see it.
    fn follow(
        &mut self,
        here: &Rc<Place>,
        target: &[u8],
        missing: Missing,
        links: &mut Followed,
        entry: &[u8],
    ) -> Result<Option<Rc<Place>>, UnpackError> {
        let mut here = if target.starts_with(b"/") {
            self.root()
        } else {
            Rc::clone(here)
        };
        for part in target.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." if here.real.is_empty() => {
                    let why = "a link among its directories climbs above the root";
                    return Err(UnpackError::Escape {
                        entry: shown(entry),
                        why,
                    });
                }
                b".." => {
                    // `real` has no links in it, so the directory above is the one above in the name, too.
                    let above = split(&here.real).0.to_vec();
                    match self.directory(&above, missing)? {
                        Some(place) => here = place,
                        None => return Ok(None),
                    }
                }
                name => match self.enter(&here, name, missing, links, entry)? {
                    Some(place) => here = place,
                    None => return Ok(None),
                },
            }
        }
        Ok(Some(here))
    }

    /// Makes a directory that the archive has no entry for (yet).
    fn imply(&mut self, here: &Rc<Place>, name: &[u8], inherits: bool) -> Result<Rc<Place>, UnpackError> {
        let path = here.path(name);
        let place = make_directory(here, name).map_err(at("make directory", &path))?;
        self.books.imply(path, inherits)?;
        self.implied_made += 1;
        Ok(place)
    }

    /// Makes the directory of an entry, or finds it; what is not a directory gives way.
    pub(super) fn make(&mut self, here: &Rc<Place>, name: &[u8]) -> Result<Rc<Place>, UnpackError> {
        let path = here.path(name);
        let mut opaque = false;
        let place = match make_directory(here, name) {
            Ok(place) => place,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let stat = stat_at(here.fd(), OsStr::from_bytes(name)).map_err(at("look at", &path))?;
                if stat
                    .as_ref()
                    .is_some_and(|stat| kind(stat) == FileType::Directory)
                {
                    open_directory(here, name).map_err(at("open", &path))?
                } else {
                    opaque = stat.as_ref().is_some_and(is_whiteout);
                    self.remove(here, name)?;
                    make_directory(here, name).map_err(at("make directory", &path))?
                }
            }
            Err(e) => return Err(at("make directory", &path)(e)),
        };
        if opaque {
            set_opaque(place.fd()).map_err(at("mark", &path))?;
        }
        self.books.made(&path);
        Ok(place)
    }

    /// Removes what a later entry replaces, with all the books say about it.
    pub(super) fn remove(&mut self, here: &Place, name: &[u8]) -> Result<(), UnpackError> {
        let path = here.path(name);
        let os_name = OsStr::from_bytes(name);
        match rustix::fs::unlinkat(here.fd(), os_name, AtFlags::empty()) {
            // It may have been a link that names were resolved through.
            Ok(()) => self.open.clear(),
            Err(Errno::ISDIR) => {
                self.open.clear();
                let dir = here.fd().try_clone_to_owned().map_err(at("open", &path))?;
                let root = slipway_sys::root::Root::from_fd(dir, Path::new("a layer"));
                root.remove_all(Path::new(os_name))
                    .map_err(at("replace", &path))?;
                self.books.forget_below(&path);
            }
            Err(Errno::NOENT) => {}
            Err(e) => return Err(at("replace", &path)(e.into())),
        }
        self.books.forget(&path);
        Ok(())
    }

    /// The directory hides what lies below it.
    pub(super) fn hide_below(&mut self, place: &Place) -> Result<(), UnpackError> {
        if place.real.is_empty() {
            self.books.hide_root();
            return Ok(());
        }
        set_opaque(place.fd()).map_err(at("mark", &place.real))
    }

    /// Sets the times of all directories that have an entry of their own: nothing is put into them any more.
    pub(super) fn finish(mut self) -> Result<FixUps, UnpackError> {
        let all = self.books.take_times();
        for (path, time) in &all {
            if let Some(place) = self.directory(path, Missing::Stop)? {
                rustix::fs::futimens(place.fd(), &times(time.seconds, time.nanos))
                    .map_err(|e| at("set the time of", path)(e.into()))?;
            }
        }
        Ok(self.books.close())
    }

    /// What is at a name.
    pub(super) fn stat(&self, here: &Place, name: &[u8]) -> Result<Option<Stat>, UnpackError> {
        stat_at(here.fd(), OsStr::from_bytes(name)).map_err(at("look at", &here.path(name)))
    }
}

fn make_directory(here: &Place, name: &[u8]) -> io::Result<Rc<Place>> {
    let mode = Mode::from_raw_mode(IMPLIED_MODE);
    rustix::fs::mkdirat(here.fd(), OsStr::from_bytes(name), mode)?;
    let place = open_directory(here, name)?;
    // The process's umask took bits away.
    rustix::fs::fchmod(place.fd(), mode)?;
    Ok(place)
}

fn open_directory(here: &Place, name: &[u8]) -> io::Result<Rc<Place>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(here.fd(), OsStr::from_bytes(name), flags, Mode::empty())?;
    Ok(Rc::new(Place {
        fd,
        real: here.path(name),
    }))
}

/// A name without empty and `.` components; `..` is not for us to guess about.
pub(super) fn clean(name: &[u8], absolute_allowed: bool) -> Result<Vec<u8>, UnpackError> {
    let escape = |why| UnpackError::Escape {
        entry: shown(name),
        why,
    };
    let unusable = |why| UnpackError::Name {
        entry: shown(name),
        why,
    };
    if name.is_empty() {
        return Err(unusable("it is empty"));
    }
    if name.contains(&0) {
        return Err(unusable("it holds a zero byte"));
    }
    if name.len() > MAX_PATH {
        return Err(unusable("it is longer than the kernel takes"));
    }
    if name.starts_with(b"/") && !absolute_allowed {
        return Err(escape("its name is absolute"));
    }
    let mut cleaned = Vec::with_capacity(name.len());
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err(escape("its name has a .. in it")),
            part if part.len() > 255 => return Err(unusable("a part of it is longer than 255 bytes")),
            part => {
                if !cleaned.is_empty() {
                    cleaned.push(b'/');
                }
                cleaned.extend_from_slice(part);
            }
        }
    }
    Ok(cleaned)
}

/// Directory and last component of a cleaned name.
pub(super) fn split(name: &[u8]) -> (&[u8], &[u8]) {
    match name.iter().rposition(|b| *b == b'/') {
        Some(at) => (&name[..at], &name[at + 1..]),
        None => (b"", name),
    }
}

pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        name.to_vec()
    } else {
        [dir, b"/", name].concat()
    }
}
