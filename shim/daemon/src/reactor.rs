//! What the shim waits for: descriptors (epoll, level-triggered) and moments. Knows neither what happens then nor who asks.

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// A descriptor that something happens on, by whose it is. Numbers are never used twice, so that an event that comes
/// late means nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The socket connections come in on.
    Listener,
    /// SIGCHLD and SIGTERM.
    Signals,
    /// The connection to containerd's event service.
    Publisher,
    /// A connection.
    Conn(u32),
    /// The report of a container's worker.
    Worker(u32),
    /// A container's stdout, or its terminal.
    Stdout(u32),
    /// A container's stderr.
    Stderr(u32),
    /// A container's watch for kills by the kernel.
    Oom(u32),
    /// The side of a pump that is read.
    PumpFrom(u32),
    /// The side of a pump that is written.
    PumpTo(u32),
    /// An attached reader.
    Sink(u32),
    /// The report of an exec that was begun, by its serial number.
    Exec(u32),
    /// Who changes limits, by the change's number.
    Update(u32),
}

impl Source {
    fn encode(self) -> u64 {
        let (kind, id) = match self {
            Source::Listener => (0, 0),
            Source::Signals => (1, 0),
            Source::Publisher => (2, 0),
            Source::Conn(id) => (3, id),
            Source::Worker(id) => (4, id),
            Source::Stdout(id) => (5, id),
            Source::Stderr(id) => (6, id),
            Source::Oom(id) => (7, id),
            Source::PumpFrom(id) => (8, id),
            Source::PumpTo(id) => (9, id),
            Source::Sink(id) => (10, id),
            Source::Exec(id) => (11, id),
            Source::Update(id) => (12, id),
        };
        kind << 32 | u64::from(id)
    }

    fn decode(data: u64) -> Option<Source> {
        let id = data as u32;
        Some(match data >> 32 {
            0 => Source::Listener,
            1 => Source::Signals,
            2 => Source::Publisher,
            3 => Source::Conn(id),
            4 => Source::Worker(id),
            5 => Source::Stdout(id),
            6 => Source::Stderr(id),
            7 => Source::Oom(id),
            8 => Source::PumpFrom(id),
            9 => Source::PumpTo(id),
            10 => Source::Sink(id),
            11 => Source::Exec(id),
            12 => Source::Update(id),
            _ => return None,
        })
    }
}

/// A moment, by what is due then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// A container's worker has had its time.
    Worker(u32),
    /// Look again whether an ended container's cgroup is empty and its streams have ended.
    Ending(u32),
    /// Look again whether a cgroup lets itself be removed.
    Removing(u32),
    /// An exec has had its time: container and serial number.
    Exec(u32, u32),
    /// An exec that was begun has had its time: container and serial number.
    ExecStart(u32, u32),
    /// A change of limits has had its time, by its number.
    Update(u32),
    /// A call that waits for events has waited long enough.
    Events(u32),
    /// Look again whether the kernel has killed something of a container.
    Oom(u32),
    /// Read a container's terminal again that nobody had open.
    Terminal(u32),
    /// Accept connections again.
    Accept,
    /// Go on with a pump that cannot be watched.
    Pump(u32),
    /// Connect to containerd again.
    Publisher,
    /// The last moment of the shim.
    Leave,
    /// Look again whether the pod's processes are gone.
    PodStop,
    /// Something was done a moment ago: give back the memory that it took.
    Quiet,
}

/// What to look at on a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Data to read, or the end of it.
    Read,
    /// Room to write.
    Write,
    /// Both.
    Both,
    /// Only that the other side is gone.
    HangUp,
}

/// What happened on a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There is something to read, or nothing ever will be.
    pub read: bool,
    /// There is room to write, or nobody who would read.
    pub write: bool,
    /// The other side is gone.
    pub hang_up: bool,
}

/// The epoll descriptor and the list of moments.
pub struct Reactor {
    epoll: OwnedFd,
    timers: BTreeSet<(Instant, Timer)>,
}

impl Reactor {
    /// Nothing to wait for yet.
    ///
    /// # Errors
    /// When epoll cannot be had.
    pub fn new() -> io::Result<Reactor> {
        Ok(Reactor {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timers: BTreeSet::new(),
        })
    }

