//! How a container ends: signals, exits, what is left of it, its removal. An exit is reported when nothing of the container
//! runs any more and everything it said is written, and not before.

use crate::conn::Reply;
use crate::create::kill;
use crate::diag::{Chain, error, info, warning};
use crate::fault::Fault;
use crate::reactor::Timer;
use crate::record::Exit;
use crate::shim::Shim;
use crate::task::{Asker, Container, Outcome, Phase};
use crate::worker;
use prost::Message;
use slipway_shim_api::names::topic;
use slipway_shim_api::status::Code;
use slipway_shim_api::{events, pod, task, timestamp};
use slipway_sys::process::Status;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long what is left in a container's cgroup may take to die.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);
/// How long output may take to end once nothing of the container runs: someone else holds its pipe.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);
/// Tries at removing a cgroup, with growing pauses: about five seconds.
const REMOVE_TRIES: u32 = 60;
/// Calls that wait for one container or exec.
const MAX_WAITERS: usize = 1024;
const SIGKILL: i32 = 9;

fn pause(tries: u32) -> Duration {
    Duration::from_millis(1 << tries.min(6)).min(Duration::from_millis(100))
}

impl Shim {
    /// A container's init was reaped.
    pub fn init_exited(&mut self, key: u32, status: Status, at_ns: i64) {
        // What init said last explains a start that failed. One that has said nothing has run its program, though the worker,
        // which has the other end of its socket too, may not have ended yet.
        self.on_report(key);
        self.started(key);
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let pid = container.phase.init().map_or(0, |init| init.pid);
        let exit = Exit {
            code: status.exit_code(),
            at_ns,
            oom_killed: false,
            pid,
        };
        if let Some(report) = container.start_report.take() {
            self.reactor.forget(report.fd());
        }
        container.ending(Outcome::Exited(exit));
        self.look_at_ending(key);
    }

    /// Goes on with an ending container as far as it goes; comes again by timer, or when a stream has ended.
    pub fn look_at_ending(&mut self, key: u32) {
        let container = self.containers.get(&key);
        if container.is_some_and(|c| matches!(&c.phase, Phase::Ending(ending) if ending.looks == 0)) {
            self.end_update_of(key);
        }
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let Phase::Ending(ending) = &mut container.phase else {
            return;
        };
        let mut wait = pause(ending.looks);
        ending.looks += 1;
        if ending.empty_since.is_none() {
            let left = if container.cgroup_made {
                container.cgroup.is_empty()
            } else {
                Ok(true)
            };
            let overdue = ending.since.elapsed() > EMPTY_DEADLINE;
            match left {
                Ok(false) if !overdue => {
                    if let Err(e) = container.cgroup.kill() {
                        warning!("kill what is left of container {}: {}", container.id, Chain(&e));
                    }
                    self.reactor.look_again(wait, Timer::Ending(key));
                    return;
                }
                Ok(false) => error!("container {} has processes that do not die", container.id),
                Err(e) => error!(
                    "look into the cgroup of container {}: {}",
                    container.id,
                    Chain(&e)
                ),
                Ok(true) => {}
            }
            ending.empty_since = Some(Instant::now());
        }
        let empty_for = ending.empty_since.map_or(Duration::ZERO, |since| since.elapsed());
        for from in [crate::log::Source::Stdout, crate::log::Source::Stderr] {
            // Reading on comes back here when the stream has ended.
            if !self.is_drained(key) {
                self.on_output(key, from);
            }
        }
        if self
            .containers
            .get(&key)
            .is_none_or(|c| !matches!(c.phase, Phase::Ending(_)))
        {
            return;
        }
        if !self.is_drained(key) && empty_for < DRAIN_DEADLINE {
            wait = wait.max(Duration::from_millis(20));
            self.reactor.look_again(wait, Timer::Ending(key));
            return;
        }
        self.ended(key);
    }

    /// Nothing of a container runs, and all it said is written.
    fn ended(&mut self, key: u32) {
        self.close_streams(key);
        self.finish_oom(key);
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        container.theirs = crate::stdio::Theirs::default();
        let oom_killed = container.oom_killed || container.cgroup_made && container.cgroup.oom_kills() > 0;
        container.oom_killed = oom_killed;
        if let Phase::Ending(ending) = &mut container.phase
            && let Outcome::Exited(exit) = &mut ending.outcome
        {
            exit.oom_killed = oom_killed;
        }
        let exit = match container.ended() {
            Err(illegal) => return warning!("{illegal}"),
            Ok(outcome @ Outcome::Failed { .. }) => {
                // Kept where it is until the cgroup is gone.
                container.ending(outcome);
                return self.remove(key);
            }
            Ok(Outcome::Exited(exit)) => exit,
        };
        let (id, started_at_ns) = (container.id.clone(), container.started_at);
        let waiters = std::mem::take(&mut container.waiters);
        let deletes = !container.deleters.is_empty();
        info!(
            "container {id} has ended, exit code {}{}",
            exit.code,
            if oom_killed { ", out of memory" } else { "" }
        );
        self.save_or_warn();
        let what = pod::Exit {
            pid: exit.pid,
            exit_code: exit.code,
            oom_killed,
            failure: String::new(),
            exited_at_ns: exit.at_ns,
            started_at_ns,
        };
        self.happened(&id, pod::event::What::Exit(what));
        self.publish_exit(&id, &id, exit);
        for reply in waiters {
            self.answer(reply, Ok(wait_response(exit)));
        }
        if deletes {
            self.remove(key);
        }
        self.look_at_stopping();
    }

