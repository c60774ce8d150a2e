//! Processes run in a container besides its init: for containerd (added, started, waited for, deleted) and for
//! slipway.pod.v1 (run, and answered when it has ended). Confining them is `slipway_sys::exec`'s.
//!
//! A pod exec writes straight into the descriptors its request brought; nothing is relayed, so its end is its exit, whatever
//! background child still holds its stdout.
//!
//! How one comes to run its program is in [`crate::begin`].
//!
//! When a pod exec's time is over, SIGKILL goes to it and to what can be found of what it started: every process of the
//! container that is in its session, or that descends from one of those. Whoever left the session *and* was orphaned before
//! is not found, and lives as long as the container: a cgroup of the exec's own would find those too, but then an exec
//! would not be where the container's init is.

use crate::begin::{Sent, Then, Way};
use crate::conn::Reply;
use crate::diag::warning;
use crate::fault::Fault;
use crate::reactor::Timer;
use crate::record::Exit;
use crate::shim::Shim;
use crate::spec;
use crate::stdio::{self, Output, Stdin};
use crate::task::Asked;
use prost::Message;
use slipway_shim_api::names::topic;
use slipway_shim_api::status::Code;
use slipway_shim_api::{events, pod, process, task, timestamp};
use slipway_sys::exec::{ConsoleSize, ExecError, Process};
use slipway_sys::process::{Child, Status};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Execs in one container, ended ones that nobody deleted included.
const MAX_EXECS: usize = 1000;
/// How long a killed exec may take to die before its caller is answered without.
const DEATH: Duration = Duration::from_secs(5);

/// Who runs an exec.
#[derive(Clone, Copy, Debug)]
pub enum Caller {
    /// containerd.
    Task,
    /// slipwayd or the builder; answered when it has ended.
    Pod(Reply),
    /// slipwayd or the builder, which was answered.
    Answered,
}

/// Where in its life an exec is.
#[derive(Debug)]
pub enum State {
    /// Added, not started.
    Added(Box<Process>),
    /// It was begun, and does not run its program yet.
    Starting(Box<Way>),
    /// It runs.
    Running(Child),
    /// It has ended.
    Stopped(Exit),
    /// Between two states, inside one function.
    Moving,
}

/// A process run in a container.
#[derive(Debug)]
pub struct Exec {
    /// Unique in the shim.
    pub serial: u32,
    /// Unique in the container.
    pub id: String,
    /// Where in its life it is.
    pub state: State,
    /// Who waits for its end.
    pub waiters: Vec<Reply>,
    /// Who runs it.
    pub caller: Caller,
    asked: Asked,
    deadline: Option<Instant>,
    timed_out: bool,
    /// Held open so that a client may come and go.
    pub fifos: Vec<OwnedFd>,
    /// Its terminal's master.
    pub terminal: Option<OwnedFd>,
    /// Pumps of its streams, by number.
    pub pumps: Vec<u32>,
}

impl Exec {
    fn new(serial: u32, id: String, state: State, caller: Caller, asked: Asked) -> Exec {
        Exec {
            serial,
            id,
            state,
            waiters: Vec::new(),
            caller,
            asked,
            deadline: None,
            timed_out: false,
            fifos: Vec::new(),
            terminal: None,
            pumps: Vec::new(),
        }
    }

    /// Its pid, while it has one.
    pub fn pid(&self) -> Option<u32> {
        match &self.state {
            State::Starting(way) => way.starting.pid(),
            State::Running(child) => Some(child.pid),
            _ => None,
        }
    }

    /// Who runs it and is not answered yet: to be answered now.
    pub fn take_caller(&mut self) -> Option<Reply> {
        match self.caller {
            Caller::Pod(reply) => {
                self.caller = Caller::Answered;
                Some(reply)
            }
            Caller::Task | Caller::Answered => None,
        }
    }

    /// Whether it was begun and does not run its program yet.
    pub fn is_starting(&self) -> bool {
        matches!(self.state, State::Starting(_))
    }

