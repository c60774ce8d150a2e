//! The shim: everything it holds, and the loop that hands out what happens. One thread; nothing in here waits for anything
//! but the next event.

use crate::clock;
use crate::conn::{Broken, Conn, Reply};
use crate::diag::{Chain, debug, error, warning};
use crate::early::Early;
use crate::events::Events;
use crate::exec::State;
use crate::fault::Fault;
use crate::oom::OomScore;
use crate::pod::Pod;
use crate::publish::Publisher;
use crate::reactor::{Interest, Reactor, Ready, Source, Timer};
use crate::record::{ContainerRecord, Identity, PodCgroup, Record, RecordError, VERSION};
use crate::streams::{PumpEntry, SinkEntry};
use crate::task::{Container, Phase};
use prost::Message;
use slipway_shim_api::{events, pod, ttrpc};
use slipway_sys::cgroup::{Cgroup, Layout};
use slipway_sys::exec::Starting;
use slipway_sys::process::{SignalFd, Status};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Bytes read at a time; what is read faster than this is read in larger pieces.
pub const SCRATCH: usize = 8 * 1024;
/// How long nobody is let in when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long after something happened the stack and the buffer that it took are given back: 20 KiB a pod.
const QUIET: Duration = Duration::from_secs(1);
/// Clients at once.
const MAX_CONNS: usize = 64;
/// How long the last answers and events may take.
const FAREWELL: Duration = Duration::from_secs(2);

const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;
const SIGPIPE: i32 = 13;

/// What the shim is told when it is started.
#[derive(Debug)]
pub struct Config {
    /// The pod's id; under containerd the group's.
    pub id: String,
    /// Where its record, its socket and its pins are.
    pub state_dir: PathBuf,
    /// slipway-runc
    pub worker: PathBuf,
}

/// A call that waits for events.
#[derive(Debug)]
pub struct Poll {
    number: u32,
    after: u64,
    reply: Reply,
    until: Instant,
}

/// Everything.
pub struct Shim {
    /// As told.
    pub config: Config,
    /// slipway-runc once more, as it was when the shim began: what is executed is a read-only copy of its mount, which a
    /// container that gets hold of a worker's or an init's `/proc/<pid>/exe` cannot write through (CVE-2019-5736).
    pub worker: Option<OwnedFd>,
    /// What is waited for.
    pub reactor: Reactor,
    /// How much the OOM killer spares this process.
    pub oom_score: OomScore,
    /// This machine's cgroups.
    pub layout: Layout,
    /// The pod.
    pub pod: Pod,
    /// Its containers.
    pub containers: BTreeMap<u32, Container>,
    /// What happened.
    pub events: Events,
    /// Descriptors copied to others.
    pub pumps: BTreeMap<u32, PumpEntry>,
    /// Readers attached to outputs.
    pub sinks: BTreeMap<u32, SinkEntry>,
    /// Where containerd wants its events.
    pub publisher: Option<Publisher>,
    /// A buffer for whoever reads.
    pub scratch: Vec<u8>,
    /// Exits that came before the worker's report of the pid.
    pub early: Early,
    /// Killed on their way to their programs; what they have yet to say of themselves is heard when who went ahead ends.
    pub fading: Vec<(u32, Starting)>,
    /// Limits that are being changed, at most one change a container.
    pub updates: Vec<crate::update::Update>,
    polls: Vec<Poll>,
    conns: BTreeMap<u32, Conn>,
    listener: OwnedFd,
    signals: SignalFd,
    boot_id: String,
    identity: Identity,
    next: u32,
    /// Asked to end: at the latest then.
    leaving: Option<Instant>,
    /// Something has happened, and the memory that it takes was not given back yet.
    stirred: bool,
}

impl Shim {
    /// A shim that serves a listening socket, with nothing in it yet.
    ///
    /// # Errors
    /// When the kernel withholds something it cannot do without.
    pub fn new(config: Config, listener: OwnedFd, publisher: Option<Publisher>) -> io::Result<Shim> {
        slipway_sys::process::become_subreaper()?;
        slipway_sys::process::ignore_signal(SIGPIPE)?;
        let signals = SignalFd::new(&[SIGCHLD, SIGTERM])?;
        let reactor = Reactor::new()?;
        slipway_sys::fd::set_nonblocking(&listener, true)?;
        reactor.watch(&listener, Source::Listener, Interest::Read)?;
        reactor.watch(&signals, Source::Signals, Interest::Read)?;
        Ok(Shim {
            // Where it is not yet, a create says so.
            worker: slipway_sys::mount::program(&config.worker).ok(),
            config,
            reactor,
            oom_score: OomScore::take()?,
            layout: Layout::detect().map_err(io::Error::other)?,
            pod: Pod::default(),
            containers: BTreeMap::new(),
            events: Events::default(),
            pumps: BTreeMap::new(),
            sinks: BTreeMap::new(),
            publisher,
            scratch: Vec::new(),
            early: Early::default(),
            fading: Vec::new(),
            updates: Vec::new(),
            polls: Vec::new(),
            conns: BTreeMap::new(),
            listener,
            signals,
            boot_id: slipway_sys::process::boot_id()?,
            identity: Identity::of(std::process::id()),
            next: 1,
            leaving: None,
            stirred: false,
        })
    }

