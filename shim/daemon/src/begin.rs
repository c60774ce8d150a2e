//! How an exec comes to run its program: begun, and heard when it has something to say, so that one whose program lies on a
//! file system that does not answer holds up nobody but itself.
//!
//! ```text
//!  Added ─▶ Starting: two children, the first of which ends ──the program runs──▶ Running
//!                      │ it cannot be run, or takes too long
//!                      ▼
//!                     (pod: gone, who asked is told; containerd: Added again)
//! ```

use crate::conn::Reply;
use crate::diag::{Chain, debug, warning};
use crate::exec::{Exec, State};
use crate::fault::Fault;
use crate::reactor::{Interest, Source, Timer};
use crate::shim::Shim;
use crate::stdio::Ours;
use crate::streams::Owner;
use crate::task::Phase;
use prost::Message;
use slipway_shim_api::names::topic;
use slipway_shim_api::{events, task};
use slipway_sys::exec::{Begun, ExecError, ExecPlan, Process, Starting};
use slipway_sys::process::{Child, Status};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// A process on its way to its program.
#[derive(Debug)]
pub struct Way {
    /// It.
    pub starting: Starting,
    /// When its time is over.
    pub until: Instant,
    /// What is to be done when it runs its program.
    pub then: Then,
    /// What it was sent meanwhile.
    pub signal: Option<Sent>,
}

/// A signal for a process that is on its way to its program, or runs it already and was not heard of yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// To it alone.
    One(i32),
    /// SIGKILL, to what it has started by then too.
    KillAll,
}

/// What is to be done when a process runs its program.
#[derive(Debug)]
pub enum Then {
    /// slipway.pod.v1, which is answered when it has ended.
    Pod {
        /// Where its terminal's master goes.
        terminal: Option<OwnedFd>,
    },
    /// containerd.
    Task {
        /// Who asked for the start.
        reply: Reply,
        /// What was added.
        process: Box<Process>,
        /// Its streams.
        ours: Box<Ours>,
    },
}

impl Then {
    /// Who waits for the start.
    pub fn starter(self) -> Option<Reply> {
        match self {
            Then::Pod { .. } => None,
            Then::Task { reply, .. } => Some(reply),
        }
    }
}