    /// Task.Wait for a container.
    ///
    /// # Errors
    /// When too many wait already.
    pub fn wait(&mut self, reply: Reply, key: u32) -> Result<Option<Vec<u8>>, Fault> {
        let Some(container) = self.containers.get_mut(&key) else {
            return Ok(None);
        };
        if let Phase::Stopped(exit) = container.phase {
            return Ok(Some(wait_response(exit)));
        }
        check_waiters(&container.waiters)?;
        container.waiters.push(reply);
        Ok(None)
    }

    /// Task.Kill of a container's init, or of everything in it.
    ///
    /// # Errors
    /// When there is no such container, or nothing in it to be signalled.
    pub fn signal(&mut self, id: &str, signal: u32, all: bool) -> Result<(), Fault> {
        let (key, container) = self.find_mut(id)?;
        let signal = check_signal(signal)?;
        if signal == SIGKILL && matches!(container.phase, Phase::Creating(_)) {
            self.end_creating(key);
            return Ok(());
        }
        if all && matches!(container.phase, Phase::Ending(_)) {
            return container.cgroup.signal_all(signal).map_err(Into::into);
        }
        let init = container.init("kill")?;
        if all {
            container.cgroup.signal_all(signal)?;
        } else {
            let sent = slipway_sys::process::send_signal(init.pidfd.as_fd(), signal)
                .map_err(|e| Fault::failed(format_args!("kill container {id}"), &e))?;
            if !sent {
                return Err(Fault::not_found(format_args!(
                    "kill container {id}: its process has ended"
                )));
            }
        }
        if signal == SIGKILL && matches!(container.phase, Phase::Paused(_)) {
            // A frozen process dies when it is thawed.
            container.cgroup.thaw()?;
            container.set_paused(false)?;
        }
        Ok(())
    }

    /// Task.Delete of a container: answered when its cgroup is gone too.
    ///
    /// # Errors
    /// When there is no such container, or it runs.
    pub fn delete(&mut self, reply: Reply, id: &str) -> Result<Option<Vec<u8>>, Fault> {
        let (key, container) = self.find_mut(id)?;
        match &container.phase {
            Phase::Stopped(_) => {
                container.deleters.push(reply);
                self.remove(key);
            }
            Phase::Created(init) => {
                kill(init);
                container.deleters.push(reply);
            }
            Phase::Creating(_) => {
                container.deleters.push(reply);
                self.end_creating(key);
            }
            Phase::Ending(_) => container.deleters.push(reply),
            _ => return Err(container.illegal("delete").into()),
        }
        Ok(None)
    }

    /// Removes what an ended container leaves outside the shim, and then the container.
    pub fn remove(&mut self, key: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let wanted = match &container.phase {
            Phase::Stopped(_) => !container.deleters.is_empty(),
            Phase::Ending(ending) => matches!(ending.outcome, Outcome::Failed { .. }),
            _ => false,
        };
        if !wanted {
            container.remove_tries = 0;
            return;
        }
        if let Err(fault) = take_back(container) {
            if container.remove_tries < REMOVE_TRIES {
                let wait = pause(container.remove_tries);
                container.remove_tries += 1;
                self.reactor.after(wait, Timer::Removing(key));
                return;
            }
            return self.not_removed(key, fault);
        }
        if matches!(container.phase, Phase::Stopped(_)) {
            return self.removed(key);
        }
        match container.ended() {
            Ok(Outcome::Failed {
                asker: Asker::Start(start),
                fault,
            }) => self.keep(key, start, fault),
            Ok(Outcome::Failed {
                asker: Asker::Create(reply),
                fault,
            }) => {
                self.removed(key);
                self.answer(reply, Err(fault));
            }
            _ => {}
        }
    }

