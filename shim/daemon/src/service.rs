//! Requests by their names: decode, call, encode. What a method does is somewhere else.

use crate::conn::{Incoming, Reply};
use crate::fault::Fault;
use crate::shim::Shim;
use crate::streams::Owner;
use crate::task::Phase;
use prost::Message;
use rustix::termios::Winsize;
use slipway_shim_api::status::Code;
use slipway_shim_api::{Any, events, names, pod, process, runc_options, task, timestamp};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// The longest that a call for events may wait.
const LONGEST_POLL: Duration = Duration::from_secs(3600);

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, Fault> {
    M::decode(payload).map_err(|e| Fault::invalid(format_args!("decode the request: {e}")))
}

/// An answer at once, without content.
const EMPTY: Result<Option<Vec<u8>>, Fault> = Ok(Some(Vec::new()));

impl Shim {
    /// Answers a request, now or later.
    pub fn dispatch(&mut self, reply: Reply, incoming: Incoming) {
        let request = incoming.request;
        let result = match request.service.as_str() {
            names::TASK => self.task(reply, &request.method, &request.payload, incoming.fds),
            names::POD => self.pod(reply, &request.method, &request.payload, incoming.fds),
            _ => Err(unknown(&request.service, &request.method)),
        };
        match result {
            Ok(Some(payload)) => self.answer(reply, Ok(payload)),
            Ok(None) => {}
            Err(fault) => self.answer(reply, Err(fault)),
        }
    }