    /// A number nobody has.
    pub fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Serves until asked to end.
    ///
    /// # Errors
    /// When waiting itself fails.
    pub fn run(&mut self) -> io::Result<()> {
        let mut happened = Vec::new();
        while !self.may_leave() {
            self.reactor.wait(&mut happened)?;
            if !self.stirred {
                self.stirred = true;
                self.scratch = vec![0; SCRATCH];
                self.reactor.after(QUIET, Timer::Quiet);
            }
            for (source, ready) in happened.drain(..) {
                self.on(source, ready);
            }
            while let Some(timer) = self.reactor.due() {
                self.on_timer(timer);
            }
            // Only now: another moment that came with this one may have needed it.
            if !self.stirred {
                self.scratch = Vec::new();
                slipway_sys::memory::trim_stack();
            }
        }
        Ok(())
    }

    /// Whether everything that was to be said before the end is said, or its time is over.
    fn may_leave(&self) -> bool {
        let Some(until) = self.leaving else { return false };
        let said = !self.conns.values().any(Conn::has_output)
            && self.publisher.as_ref().is_none_or(Publisher::is_idle);
        said || Instant::now() >= until
    }

    fn on(&mut self, source: Source, ready: Ready) {
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.on_signals(),
            Source::Publisher => {
                if let Some(publisher) = &mut self.publisher {
                    publisher.on_ready(&mut self.reactor, ready);
                }
            }
            Source::Conn(id) => self.on_conn(id, ready),
            Source::Worker(key) => self.on_report(key),
            Source::Stdout(key) => self.on_output(key, crate::log::Source::Stdout),
            Source::Stderr(key) => self.on_output(key, crate::log::Source::Stderr),
            Source::Oom(key) => self.on_oom_event(key),
            Source::Exec(serial) => self.on_exec_report(serial),
            Source::Update(serial) => self.on_update(serial),
            Source::PumpFrom(id) | Source::PumpTo(id) => self.run_pump(id),
            Source::Sink(id) => self.on_sink(id, ready),
        }
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Worker(key) => self.on_deadline(key),
            Timer::Ending(key) => self.look_at_ending(key),
            Timer::Removing(key) => self.remove(key),
            Timer::Exec(key, serial) => self.on_exec_timeout(key, serial),
            Timer::ExecStart(key, serial) => self.on_exec_start_timeout(key, serial),
            Timer::Update(serial) => self.on_update_timeout(serial),
            Timer::Events(number) => self.answer_poll(number),
            Timer::Oom(key) => self.on_oom_timer(key),
            Timer::Terminal(key) => self.read_terminal_again(key),
            Timer::Accept => {
                if let Err(e) = self
                    .reactor
                    .watch(&self.listener, Source::Listener, Interest::Read)
                {
                    warning!("watch the socket: {e}");
                    self.reactor.look_again(ACCEPT_PAUSE, Timer::Accept);
                }
            }
            Timer::Pump(id) => self.run_pump(id),
            Timer::Publisher => {
                if let Some(publisher) = &mut self.publisher {
                    publisher.connect(&mut self.reactor);
                }
            }
            Timer::Leave => {}
            Timer::PodStop => self.look_at_stopping(),
            Timer::Quiet => self.stirred = false,
        }
    }

    fn accept(&mut self) {
        use rustix::net::SocketFlags;
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(errno) => {
                    // Out of descriptors, most likely. Who waits stays in the queue, and would be told of again and again.
                    warning!("accept a connection: {errno}");
                    self.reactor.forget(&self.listener);
                    return self.reactor.look_again(ACCEPT_PAUSE, Timer::Accept);
                }
            };
            if self.conns.len() >= MAX_CONNS {
                warning!("a connection was refused: there are {MAX_CONNS} already");
                continue;
            }
            let id = self.number();
            match self.reactor.watch(&socket, Source::Conn(id), Interest::Read) {
                Ok(_) => drop(self.conns.insert(id, Conn::new(socket))),
                Err(e) => warning!("watch a connection: {e}"),
            }
        }
    }

    fn on_conn(&mut self, id: u32, ready: Ready) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let mut requests = Vec::new();
        let mut result = if ready.write && conn.has_output() {
            conn.write()
        } else {
            Ok(())
        };
        if ready.read && result.is_ok() {
            result = conn.read(&mut self.scratch, &mut requests);
        }
        for incoming in requests {
            // An answer to one before may have shown that the client is gone: nothing is begun for it any more.
            if !self.conns.contains_key(&id) {
                return;
            }
            let reply = Reply {
                conn: id,
                stream: incoming.stream,
            };
            self.dispatch(reply, incoming);
        }
        self.settle(id, result);
    }

    /// After reading or writing: closes the connection, or watches for what it needs now.
    fn settle(&mut self, id: u32, result: Result<(), Broken>) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        match result {
            Ok(()) if conn.has_output() == conn.waits_for_room => {}
            Ok(()) => {
                conn.waits_for_room = conn.has_output();
                let interest = if conn.waits_for_room {
                    Interest::Both
                } else {
                    Interest::Read
                };
                self.reactor.change(conn.fd(), Source::Conn(id), interest);
            }
            Err(why) => {
                match why {
                    Broken::Closed => debug!("a client is gone"),
                    other => warning!("a connection was closed: {}", Chain(&other)),
                }
                self.reactor.forget(conn.fd());
                self.conns.remove(&id);
                // What it asked for goes on (a deletion too); only nobody waits for it any more. Not so the processes it
                // runs in containers: they are its own, and nobody else would ever end them.
                self.kill_execs_of(id);
                self.polls.retain(|poll| poll.reply.conn != id);
                for container in self.containers.values_mut() {
                    container.forget_start(id);
                    container.waiters.retain(|reply| reply.conn != id);
                    container
                        .execs
                        .iter_mut()
                        .for_each(|exec| exec.waiters.retain(|reply| reply.conn != id));
                }
            }
        }
    }

    /// Answers a call, if whoever made it is still there.
    pub fn answer(&mut self, reply: Reply, result: Result<Vec<u8>, Fault>) {
        let Some(conn) = self.conns.get_mut(&reply.conn) else {
            return;
        };
        let response = match result {
            Ok(payload) => ttrpc::Response {
                status: None,
                payload,
            },
            Err(fault) => {
                debug!("a call failed: {fault}");
                ttrpc::Response {
                    status: Some(fault.status()),
                    payload: Vec::new(),
                }
            }
        };
        let result = conn.respond(reply.stream, &response);
        if result.is_err() || conn.has_output() {
            self.settle(reply.conn, result);
        }
    }

    fn on_signals(&mut self) {
        loop {
            match self.signals.next() {
                Ok(Some(SIGTERM)) => self.leave_if_empty(),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(e) => {
                    error!("{}", Chain(&e));
                    break;
                }
            }
        }
        loop {
            match slipway_sys::process::reap_any() {
                Ok(Some(exited)) => self.on_exit(exited.pid, exited.status),
                Ok(None) => break,
                Err(e) => {
                    error!("{}", Chain(&e));
                    break;
                }
            }
        }
    }

    fn on_exit(&mut self, pid: u32, status: Status) {
        let at_ns = clock::now();
        for (key, container) in &self.containers {
            let key = *key;
            if let Phase::Creating(creating) = &container.phase
                && creating.worker.pid == pid
            {
                return self.worker_exited(key, status);
            }
            if container.phase.init().is_some_and(|init| init.pid == pid) {
                return self.init_exited(key, status, at_ns);
            }
            for exec in &container.execs {
                match &exec.state {
                    State::Running(child) if child.pid == pid => {
                        return self.exec_exited(key, exec.serial, pid, status, at_ns);
                    }
                    // Its part is done; what it has said is heard.
                    State::Starting(way) if way.starting.ahead().pid == pid => return,
                    _ => {}
                }
            }
        }
        if self.pod.init.as_ref().is_some_and(|init| init.process.pid == pid) {
            return self.pod_init_exited(status);
        }
        self.ahead_exited(pid);
        let is_awaited = self.is_creating() || self.is_beginning() || !self.fading.is_empty();
        if is_awaited {
            self.early.insert(pid, status, at_ns);
        }
    }

    /// Whether a worker is at work, so that a pid nobody knows may be known soon.
    pub fn is_creating(&self) -> bool {
        self.containers
            .values()
            .any(|c| matches!(c.phase, Phase::Creating(_)))
    }

    /// A container by its id.
    ///
    /// # Errors
    /// `NotFound`
    pub fn find(&self, id: &str) -> Result<u32, Fault> {
        let found = self.containers.iter().find(|(_, c)| c.id == id);
        found
            .map(|(key, _)| *key)
            .ok_or_else(|| Fault::not_found(format_args!("there is no container {id}")))
    }

    /// A container and its key, to be changed.
    ///
    /// # Errors
    /// `NotFound`
    pub fn find_mut(&mut self, id: &str) -> Result<(u32, &mut Container), Fault> {
        let found = self.containers.iter_mut().find(|(_, c)| c.id == id);
        found
            .map(|(key, c)| (*key, c))
            .ok_or_else(|| Fault::not_found(format_args!("there is no container {id}")))
    }

    /// Notes an event and wakes who waits for one.
    pub fn happened(&mut self, container: &str, what: pod::event::What) {
        self.events.push(container, what);
        for number in self.polls.iter().map(|poll| poll.number).collect::<Vec<_>>() {
            self.answer_poll(number);
        }
    }

    /// Answers a call for events, or keeps it until there is one.
    pub fn poll_events(&mut self, reply: Reply, after: u64, wait: Duration) -> Option<Vec<u8>> {
        let events = self.events.after(after);
        if !events.is_empty() || wait.is_zero() || self.polls.len() >= MAX_CONNS {
            return Some(pod::EventsResponse { events }.encode_to_vec());
        }
        let number = self.number();
        let until = self.reactor.after(wait, Timer::Events(number));
        self.polls.push(Poll {
            number,
            after,
            reply,
            until,
        });
        None
    }

    fn answer_poll(&mut self, number: u32) {
        let Some(at) = self.polls.iter().position(|poll| poll.number == number) else {
            return;
        };
        let poll = self.polls.swap_remove(at);
        self.reactor.cancel(poll.until, Timer::Events(number));
        let events = self.events.after(poll.after);
        self.answer(poll.reply, Ok(pod::EventsResponse { events }.encode_to_vec()));
    }

    /// Sends an event to containerd, when there is one.
    pub fn publish(&mut self, topic: &'static str, name: &'static str, event: &impl Message) {
        if let Some(publisher) = &mut self.publisher {
            publisher.push(&mut self.reactor, topic, name, event.encode_to_vec());
        }
    }

    /// Tells containerd of an exit.
    pub fn publish_exit(&mut self, container: &str, id: &str, exit: crate::record::Exit) {
        let event = events::TaskExit {
            container_id: container.to_owned(),
            id: id.to_owned(),
            pid: exit.pid,
            exit_status: exit.code,
            exited_at: Some(slipway_shim_api::timestamp(exit.at_ns)),
        };
        self.publish(
            slipway_shim_api::names::topic::EXIT,
            "containerd.events.TaskExit",
            &event,
        );
    }

    /// Writes down what there is now.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<(), RecordError> {
        let record = Record {
            version: VERSION,
            boot_id: self.boot_id.clone(),
            shim: self.identity,
            pod_id: self.config.id.clone(),
            namespaces: self
                .pod
                .namespaces
                .iter()
                .map(|(k, p)| (k.name().to_owned(), p.clone()))
                .collect(),
            pod_cgroup: self.pod.cgroup.as_ref().map(|c| PodCgroup {
                cgroup: &c.cgroup,
                made: c.made,
            }),
            init_cgroup: self.pod.init_cgroup.as_ref(),
            containers: self.containers.values().map(record_of).collect(),
        };
        record.write(&self.config.state_dir)
    }

    /// Writes down what there is now; a failure only means that a clean-up would know less.
    pub fn save_or_warn(&self) {
        if let Err(e) = self.save() {
            error!("{}", Chain(&e));
        }
    }

    /// Ends the loop once every answer is out.
    pub fn leave(&mut self) {
        self.leaving = Some(self.reactor.after(FAREWELL, Timer::Leave));
    }

    /// Ends the loop unless there are containers.
    pub fn leave_if_empty(&mut self) {
        if self.containers.is_empty() && self.pod.init.is_none() {
            self.leave();
        }
    }

    /// The pid of this process.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }
}

fn record_of(c: &Container) -> ContainerRecord<&Cgroup> {
    ContainerRecord {
        id: c.id.clone(),
        bundle: c.bundle.clone(),
        cgroup: &c.cgroup,
        rootfs_mounted: c.rootfs_mounted,
        pid: c.phase.init().map_or(0, |init| init.pid),
        exit: if let Phase::Stopped(exit) = &c.phase {
            Some(*exit)
        } else {
            None
        },
        failure: c.failure.as_ref().map(|failure| failure.status().message),
    }
}
