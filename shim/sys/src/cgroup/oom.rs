//! Hearing of the OOM killer: v1 by an eventfd registered with the memory controller, v2 by inotify on `memory.events`; and
//! keeping what it goes by, `memory.oom.group`, where systemd would take it away.

use super::{Cgroup, CgroupError, Resources, Result, stats};
use rustix::event::EventfdFlags;
use rustix::fs::inotify;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Becomes readable when the OOM killer has been at work in the cgroup, and when the cgroup goes away.
///
/// In a unit of systemd's it also hears of writes to `memory.oom.group`. systemd has no property for it, and writes a zero
/// whenever it reloads or is told any limit of the unit's; the kernel then kills one process of a container where it was to
/// kill all. [`OomWatch::take`] writes it again.
#[derive(Debug)]
pub struct OomWatch {
    event: OwnedFd,
    early: bool,
    /// v1 keeps the registration as long as the event descriptor; the control file may be closed.
    seen: u64,
    /// v2: where it is, and how many were killed below its parent, neighbours' left out, when it was last looked at.
    dir: Option<PathBuf>,
    seen_above: u64,
    /// How many of those killed below its parent are known to be its neighbours'.
    of_neighbours: u64,
    /// There was an event: the cgroup has come up against a limit.
    wanted: bool,
    /// In a unit of systemd's on v2: what `memory.oom.group` is to be, if anybody has said.
    group: Option<Group>,
}

/// What `memory.oom.group` is to be.
#[derive(Debug)]
struct Group {
    file: PathBuf,
    /// The number of its watch.
    watch: i32,
    wanted: Option<String>,
}

const GROUP: &str = "memory.oom.group";

impl OomWatch {
    pub(crate) fn new(cgroup: &Cgroup, is_unit: bool, resources: &Resources) -> Result<OomWatch> {
        let event = match (cgroup.v1("memory"), cgroup.v2()) {
            (Some(dir), _) => eventfd_v1(dir),
            (None, Some(dir)) => inotify_v2(dir),
            (None, None) => Err(io::ErrorKind::Unsupported.into()),
        };
        let act = || format!("watch cgroup {} for the OOM killer", cgroup.path().display());
        let event = event.map_err(|source| CgroupError::Io { act: act(), source })?;
        let group = match cgroup.v2().map(|dir| dir.join(GROUP)) {
            Some(file) if is_unit => watch(&event, &file).ok().map(|watch| Group {
                file,
                watch,
                wanted: None,
            }),
            _ => None,
        };
        let mut watch = OomWatch {
            event,
            early: cgroup.v1("memory").is_some(),
            seen: stats::oom_kills(cgroup),
            seen_above: above(cgroup.v2()).unwrap_or(0),
            of_neighbours: 0,
            dir: cgroup.v2().map(Path::to_owned),
            wanted: false,
            group,
        };
        watch.expect(resources);
        // Whoever wrote before there was a watch.
        watch.keep_group();
        Ok(watch)
    }

    /// These limits are going to be applied: what they say of `memory.oom.group` is what is kept from now on. To be said
    /// before, or else the change would be taken back.
    pub fn expect(&mut self, resources: &Resources) {
        let new = resources.unified.as_ref().and_then(|files| files.get(GROUP));
        if let (Some(group), Some(new)) = (&mut self.group, new) {
            group.wanted = Some(new.trim().to_owned());
        }
    }

    fn keep_group(&self) {
        if let Some(Group {
            file,
            wanted: Some(wanted),
            ..
        }) = &self.group
            && std::fs::read_to_string(file).is_ok_and(|now| now.trim() != wanted)
        {
            // Refused or gone: then there is nothing to keep.
            let _ = super::write::try_write(file, wanted);
        }
    }

    /// Whether the event comes before the killing is counted (v1), so that one has to look again.
    pub fn is_early(&self) -> bool {
        self.early
    }

    /// Takes note of the event, so that the descriptor is quiet again, and returns how many processes were killed
    /// since the last time (0 when it was for another reason; also once the cgroup is gone).
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn take(&mut self, cgroup: &Cgroup) -> io::Result<u64> {
        self.hear()?;
        self.keep_group();
        let now = stats::oom_kills(cgroup).max(self.seen);
        let fresh = now - self.seen;
        self.seen = now;
        if self.dir.as_deref().is_some_and(Path::exists) {
            self.seen_above = self.above_but_neighbours().unwrap_or(self.seen_above);
        }
        Ok(fresh)
    }