    /// Keeps a container of which nothing is left, with the reason why it could not be created, for who starts it.
    fn keep(&mut self, key: u32, start: Option<Reply>, fault: Fault) {
        const NOT_CREATED: u32 = 128;
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let exit = Exit {
            code: NOT_CREATED,
            at_ns: crate::clock::now(),
            oom_killed: container.oom_killed,
            pid: 0,
        };
        container.phase = Phase::Stopped(exit);
        container.failure = Some(fault.clone());
        container.remove_tries = 0;
        let waiters = std::mem::take(&mut container.waiters);
        let id = container.id.clone();
        self.save_or_warn();
        let what = pod::Exit {
            pid: 0,
            exit_code: exit.code,
            oom_killed: exit.oom_killed,
            failure: fault.status().message,
            exited_at_ns: exit.at_ns,
            started_at_ns: 0,
        };
        self.happened(&id, pod::event::What::Exit(what));
        for reply in waiters {
            self.answer(reply, Ok(wait_response(exit)));
        }
        if let Some(reply) = start {
            self.answer(reply, Err(fault));
        }
        self.remove(key);
        self.look_at_stopping();
    }

    fn removed(&mut self, key: u32) {
        let Some(mut container) = self.containers.remove(&key) else {
            return;
        };
        for exec in std::mem::take(&mut container.execs) {
            self.drop_exec(key, exec);
        }
        self.save_or_warn();
        let id = container.id.clone();
        match container.phase {
            Phase::Stopped(exit) => {
                info!("container {id} is gone");
                let exited_at = Some(timestamp(exit.at_ns));
                let event = events::TaskDelete {
                    container_id: id,
                    pid: exit.pid,
                    exit_status: exit.code,
                    exited_at,
                    id: String::new(),
                };
                self.publish(topic::DELETE, "containerd.events.TaskDelete", &event);
                for reply in container.deleters {
                    self.answer(reply, Ok(delete_response(exit)));
                }
            }
            // It never came to be.
            _ => {
                for reply in container.deleters.into_iter().chain(container.waiters) {
                    let gone = Fault::not_found(format_args!("there is no container {id}"));
                    self.answer(reply, Err(gone));
                }
            }
        }
        self.look_at_stopping();
    }

    /// Something does not let itself be removed: who asked is told, and may ask again.
    fn not_removed(&mut self, key: u32, fault: Fault) {
        error!("{fault}");
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        container.remove_tries = 0;
        let deleters = std::mem::take(&mut container.deleters);
        if let Phase::Ending(_) = container.phase
            && let Ok(Outcome::Failed { asker, fault: why }) = container.ended()
        {
            let both = Fault {
                code: why.code,
                message: format!("{why}; and then: {fault}"),
            };
            // It stays, as one that has ended, so that somebody can ask for its removal again.
            match asker {
                Asker::Create(reply) => {
                    container.phase = Phase::Stopped(Exit {
                        code: 255,
                        at_ns: crate::clock::now(),
                        oom_killed: false,
                        pid: 0,
                    });
                    self.answer(reply, Err(both));
                }
                Asker::Start(start) => self.keep(key, start, both),
            }
        }
        for reply in deleters {
            self.answer(reply, Err(fault.clone()));
        }
        self.look_at_stopping();
    }
}

/// Takes back, in the order opposite to that of its making, what a container left outside the shim. Idempotent.
fn take_back(container: &Container) -> Result<(), Fault> {
    let during = |fault: Fault| fault.during(format_args!("delete container {}", container.id));
    if container.cgroup_made {
        container
            .cgroup
            .remove(Duration::ZERO)
            .map_err(Fault::from)
            .map_err(during)?;
    }
    worker::forget(&container.bundle).map_err(|e| during(Fault::failed("remove the worker's record", &e)))?;
    if container.rootfs_mounted {
        let rootfs = container.bundle.join("rootfs");
        slipway_sys::mount::unmount_all(&rootfs)
            .map_err(|e| during(Fault::failed(format_args!("unmount {}", rootfs.display()), &e)))?;
    }
    Ok(())
}

/// That not too many wait for one thing.
///
/// # Errors
/// When they do.
pub fn check_waiters(waiters: &[Reply]) -> Result<(), Fault> {
    if waiters.len() < MAX_WAITERS {
        return Ok(());
    }
    Err(Fault::new(
        Code::ResourceExhausted,
        "too many calls wait for this",
    ))
}

/// A number that is a signal.
///
/// # Errors
/// When it is none.
pub fn check_signal(signal: u32) -> Result<i32, Fault> {
    i32::try_from(signal)
        .ok()
        .filter(|s| (0..=64).contains(s))
        .ok_or_else(|| Fault::invalid(format_args!("{signal} is no signal")))
}

/// The answer to Task.Wait.
pub fn wait_response(exit: Exit) -> Vec<u8> {
    let exited_at = Some(timestamp(exit.at_ns));
    task::WaitResponse {
        exit_status: exit.code,
        exited_at,
        oom_killed: exit.oom_killed,
    }
    .encode_to_vec()
}

/// The answer to Task.Delete.
pub fn delete_response(exit: Exit) -> Vec<u8> {
    task::DeleteResponse {
        pid: exit.pid,
        exit_status: exit.code,
        exited_at: Some(timestamp(exit.at_ns)),
        oom_killed: exit.oom_killed,
    }
    .encode_to_vec()
}
