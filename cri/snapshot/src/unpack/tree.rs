//! Directories of the layer by name, held by descriptor, and the resolution of names that nobody may lead astray.
//!
//! Also keeps the books on what exists only provisionally: implied directories, links that wait for the layers
//! below, times that are set last. Knows no archives.

use super::{FixUps, UnpackError, at, shown};
use crate::attributes::{is_whiteout, kind, set_opaque, stat_at, times};
use crate::tar::Time;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
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

/// The tree of one layer.
pub(super) struct Tree {
    root: Rc<Place>,
    open: HashMap<Vec<u8>, Rc<Place>>,
    pub(super) fix_ups: FixUps,
    /// Times of directories with an entry of their own, set when nothing more is put into them.
    directory_times: BTreeMap<Vec<u8>, Time>,
    /// Directories that were made, implied ones included.
    pub(super) implied_made: u64,
}

impl Tree {
    pub(super) fn open(dir: &Path) -> Result<Tree, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(CWD, dir, flags, Mode::empty()).map_err(|e| at("open", b"/")(e.into()))?;
        let mut fix_ups = FixUps::default();
        fix_ups.implied.insert(Vec::new(), true);
        Ok(Tree {
            root: Rc::new(Place { fd, real: Vec::new() }),
            open: HashMap::new(),
            fix_ups,
            directory_times: BTreeMap::new(),
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
        let mut links = 0;
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
        links: &mut usize,
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
                *links += 1;
                if *links > MAX_LINKS {
                    let why = "it goes through too many links";
                    return Err(UnpackError::Escape {
                        entry: shown(entry),
                        why,
                    });
                }
                let target = rustix::fs::readlinkat(here.fd(), OsStr::from_bytes(name), Vec::new());
                let target = target.map_err(|e| at("read the link", &path)(e.into()))?;
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
        links: &mut usize,
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
        self.fix_ups.links.remove(&path);
        self.fix_ups.implied.insert(path, inherits);
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
        self.fix_ups.links.remove(&path);
        self.fix_ups.implied.remove(&path);
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
                self.forget_below(&path);
            }
            Err(Errno::NOENT) => {}
            Err(e) => return Err(at("replace", &path)(e.into())),
        }
        self.forget(&path);
        Ok(())
    }

    /// An entry takes the place of whatever was expected at this path.
    pub(super) fn forget(&mut self, path: &[u8]) {
        if !self.fix_ups.links.is_empty() {
            self.fix_ups.links.remove(path);
        }
        self.fix_ups.implied.remove(path);
        self.directory_times.remove(path);
    }

    fn forget_below(&mut self, path: &[u8]) {
        // Everything that starts with "path/" sorts between "path/" and "path0": '0' follows '/'.
        let from = [path, b"/"].concat();
        let to = [path, b"0"].concat();
        remove_range(&mut self.fix_ups.implied, &from, &to);
        remove_range(&mut self.fix_ups.links, &from, &to);
        remove_range(&mut self.directory_times, &from, &to);
    }

    /// The directory hides what lies below it.
    pub(super) fn hide_below(&mut self, place: &Place) -> Result<(), UnpackError> {
        if place.real.is_empty() {
            self.fix_ups.opaque_root = true;
            return Ok(());
        }
        set_opaque(place.fd()).map_err(at("mark", &place.real))
    }

    /// The directory itself, not only its contents, is deleted below: nothing of it shows through.
    pub(super) fn cut_off(&mut self, path: &[u8]) {
        if let Some(inherits) = self.fix_ups.implied.get_mut(path) {
            *inherits = false;
        }
    }

    /// Remembers a directory's time.
    pub(super) fn set_time_last(&mut self, real: &[u8], time: Time) {
        self.directory_times.insert(real.to_vec(), time);
    }

    /// Sets the times of all directories that have an entry of their own: nothing is put into them any more.
    pub(super) fn finish(mut self) -> Result<FixUps, UnpackError> {
        let all = std::mem::take(&mut self.directory_times);
        for (path, time) in &all {
            if let Some(place) = self.directory(path, Missing::Stop)? {
                rustix::fs::futimens(place.fd(), &times(time.seconds, time.nanos))
                    .map_err(|e| at("set the time of", path)(e.into()))?;
            }
        }
        Ok(self.fix_ups)
    }

    /// What is at a name.
    pub(super) fn stat(&self, here: &Place, name: &[u8]) -> Result<Option<Stat>, UnpackError> {
        stat_at(here.fd(), OsStr::from_bytes(name)).map_err(at("look at", &here.path(name)))
    }
}

fn remove_range<V>(map: &mut BTreeMap<Vec<u8>, V>, from: &[u8], to: &[u8]) {
    let keys: Vec<Vec<u8>> = map
        .range(from.to_vec()..to.to_vec())
        .map(|(key, _)| key.clone())
        .collect();
    for key in keys {
        map.remove(&key);
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