    /// Watches a descriptor; false when it is of a kind that is always ready (a file), which cannot be watched.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    pub fn watch(&self, fd: impl AsFd, source: Source, interest: Interest) -> io::Result<bool> {
        let data = epoll::EventData::new_u64(source.encode());
        match epoll::add(&self.epoll, fd, data, flags(interest)) {
            Ok(()) => Ok(true),
            Err(Errno::PERM) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Watches a watched descriptor for something else.
    pub fn change(&self, fd: impl AsFd, source: Source, interest: Interest) {
        let data = epoll::EventData::new_u64(source.encode());
        if let Err(errno) = epoll::modify(&self.epoll, fd, data, flags(interest)) {
            crate::diag::error!("watch {source:?} otherwise: {errno}");
        }
    }

    /// Watches no longer. A descriptor whose duplicates live on has to be forgotten before it is closed.
    pub fn forget(&self, fd: impl AsFd) {
        // Not watched: fine.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Sets a moment, and answers it for [`Reactor::cancel`].
    pub fn after(&mut self, delay: Duration, timer: Timer) -> Instant {
        let at = Instant::now() + delay;
        self.timers.insert((at, timer));
        at
    }

    /// Sets a moment to look again, unless one is set: however many ask, there is one look.
    pub fn look_again(&mut self, delay: Duration, timer: Timer) {
        if !self.timers.iter().any(|(_, set)| *set == timer) {
            self.after(delay, timer);
        }
    }

    /// Takes a moment back.
    pub fn cancel(&mut self, at: Instant, timer: Timer) {
        self.timers.remove(&(at, timer));
    }

    /// A moment that has come.
    pub fn due(&mut self) -> Option<Timer> {
        let (at, timer) = *self.timers.first()?;
        if at > Instant::now() {
            return None;
        }
        self.timers.pop_first();
        Some(timer)
    }

    /// Waits for the next thing to happen and appends what did.
    ///
    /// # Errors
    /// What `epoll_wait(2)` says.
    pub fn wait(&self, happened: &mut Vec<(Source, Ready)>) -> io::Result<()> {
        let timeout = self.timers.first().map(|(at, _)| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 16];
        let (events, _) = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(events) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for event in events {
            use epoll::EventFlags as F;
            // The struct is packed: no references into it.
            let (data, flags) = (event.data.u64(), event.flags);
            let hang_up = flags.intersects(F::HUP | F::ERR);
            let ready = Ready {
                read: hang_up || flags.contains(F::IN),
                write: hang_up || flags.contains(F::OUT),
                hang_up,
            };
            if let Some(source) = Source::decode(data) {
                happened.push((source, ready));
            }
        }
        Ok(())
    }
}

fn flags(interest: Interest) -> epoll::EventFlags {
    match interest {
        Interest::Read => epoll::EventFlags::IN,
        Interest::Write => epoll::EventFlags::OUT,
        Interest::Both => epoll::EventFlags::IN | epoll::EventFlags::OUT,
        Interest::HangUp => epoll::EventFlags::empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_survives_the_trip_through_the_kernel() {
        for source in [
            Source::Listener,
            Source::Conn(7),
            Source::Stderr(u32::MAX),
            Source::Sink(0),
        ] {
            assert_eq!(Source::decode(source.encode()), Some(source));
        }
        assert_eq!(Source::decode(99 << 32), None);
    }

    #[test]
    fn moments_come_in_their_order_and_can_be_taken_back() {
        let mut reactor = Reactor::new().expect("epoll");
        reactor.after(Duration::ZERO, Timer::Ending(1));
        let at = reactor.after(Duration::ZERO, Timer::Ending(2));
        reactor.after(Duration::from_secs(100), Timer::Publisher);
        reactor.cancel(at, Timer::Ending(2));
        reactor.wait(&mut Vec::new()).expect("waited");
        assert_eq!(reactor.due(), Some(Timer::Ending(1)));
        assert_eq!(reactor.due(), None);
    }

    #[test]
    fn the_end_of_a_pipe_is_something_to_read() {
        let reactor = Reactor::new().expect("epoll");
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        assert!(
            reactor
                .watch(&read, Source::Stdout(3), Interest::Read)
                .expect("watched")
        );
        drop(write);
        let mut happened = Vec::new();
        reactor.wait(&mut happened).expect("waited");
        assert_eq!(
            happened,
            [(
                Source::Stdout(3),
                Ready {
                    read: true,
                    write: true,
                    hang_up: true
                }
            )]
        );
    }

    #[test]
    fn a_file_cannot_be_watched_and_that_is_no_error() {
        let reactor = Reactor::new().expect("epoll");
        let file = tempfile::tempfile().expect("a file");
        assert!(
            !reactor
                .watch(&file, Source::Sink(1), Interest::Write)
                .expect("answered")
        );
    }
}