    fn hear(&mut self) -> io::Result<()> {
        let mut buffer = [0u8; 4096];
        loop {
            match rustix::io::read(&self.event, &mut buffer) {
                Ok(n) => {
                    self.wanted |= self.is_want(&buffer[..n]);
                    if n < buffer.len() {
                        return Ok(());
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Whether something else was written than `memory.oom.group`. Events of files have no names, and begin with the number of
    /// their watch (inotify(7)).
    fn is_want(&self, events: &[u8]) -> bool {
        self.group.as_ref().is_none_or(|group| {
            let mut events = events.chunks_exact(16);
            events.any(|event| event[..4] != group.watch.to_ne_bytes())
        })
    }

    /// Whether the cgroup is gone, and could not be asked any more.
    pub fn is_gone(&self) -> bool {
        self.dir.as_deref().is_some_and(|dir| !dir.exists())
    }

    /// A cgroup below `parent` ([`Cgroup::v2_parent`]) has been found to have lost so many: if that is this one's parent too, they
    /// are not this one's.
    pub fn neighbour_lost(&mut self, parent: Option<&Path>, killed: u64) {
        if parent.is_none() || self.dir.as_deref().and_then(Path::parent) != parent {
            return;
        }
        self.of_neighbours += killed;
        // They may have been counted above before anybody knew whose they are.
        if let Some(now) = self.above_but_neighbours() {
            self.seen_above = self.seen_above.min(now);
        }
    }

    /// How many were killed, by all signs, in a cgroup that is gone with what it had counted since the last look: it had come up
    /// against a limit, and its parent, which counts what happens below (cgroups(7), `memory.events`), has counted some since that
    /// no neighbour is known to have lost ([`OomWatch::neighbour_lost`]). 0: none.
    ///
    /// systemd removes a scope as soon as nothing is in it, and the kernel puts off events that follow others within ten
    /// milliseconds: of a process that is killed after a struggle one may hear too late.
    pub fn lost(&self) -> u64 {
        match self.above_but_neighbours() {
            Some(now) if self.is_gone() && self.wanted => now.saturating_sub(self.seen_above),
            _ => 0,
        }
    }

    fn above_but_neighbours(&self) -> Option<u64> {
        Some(above(self.dir.as_deref())?.saturating_sub(self.of_neighbours))
    }
}

/// How many were killed in all that is below the parent of a directory of v2.
fn above(dir: Option<&Path>) -> Option<u64> {
    dir.and_then(Path::parent).and_then(stats::oom_kills_in)
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

fn eventfd_v1(dir: &Path) -> io::Result<OwnedFd> {
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let control = rustix::fs::openat(CWD, dir.join("memory.oom_control"), flags, Mode::empty())?;
    let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    super::write::try_write(&dir.join("cgroup.event_control"), &line)?;
    Ok(event)
}

fn inotify_v2(dir: &Path) -> io::Result<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let event = inotify::init(flags)?;
    watch(&event, &dir.join("memory.events"))?;
    Ok(event)
}

fn watch(event: &OwnedFd, file: &Path) -> io::Result<i32> {
    Ok(inotify::add_watch(event, file, inotify::WatchFlags::MODIFY)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A parent that counts, and watches of cgroups below it.
    struct Parent(tempfile::TempDir);

    impl Parent {
        fn new(killed: u64) -> Parent {
            let parent = Parent(tempfile::tempdir().unwrap());
            parent.counts(killed);
            parent
        }

        fn counts(&self, killed: u64) {
            let text = format!("low 0\noom 9\noom_kill {killed}\n");
            fs::write(self.0.path().join("memory.events"), text).unwrap();
        }

        fn watch(&self, name: &str, wanted: bool) -> OomWatch {
            let dir = self.0.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            OomWatch {
                event: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
                early: false,
                seen: 0,
                seen_above: above(Some(&dir)).unwrap(),
                of_neighbours: 0,
                dir: Some(dir),
                wanted,
                group: None,
            }
        }

        fn remove(&self, name: &str) {
            fs::remove_dir(self.0.path().join(name)).unwrap();
        }

        fn cgroup(&self, name: &str) -> Cgroup {
            let layout = super::super::Layout::at(&[], Some(self.0.path()));
            let path = super::super::CgroupPath::parse(&format!("/{name}")).unwrap();
            Cgroup::open(&layout, &path).unwrap()
        }
    }

    #[test]
    fn a_killing_is_told_by_the_parent_when_its_cgroup_is_gone() {
        let parent = Parent::new(3);
        let (struggled, calm) = (parent.watch("scope", true), parent.watch("scope", false));
        parent.counts(4);
        assert_eq!(struggled.lost(), 0, "it is there to be asked itself");
        let late = parent.watch("scope", true);
        parent.remove("scope");
        assert_eq!(struggled.lost(), 1);
        assert_eq!(calm.lost(), 0, "that was a neighbour");
        assert_eq!(late.lost(), 0, "nothing was killed since");
    }

    #[test]
    fn what_a_neighbour_lost_is_not_lost_here() {
        let parent = Parent::new(3);
        // Both have come up against their limits once.
        let mut watch = parent.watch("scope", true);
        parent.watch("other", true);
        let other = parent.cgroup("other").v2_parent();
        parent.counts(5);
        watch.neighbour_lost(other.as_deref(), 2);
        parent.remove("scope");
        assert_eq!(watch.lost(), 0, "both killed were the neighbour's");
        parent.counts(6);
        assert_eq!(watch.lost(), 1, "the third was not");

        // Looked at between the neighbour's loss and its being known.
        let mut watch = parent.watch("again", true);
        parent.counts(7);
        watch.take(&parent.cgroup("again")).unwrap();
        watch.neighbour_lost(other.as_deref(), 1);
        parent.remove("again");
        assert_eq!(watch.lost(), 0);
        parent.counts(8);
        assert_eq!(watch.lost(), 1);

        // A cgroup below another parent says nothing of this one.
        let mut watch = parent.watch("third", true);
        fs::create_dir_all(parent.0.path().join("third/below")).unwrap();
        watch.neighbour_lost(parent.cgroup("third/below").v2_parent().as_deref(), 1);
        parent.counts(9);
        fs::remove_dir_all(parent.0.path().join("third")).unwrap();
        assert_eq!(watch.lost(), 1);
    }

    #[test]
    fn what_the_killer_goes_by_is_kept_as_it_was_wanted_last() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(GROUP);
        std::fs::write(&file, "1").unwrap();
        std::fs::write(dir.path().join("memory.events"), "").unwrap();
        let event = inotify_v2(dir.path()).unwrap();
        let number = watch(&event, &file).unwrap();
        let cgroup = |text: &str| std::fs::write(dir.path().join("memory.events"), text).unwrap();
        let mut w = OomWatch {
            event,
            early: false,
            seen: 0,
            seen_above: 0,
            of_neighbours: 0,
            dir: None,
            wanted: false,
            group: Some(Group {
                file: file.clone(),
                watch: number,
                wanted: None,
            }),
        };
        let of = |json: &str| Resources::from_json(json).unwrap();
        let now = || std::fs::read_to_string(&file).unwrap();
        let ready =
            |w: &OomWatch| crate::process::poll_readable(w.as_fd(), Some(std::time::Duration::ZERO)).unwrap();
        std::fs::write(&file, "0").unwrap();
        assert!(ready(&w), "a write is heard of");
        w.hear().unwrap();
        assert!(!ready(&w) && !w.wanted, "which is no want of memory");
        w.keep_group();
        assert_eq!(now(), "0", "nobody has said anything of it");
        w.expect(&of(r#"{"unified":{"memory.oom.group":"1","memory.high":"5"}}"#));
        w.keep_group();
        assert_eq!(now(), "1");
        w.expect(&of(r#"{"memory":{"limit":5}}"#));
        std::fs::write(&file, "0\n").unwrap();
        w.keep_group();
        assert_eq!(now(), "1", "limits that do not name it leave it");
        w.expect(&of(r#"{"unified":{"memory.oom.group":"0"}}"#));
        w.keep_group();
        assert_eq!(now(), "0");
        cgroup("oom 1\n");
        w.hear().unwrap();
        assert!(w.wanted);
    }
}