    /// As containerd wants to know it.
    pub fn describe(&self, container: &str, bundle: &str) -> task::StateResponse {
        let (status, exit) = match &self.state {
            State::Added(_) | State::Starting(_) => (process::Status::Created, None),
            State::Moving => (process::Status::Unknown, None),
            State::Running(_) => (process::Status::Running, None),
            State::Stopped(exit) => (process::Status::Stopped, Some(exit)),
        };
        task::StateResponse {
            id: container.to_owned(),
            bundle: bundle.to_owned(),
            pid: exit.map_or_else(|| self.pid().unwrap_or(0), |exit| exit.pid),
            status: status.into(),
            stdin: self.asked.stdin.clone(),
            stdout: self.asked.stdout.clone(),
            stderr: self.asked.stderr.clone(),
            terminal: self.asked.terminal,
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map(|exit| timestamp(exit.at_ns)),
            exec_id: self.id.clone(),
        }
    }
}

impl Shim {
    /// Pod.Exec: answered when the process has ended.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run_exec(
        &mut self,
        reply: Reply,
        request: pod::ExecRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let act = format!(
            "run {:?} in container {}",
            request.args.first().map_or("", |a| a),
            request.container_id
        );
        self.run_exec_inner(reply, request, fds)
            .map_err(|fault| fault.during(act))?;
        Ok(None)
    }

    fn run_exec_inner(
        &mut self,
        reply: Reply,
        request: pod::ExecRequest,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), Fault> {
        let serial = self.number();
        let id = if request.exec_id.is_empty() {
            format!("exec-{serial}")
        } else {
            request.exec_id.clone()
        };
        crate::create::check_id(&id)?;
        let key = self.check_new_exec(&request.container_id, &id)?;
        let Some(container) = self.containers.get(&key) else {
            return Ok(());
        };
        let spec::ForExec { mut process, seccomp } = spec::for_exec(&container.bundle)?;
        process.terminal = request.terminal;
        if request.terminal
            && let (Ok(width), Ok(height)) = (request.columns.try_into(), request.rows.try_into())
        {
            process.console_size = Some(ConsoleSize { height, width });
        }
        process.args = request.args;
        process.env.extend(request.env);
        if !request.cwd.is_empty() {
            process.cwd = request.cwd;
        }
        let wanted = if request.terminal {
            [true, false, false]
        } else {
            [request.stdin, request.stdout, request.stderr]
        };
        let need = wanted.iter().filter(|w| **w).count();
        if fds.len() != need {
            return Err(Fault::invalid(format_args!(
                "{} descriptors came, and it needs {need}",
                fds.len()
            )));
        }
        let terminal = if request.terminal { fds.pop() } else { None };
        let mut stdio = fds.iter().map(AsFd::as_fd);
        let stdio = wanted.map(|w| if w { stdio.next() } else { None });
        let starting = self.begin(key, &process, seccomp.as_deref(), stdio)?;
        let mut exec = Exec::new(serial, id, State::Moving, Caller::Pod(reply), Asked::default());
        if let Some(ms) = u64::try_from(request.timeout_ms).ok().filter(|ms| *ms > 0) {
            exec.deadline = Some(
                self.reactor
                    .after(Duration::from_millis(ms), Timer::Exec(key, serial)),
            );
        }
        if let Some(container) = self.containers.get_mut(&key) {
            container.execs.push(exec);
        }
        self.on_its_way(key, serial, starting, Then::Pod { terminal });
        Ok(())
    }

    /// That a container runs and has no exec of this id.
    fn check_new_exec(&self, container: &str, id: &str) -> Result<u32, Fault> {
        let key = self.find(container)?;
        let Some(c) = self.containers.get(&key) else {
            return Ok(key);
        };
        if c.execs.iter().any(|exec| exec.id == id) {
            return Err(Fault::new(
                Code::AlreadyExists,
                format_args!("exec {id} of container {container} exists"),
            ));
        }
        // Those that were killed and cannot die hold descriptors of ours too.
        let fading = self.fading.iter().filter(|(of, _)| *of == key).count();
        if c.execs.len() + fading >= MAX_EXECS {
            return Err(Fault::new(
                Code::ResourceExhausted,
                format_args!("container {container} has too many execs"),
            ));
        }
        Ok(key)
    }

    /// Task.Exec: adds a process, to be started later.
    ///
    /// # Errors
    /// When the request is wrong or there is no such container.
    pub fn add_exec(&mut self, request: task::ExecProcessRequest) -> Result<(), Fault> {
        crate::create::check_id(&request.exec_id)?;
        let key = self.check_new_exec(&request.id, &request.exec_id)?;
        let spec = request.spec.map(|any| any.value).unwrap_or_default();
        let mut process: Process = serde_json::from_slice(&spec)
            .map_err(|e| Fault::invalid(format_args!("the process of exec {}: {e}", request.exec_id)))?;
        process.terminal = request.terminal;
        let asked = Asked {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let serial = self.number();
        let exec = Exec::new(
            serial,
            request.exec_id.clone(),
            State::Added(Box::new(process)),
            Caller::Task,
            asked,
        );
        if let Some(container) = self.containers.get_mut(&key) {
            container.execs.push(exec);
        }
        let event = events::TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
        };
        self.publish(topic::EXEC_ADDED, "containerd.events.TaskExecAdded", &event);
        Ok(())
    }

    /// Task.Start of an exec: answered when it runs its program.
    ///
    /// # Errors
    /// When it was started before, or cannot be run.
    pub fn start_exec(&mut self, reply: Reply, id: &str, exec_id: &str) -> Result<Option<Vec<u8>>, Fault> {
        let key = self.find(id)?;
        let exec = self.find_exec(key, exec_id)?;
        let State::Added(process) = &exec.state else {
            return Err(Fault::precondition(format_args!(
                "exec {exec_id} of container {id} was started before"
            )));
        };
        let (process, asked, serial) = (process.clone(), exec.asked.clone(), exec.serial);
        let during = |fault: Fault| fault.during(format_args!("start exec {exec_id} of container {id}"));
        self.begin_added(key, serial, reply, process, &asked)
            .map_err(during)?;
        Ok(None)
    }

    fn begin_added(
        &mut self,
        key: u32,
        serial: u32,
        reply: Reply,
        process: Box<Process>,
        asked: &Asked,
    ) -> Result<(), Fault> {
        let Some(container) = self.containers.get(&key) else {
            return Err(ExecError::Gone.into());
        };
        let seccomp = spec::for_exec(&container.bundle)?.seccomp;
        let owner = spec::host_ids(&container.bundle, process.user.uid, process.user.gid)?;
        let stdin = Stdin::parse(&asked.stdin)?;
        let stdout = Output::parse(&asked.stdout, "stdout")?;
        let stderr = Output::parse(&asked.stderr, "stderr")?;
        let (theirs, ours) = if asked.terminal {
            (
                stdio::Theirs::default(),
                stdio::open_for_terminal(&stdin, &stdout)?,
            )
        } else {
            stdio::open(&stdin, [&stdout, &stderr], Vec::new(), owner)?
        };
        let [a, b, c] = &theirs.fds;
        let fds = [a, b, c].map(|fd| fd.as_ref().map(AsFd::as_fd));
        let starting = self.begin(key, &process, seccomp.as_deref(), fds)?;
        let then = Then::Task {
            reply,
            process,
            ours: Box::new(ours),
        };
        self.on_its_way(key, serial, starting, then);
        Ok(())
    }

    /// An exec by its container and id.
    ///
    /// # Errors
    /// `NotFound`
    pub fn find_exec(&mut self, key: u32, exec_id: &str) -> Result<&mut Exec, Fault> {
        let container = self.containers.get_mut(&key);
        let found = container.and_then(|c| c.execs.iter_mut().find(|exec| exec.id == exec_id));
        found.ok_or_else(|| Fault::not_found(format_args!("there is no exec {exec_id}")))
    }

    /// An exec by its container and number.
    pub fn exec_mut(&mut self, key: u32, serial: u32) -> Option<&mut Exec> {
        self.containers
            .get_mut(&key)?
            .execs
            .iter_mut()
            .find(|exec| exec.serial == serial)
    }

    /// Signals an exec.
    ///
    /// # Errors
    /// `NotFound` when there is none, or it has ended.
    pub fn signal_exec(&mut self, id: &str, exec_id: &str, signal: u32) -> Result<(), Fault> {
        let signal = crate::ending::check_signal(signal)?;
        let key = self.find(id)?;
        let exec = self.find_exec(key, exec_id)?;
        match &mut exec.state {
            // It is meant for the program, which gets it as soon as it runs.
            State::Starting(way) => {
                if way.signal != Some(Sent::KillAll) {
                    way.signal = Some(Sent::One(signal));
                }
            }
            State::Running(child) => {
                slipway_sys::process::send_signal(child.pidfd.as_fd(), signal)
                    .map_err(|e| Fault::failed(format_args!("kill exec {exec_id}"), &e))?;
            }
            _ => {
                return Err(Fault::not_found(format_args!(
                    "exec {exec_id} of container {id} does not run"
                )));
            }
        }
        Ok(())
    }

    /// Kills an exec with what it started.
    ///
    /// # Errors
    /// `NotFound` when there is none, or it has ended; another signal than SIGKILL.
    pub fn kill_exec_tree(&mut self, id: &str, exec_id: &str, signal: u32) -> Result<(), Fault> {
        if signal != 9 {
            return Err(Fault::invalid(format_args!(
                "signal exec {exec_id} and what it started: only SIGKILL goes to all, not {signal}"
            )));
        }
        let key = self.find(id)?;
        let exec = self.find_exec(key, exec_id)?;
        let serial = exec.serial;
        match &mut exec.state {
            // It gets it as soon as we hear that it runs: it may do so already, and have started others.
            State::Starting(way) => way.signal = Some(Sent::KillAll),
            State::Running(_) => self.kill_tree(key, serial),
            _ => {
                return Err(Fault::not_found(format_args!(
                    "exec {exec_id} of container {id} does not run"
                )));
            }
        }
        Ok(())
    }

    /// A client is gone: the pod execs it ran end.
    pub fn kill_execs_of(&mut self, conn: u32) {
        let theirs = |exec: &Exec| matches!(exec.caller, Caller::Pod(reply) if reply.conn == conn);
        for container in self.containers.values_mut() {
            for exec in container.execs.iter_mut().filter(|exec| theirs(exec)) {
                if let State::Starting(way) = &mut exec.state {
                    way.signal = Some(Sent::KillAll);
                }
            }
            let execs = container.execs.iter().filter(|exec| theirs(exec));
            // At once: there may be a thousand, and each look at the container's processes takes its time.
            let running: Vec<&Child> = execs
                .filter_map(|exec| match &exec.state {
                    State::Running(child) => Some(child),
                    _ => None,
                })
                .collect();
            if !running.is_empty() {
                container.kill_trees(&running);
            }
        }
    }

    /// Kills a running exec with what can be found of what it started.
    pub fn kill_tree(&self, key: u32, serial: u32) {
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        let exec = container.execs.iter().find(|exec| exec.serial == serial);
        let Some(State::Running(child)) = exec.map(|exec| &exec.state) else {
            return;
        };
        container.kill_trees(&[child]);
    }

    /// Task.Wait for an exec.
    ///
    /// # Errors
    /// `NotFound`
    pub fn wait_exec(&mut self, reply: Reply, key: u32, exec_id: &str) -> Result<Option<Vec<u8>>, Fault> {
        let exec = self.find_exec(key, exec_id)?;
        if let State::Stopped(exit) = exec.state {
            return Ok(Some(crate::ending::wait_response(exit)));
        }
        crate::ending::check_waiters(&exec.waiters)?;
        exec.waiters.push(reply);
        Ok(None)
    }

    /// Task.Delete of an exec.
    ///
    /// # Errors
    /// When there is none, or it runs.
    pub fn delete_exec(&mut self, id: &str, exec_id: &str) -> Result<Vec<u8>, Fault> {
        let key = self.find(id)?;
        let exec = self.find_exec(key, exec_id)?;
        let exit = match exec.state {
            State::Stopped(exit) => exit,
            State::Added(_) => Exit {
                code: 0,
                at_ns: crate::clock::now(),
                oom_killed: false,
                pid: 0,
            },
            State::Starting(_) | State::Running(_) | State::Moving => {
                return Err(Fault::precondition(format_args!(
                    "delete exec {exec_id} of container {id}: it runs"
                )));
            }
        };
        let serial = exec.serial;
        self.forget_exec(key, serial);
        Ok(crate::ending::delete_response(exit))
    }

    /// Takes an exec out of its container.
    pub fn forget_exec(&mut self, key: u32, serial: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let at = container.execs.iter().position(|exec| exec.serial == serial);
        if let Some(exec) = at.map(|at| container.execs.remove(at)) {
            self.drop_exec(key, exec);
        }
    }

    /// Lets go of an exec: whoever waits for it, for its start or its end, is told.
    pub fn drop_exec(&mut self, key: u32, mut exec: Exec) {
        for pump in &exec.pumps {
            self.run_pump(*pump);
            self.drop_pump(*pump);
        }
        if let Some(at) = exec.deadline {
            self.reactor.cancel(at, Timer::Exec(key, exec.serial));
        }
        let caller = exec.take_caller();
        let fault = Fault::not_found(format_args!("the container of exec {} is gone", exec.id));
        let (starter, ended) = match exec.state {
            State::Running(child) => {
                crate::create::kill(&child);
                (None, Err(fault.clone()))
            }
            State::Starting(way) => {
                self.off_its_way(key, exec.serial, &way);
                (self.kill_on_its_way(key, *way).starter(), Err(fault.clone()))
            }
            State::Stopped(exit) => (None, Ok(crate::ending::wait_response(exit))),
            State::Added(_) | State::Moving => {
                let never = format_args!("exec {} is gone and never ran", exec.id);
                (None, Err(Fault::not_found(never)))
            }
        };
        for reply in exec.waiters {
            self.answer(reply, ended.clone());
        }
        for reply in caller.into_iter().chain(starter) {
            self.answer(reply, Err(fault.clone()));
        }
    }

    /// An exec was reaped.
    pub fn exec_exited(&mut self, key: u32, serial: u32, pid: u32, status: Status, at_ns: i64) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let container_id = container.id.clone();
        let Some(exec) = self.exec_mut(key, serial) else {
            return;
        };
        let exit = Exit {
            code: status.exit_code(),
            at_ns,
            oom_killed: false,
            pid,
        };
        exec.state = State::Stopped(exit);
        exec.fifos = Vec::new();
        if matches!(exec.caller, Caller::Pod(_) | Caller::Answered) {
            let timed_out = exec.timed_out;
            if let Some(reply) = exec.take_caller() {
                self.answer_exec(reply, exit, timed_out);
            }
            return self.forget_exec(key, serial);
        }
        let (id, waiters) = (exec.id.clone(), std::mem::take(&mut exec.waiters));
        self.publish_exit(&container_id, &id, exit);
        for reply in waiters {
            self.answer(reply, Ok(crate::ending::wait_response(exit)));
        }
    }

    fn answer_exec(&mut self, reply: Reply, exit: Exit, timed_out: bool) {
        let response = pod::ExecResponse {
            pid: exit.pid,
            exit_code: exit.code,
            timed_out,
            exited_at_ns: exit.at_ns,
        };
        self.answer(reply, Ok(response.encode_to_vec()));
    }

    /// A pod exec has had its time.
    pub fn on_exec_timeout(&mut self, key: u32, serial: u32) {
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        let Some(exec) = container.execs.iter().find(|exec| exec.serial == serial) else {
            return;
        };
        if !matches!(exec.caller, Caller::Pod(_)) {
            return;
        }
        match &exec.state {
            State::Running(_) if !exec.timed_out => {}
            State::Running(_) | State::Starting(_) => {
                if exec.timed_out {
                    warning!("exec {} of container {} does not die", exec.id, container.id);
                }
                let exit = Exit {
                    code: 137,
                    at_ns: crate::clock::now(),
                    oom_killed: false,
                    pid: exec.pid().unwrap_or(0),
                };
                return self.give_exec_up(key, serial, exit);
            }
            _ => return,
        }
        self.kill_tree(key, serial);
        let deadline = self.reactor.after(DEATH, Timer::Exec(key, serial));
        if let Some(exec) = self.exec_mut(key, serial) {
            exec.timed_out = true;
            exec.deadline = Some(deadline);
        }
    }

    /// Answers a pod exec whose time is over without having seen its end.
    fn give_exec_up(&mut self, key: u32, serial: u32, exit: Exit) {
        self.kill_tree(key, serial);
        let reply = self.exec_mut(key, serial).and_then(Exec::take_caller);
        if let Some(exec) = self.exec_mut(key, serial)
            && let State::Starting(way) = std::mem::replace(&mut exec.state, State::Stopped(exit))
        {
            self.off_its_way(key, serial, &way);
            self.kill_on_its_way(key, *way);
        }
        if let Some(reply) = reply {
            self.answer_exec(reply, exit, true);
        }
        self.forget_exec(key, serial);
    }
}