    fn task(
        &mut self,
        reply: Reply,
        method: &str,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>, Fault> {
        match method {
            "State" => self.state(&decode(payload)?).map(Some),
            "Create" => self.create(reply, decode(payload)?, fds),
            "Start" => {
                let request: task::StartRequest = decode(payload)?;
                match request.exec_id.as_str() {
                    "" => self.start(reply, &request.id),
                    exec => self.start_exec(reply, &request.id, exec),
                }
            }
            "Delete" => {
                let request: task::DeleteRequest = decode(payload)?;
                match request.exec_id.as_str() {
                    "" => self.delete(reply, &request.id),
                    exec => self.delete_exec(&request.id, exec).map(Some),
                }
            }
            "Pids" => self.pids(&decode(payload)?).map(Some),
            "Pause" => {
                let request: task::PauseRequest = decode(payload)?;
                self.set_paused(&request.id, true)
            }
            "Resume" => {
                let request: task::ResumeRequest = decode(payload)?;
                self.set_paused(&request.id, false)
            }
            "Kill" => {
                let request: task::KillRequest = decode(payload)?;
                match request.exec_id.as_str() {
                    "" => self.signal(&request.id, request.signal, request.all)?,
                    exec => self.signal_exec(&request.id, exec, request.signal)?,
                }
                EMPTY
            }
            "Exec" => self.add_exec(decode(payload)?).and(EMPTY),
            "ResizePty" => self.resize(&decode(payload)?).and(EMPTY),
            "CloseIO" => self.close_io(&decode(payload)?).and(EMPTY),
            "Update" => self.update(reply, &decode(payload)?),
            "Wait" => {
                let request: task::WaitRequest = decode(payload)?;
                let key = self.find(&request.id)?;
                match request.exec_id.as_str() {
                    "" => self.wait(reply, key),
                    exec => self.wait_exec(reply, key, exec),
                }
            }
            "Stats" => {
                let request: task::StatsRequest = decode(payload)?;
                self.task_stats(&request.id).map(Some)
            }
            "Connect" => {
                let request: task::ConnectRequest = decode(payload)?;
                let init = self
                    .find(&request.id)
                    .ok()
                    .and_then(|key| self.containers[&key].phase.init());
                let response = task::ConnectResponse {
                    shim_pid: self.pid(),
                    task_pid: init.map_or(0, |init| init.pid),
                    version: "v3".to_owned(),
                };
                Ok(Some(response.encode_to_vec()))
            }
            "Shutdown" => {
                let request: task::ShutdownRequest = decode(payload)?;
                self.shutdown(&request)
            }
            _ => Err(unknown(names::TASK, method)),
        }
    }

    fn pod(
        &mut self,
        reply: Reply,
        method: &str,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>, Fault> {
        match method {
            "CreatePod" => self.create_pod(&decode(payload)?).map(Some),
            "StopPod" => {
                self.stop_pod(reply);
                Ok(None)
            }
            "ReleasePod" => self.release_pod().map(Some),
            "Info" => Ok(Some(self.info())),
            "Exec" => self.run_exec(reply, decode(payload)?, fds),
            "KillExec" => {
                let request: pod::KillExecRequest = decode(payload)?;
                if request.all {
                    self.kill_exec_tree(&request.container_id, &request.exec_id, request.signal)?;
                } else {
                    self.signal_exec(&request.container_id, &request.exec_id, request.signal)?;
                }
                EMPTY
            }
            "ReopenLog" => {
                let request: pod::ReopenLogRequest = decode(payload)?;
                self.reopen_log(&request.container_id).and(EMPTY)
            }
            "Events" => {
                let request: pod::EventsRequest = decode(payload)?;
                let wait = Duration::from_millis(u64::try_from(request.wait_ms).unwrap_or(0));
                Ok(self.poll_events(reply, request.after, wait.min(LONGEST_POLL)))
            }
            "Stats" => self.pod_stats(&decode(payload)?).map(Some),
            "Attach" => {
                let terminal = self.attach(&decode(payload)?, fds)?;
                Ok(Some(pod::AttachResponse { terminal }.encode_to_vec()))
            }
            _ => Err(unknown(names::POD, method)),
        }
    }

    fn state(&mut self, request: &task::StateRequest) -> Result<Vec<u8>, Fault> {
        let (key, container) = self.find_mut(&request.id)?;
        let bundle = container.bundle.to_string_lossy().into_owned();
        if !request.exec_id.is_empty() {
            let exec = self.find_exec(key, &request.exec_id)?;
            return Ok(exec.describe(&request.id, &bundle).encode_to_vec());
        }
        let exit = if let Phase::Stopped(exit) = &container.phase {
            Some(exit)
        } else {
            None
        };
        let response = task::StateResponse {
            id: container.id.clone(),
            bundle,
            pid: container
                .phase
                .init()
                .map_or_else(|| exit.map_or(0, |exit| exit.pid), |init| init.pid),
            status: container.phase.task_status().into(),
            stdin: container.asked.stdin.clone(),
            stdout: container.asked.stdout.clone(),
            stderr: container.asked.stderr.clone(),
            terminal: container.asked.terminal,
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map(|exit| timestamp(exit.at_ns)),
            exec_id: String::new(),
        };
        Ok(response.encode_to_vec())
    }

    fn pids(&mut self, request: &task::PidsRequest) -> Result<Vec<u8>, Fault> {
        let (_, container) = self.find_mut(&request.id)?;
        let pids = container.cgroup.procs()?;
        let describe = |pid: u32| {
            let exec = container.execs.iter().find(|exec| exec.pid() == Some(pid));
            let info = exec.map(|exec| Any {
                type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
                value: runc_options::ProcessDetails {
                    exec_id: exec.id.clone(),
                }
                .encode_to_vec(),
            });
            process::ProcessInfo { pid, info }
        };
        Ok(task::PidsResponse {
            processes: pids.into_iter().map(describe).collect(),
        }
        .encode_to_vec())
    }

    fn set_paused(&mut self, id: &str, paused: bool) -> Result<Option<Vec<u8>>, Fault> {
        let (_, container) = self.find_mut(id)?;
        container.set_paused(paused)?;
        let done = if paused {
            container.cgroup.freeze()
        } else {
            container.cgroup.thaw()
        };
        if let Err(e) = done {
            container.set_paused(!paused)?;
            return Err(e.into());
        }
        let container_id = id.to_owned();
        if paused {
            let event = events::TaskPaused { container_id };
            self.publish(names::topic::PAUSED, "containerd.events.TaskPaused", &event);
        } else {
            let event = events::TaskResumed { container_id };
            self.publish(names::topic::RESUMED, "containerd.events.TaskResumed", &event);
        }
        EMPTY
    }

    fn resize(&mut self, request: &task::ResizePtyRequest) -> Result<(), Fault> {
        let (key, container) = self.find_mut(&request.id)?;
        let terminal = if request.exec_id.is_empty() {
            container.streams.terminal.as_ref()
        } else {
            self.find_exec(key, &request.exec_id)?.terminal.as_ref()
        };
        let terminal = terminal.ok_or_else(|| {
            Fault::precondition(format_args!(
                "resize the terminal of container {}: it has none",
                request.id
            ))
        })?;
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: size(request.height),
            ws_col: size(request.width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(terminal.as_fd(), size)
            .map_err(|e| Fault::failed("resize a terminal", &std::io::Error::from(e)))
    }

    fn close_io(&mut self, request: &task::CloseIoRequest) -> Result<(), Fault> {
        let (key, container) = self.find_mut(&request.id)?;
        if !request.stdin {
            return Ok(());
        }
        if !request.exec_id.is_empty() {
            let serial = self.find_exec(key, &request.exec_id)?.serial;
            self.finish_stdin(|owner| owner == Owner::Exec(key, serial));
        } else if !container.asked.terminal {
            container.streams.stdin = None;
            self.finish_stdin(|owner| owner == Owner::Stdin(key));
        }
        Ok(())
    }

    fn reopen_log(&mut self, id: &str) -> Result<(), Fault> {
        let (_, container) = self.find_mut(id)?;
        container.init("reopen the log of")?;
        let log = container.streams.log.as_mut().ok_or_else(|| {
            Fault::precondition(format_args!("reopen the log of container {id}: it has none"))
        })?;
        let path = log.path().display().to_string();
        log.reopen()
            .map_err(|e| Fault::failed(format_args!("reopen the log of container {id} at {path}"), &e))
    }

    fn shutdown(&mut self, request: &task::ShutdownRequest) -> Result<Option<Vec<u8>>, Fault> {
        let busy = !self.containers.is_empty() || self.pod.init.is_some();
        if busy && !request.now {
            if self.publisher.is_none() {
                return Err(Fault::precondition(format_args!(
                    "end the shim of pod {}: it has containers",
                    self.config.id
                )));
            }
            // containerd asks after each task of a group, and means the last.
            return EMPTY;
        }
        self.leave();
        EMPTY
    }
}

fn unknown(service: &str, method: &str) -> Fault {
    Fault::new(
        Code::Unimplemented,
        format_args!("{service} has no method {method} here"),
    )
}