impl Shim {
    /// Begins to run a process in a container that runs.
    ///
    /// # Errors
    /// When it does not run, or the process cannot even be begun.
    pub fn begin(
        &mut self,
        key: u32,
        process: &Process,
        seccomp_bpf: Option<&[u8]>,
        stdio: [Option<BorrowedFd<'_>>; 3],
    ) -> Result<Starting, Fault> {
        let Some(container) = self.containers.get(&key) else {
            return Err(ExecError::Gone.into());
        };
        let Phase::Running(init) = &container.phase else {
            return Err(container.illegal("run a process in").into());
        };
        let plan = ExecPlan {
            init_pid: init.pid,
            pidfd: init.pidfd.as_fd(),
            process,
            seccomp_bpf,
            cgroup: Some(&container.cgroup),
            stdio,
        };
        Ok(slipway_sys::exec::begin(&plan)?)
    }

    /// An exec was begun: it is heard from now on.
    pub fn on_its_way(&mut self, key: u32, serial: u32, starting: Starting, then: Then) {
        let patience = slipway_sys::exec::PATIENCE;
        let until = self.reactor.after(patience, Timer::ExecStart(key, serial));
        if let Err(e) = self
            .reactor
            .watch(starting.fd(), Source::Exec(serial), Interest::Read)
        {
            // Its deadline ends it.
            warning!("watch an exec: {e}");
        }
        if let Some(exec) = self.exec_mut(key, serial) {
            exec.state = State::Starting(Box::new(Way {
                starting,
                until,
                then,
                signal: None,
            }));
        }
    }

    /// Hears no more of an exec that was begun.
    pub fn off_its_way(&mut self, key: u32, serial: u32, way: &Way) {
        self.reactor.forget(way.starting.fd());
        self.reactor.cancel(way.until, Timer::ExecStart(key, serial));
    }

    /// Whether a pid nobody knows may be an exec's soon.
    pub fn is_beginning(&self) -> bool {
        let mut execs = self.containers.values().flat_map(|c| &c.execs);
        execs.any(crate::exec::Exec::is_starting)
    }

    /// An exec that was begun has something to say.
    pub fn on_exec_report(&mut self, serial: u32) {
        let found = self.containers.iter_mut().find_map(|(key, c)| {
            let exec = c.execs.iter_mut().find(|exec| exec.serial == serial)?;
            Some((*key, exec))
        });
        if let Some((key, exec)) = found
            && let State::Starting(way) = &mut exec.state
            && let Some(result) = way.starting.hear()
        {
            self.heard_out(key, serial, result);
        }
    }

    /// An exec that was begun has had its time.
    pub fn on_exec_start_timeout(&mut self, key: u32, serial: u32) {
        let Some(exec) = self.exec_mut(key, serial) else {
            return;
        };
        if let State::Starting(way) = &exec.state {
            let error = way.starting.timeout();
            self.heard_out(key, serial, Err(error));
        }
    }

    fn heard_out(&mut self, key: u32, serial: u32, result: Result<Begun, ExecError>) {
        let Some(exec) = self.exec_mut(key, serial) else {
            return;
        };
        let way = match std::mem::replace(&mut exec.state, State::Moving) {
            State::Starting(way) => way,
            other => {
                exec.state = other;
                return;
            }
        };
        self.off_its_way(key, serial, &way);
        let done = result.map_err(|e| {
            let id = self.containers.get(&key).map_or("", |c| &c.id);
            Fault::from(e).during(format_args!("run {:?} in container {id}", way.starting.program()))
        });
        match done {
            Ok(begun) => self.begun(key, serial, *way, begun),
            Err(fault) => {
                let then = self.kill_on_its_way(key, *way);
                self.not_begun(key, serial, then, fault);
            }
        }
        self.forget_early();
    }

    /// An exec runs its program, or did.
    fn begun(&mut self, key: u32, serial: u32, way: Way, begun: Begun) {
        let pid = begun.pid;
        let ended = match self.take_child(pid) {
            Ok(child) => {
                if let Some(Sent::One(signal)) = way.signal
                    && let Err(e) = slipway_sys::process::send_signal(child.pidfd.as_fd(), signal)
                {
                    warning!("{}", Chain(&e));
                }
                if let Some(exec) = self.exec_mut(key, serial) {
                    exec.state = State::Running(child);
                }
                if way.signal == Some(Sent::KillAll) {
                    self.kill_tree(key, serial);
                }
                None
            }
            Err(Some(ended)) => Some(ended),
            Err(None) => return self.not_begun(key, serial, way.then, ExecError::Gone.into()),
        };
        debug!("process {pid} runs");
        let streams = match way.then {
            Then::Pod { terminal } => pass_on(begun.pty_master, terminal),
            Then::Task { reply, ours, .. } => {
                let copied = self.copy_streams(key, serial, *ours, begun.pty_master);
                if copied.is_ok() {
                    self.tell_of_start(key, serial, reply, pid);
                } else {
                    self.answer(reply, copied.clone().map(|()| Vec::new()));
                }
                copied
            }
        };
        if let Err(fault) = streams {
            warning!("{fault}");
            if let Some(reply) = self.exec_mut(key, serial).and_then(Exec::take_caller) {
                self.answer(reply, Err(fault));
            }
            self.kill_tree(key, serial);
            self.forget_exec(key, serial);
        } else if let Some((status, at_ns)) = ended {
            self.exec_exited(key, serial, pid, status, at_ns);
        }
    }

    /// Kills a process that is on its way to its program, whether it was heard of or not.
    pub fn kill_on_its_way(&mut self, key: u32, way: Way) -> Then {
        let Way {
            mut starting, then, ..
        } = way;
        crate::create::kill(starting.ahead());
        let is_alive = slipway_sys::process::is_child(starting.ahead().pid);
        let _ = starting.hear();
        match starting.pid() {
            Some(pid) => self.kill_heard_of(key, pid),
            // If there is a second one, that is said before who goes ahead has ended.
            None if is_alive => self.fading.push((key, starting)),
            None => {}
        }
        then
    }

    fn kill_heard_of(&mut self, key: u32, pid: u32) {
        let Ok(child) = self.take_child(pid) else { return };
        match self.containers.get(&key) {
            Some(container) => container.kill_trees(&[&child]),
            // Its cgroup went with it.
            None => crate::create::kill(&child),
        }
    }

    /// A process was reaped that nobody knows: it may be one that went ahead of another, and was killed on its way.
    pub fn ahead_exited(&mut self, pid: u32) {
        let Some(at) = self
            .fading
            .iter()
            .position(|(_, starting)| starting.ahead().pid == pid)
        else {
            return;
        };
        let (key, mut starting) = self.fading.remove(at);
        let _ = starting.hear();
        if let Some(pid) = starting.pid() {
            self.kill_heard_of(key, pid);
        }
    }

    /// A process that was begun here, or how it ended; nothing when it is not known at all.
    fn take_child(&mut self, pid: u32) -> Result<Child, Option<(Status, i64)>> {
        let early = self.early.remove(pid);
        // One that is a child of ours still was not reaped: then the other was somebody else with its pid.
        if !slipway_sys::process::is_child(pid) {
            return Err(early);
        }
        match slipway_sys::process::pidfd_open(pid) {
            Ok(pidfd) => Ok(Child { pid, pidfd }),
            Err(_) => Err(None),
        }
    }

    fn tell_of_start(&mut self, key: u32, serial: u32, reply: Reply, pid: u32) {
        let container_id = self
            .containers
            .get(&key)
            .map(|c| c.id.clone())
            .unwrap_or_default();
        let exec_id = self
            .exec_mut(key, serial)
            .map(|exec| exec.id.clone())
            .unwrap_or_default();
        let event = events::TaskExecStarted {
            container_id,
            exec_id,
            pid,
        };
        self.publish(topic::EXEC_STARTED, "containerd.events.TaskExecStarted", &event);
        self.answer(reply, Ok(task::StartResponse { pid }.encode_to_vec()));
    }

    fn not_begun(&mut self, key: u32, serial: u32, then: Then, fault: Fault) {
        match then {
            Then::Pod { .. } => {
                if let Some(reply) = self.exec_mut(key, serial).and_then(Exec::take_caller) {
                    self.answer(reply, Err(fault));
                }
                self.forget_exec(key, serial);
            }
            Then::Task { reply, process, .. } => {
                if let Some(exec) = self.exec_mut(key, serial) {
                    exec.state = State::Added(process);
                }
                self.answer(reply, Err(fault));
            }
        }
    }

    /// Begins to copy what is copied for containerd.
    fn copy_streams(
        &mut self,
        key: u32,
        serial: u32,
        ours: Ours,
        master: Option<OwnedFd>,
    ) -> Result<(), Fault> {
        if let Some(exec) = self.exec_mut(key, serial) {
            exec.fifos = ours.fifos;
        }
        let to = match master {
            Some(master) => Some(
                self.use_exec_terminal(key, serial, master)
                    .map_err(|e| Fault::failed("use its terminal", &e))?,
            ),
            None => ours.stdin,
        };
        if let (Some(fifo), Some(to)) = (ours.stdin_fifo, to) {
            let id = self.start_pump_from_fifo(fifo, to, Owner::Exec(key, serial));
            if let Some(exec) = self.exec_mut(key, serial) {
                exec.pumps.push(id);
            }
        }
        Ok(())
    }

    /// Begins to copy a terminal's output; answers where its input goes.
    fn use_exec_terminal(&mut self, key: u32, serial: u32, master: OwnedFd) -> std::io::Result<OwnedFd> {
        slipway_sys::fd::set_nonblocking(&master, true)?;
        let read = rustix::io::fcntl_dupfd_cloexec(&master, 3)?;
        let write = rustix::io::fcntl_dupfd_cloexec(&master, 3)?;
        let fifo = self.exec_mut(key, serial).and_then(|exec| {
            exec.terminal = Some(master);
            exec.fifos.pop()
        });
        if let Some(to) = fifo {
            let id = self.start_pump(read, to, Owner::Exec(key, serial), true);
            if let Some(exec) = self.exec_mut(key, serial) {
                exec.pumps.push(id);
            }
        }
        Ok(write)
    }

    /// Forgets exits of processes nobody will claim any more.
    pub fn forget_early(&mut self) {
        if !self.is_creating() && !self.is_beginning() && self.fading.is_empty() {
            self.early.clear();
        }
    }
}

/// Sends a terminal's master through the socket that the request brought.
fn pass_on(master: Option<OwnedFd>, socket: Option<OwnedFd>) -> Result<(), Fault> {
    let (Some(master), Some(socket)) = (master, socket) else {
        return Ok(());
    };
    slipway_sys::fd::send_fds(&socket, &[0], &[master.as_fd()])
        .map(drop)
        .map_err(|e| Fault::failed("pass its terminal on", &e))
}
