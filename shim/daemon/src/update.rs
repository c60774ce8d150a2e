//! Limits of a running container, changed by a process of their own: the kernel may look for memory to take back for as long
//! as writing one takes, and systemd for its answer. Refuses to know what the limits mean; `slipway_sys::cgroup` does.

use crate::conn::Reply;
use crate::fault::Fault;
use crate::reactor::{Interest, Source, Timer};
use crate::shim::Shim;
use crate::task::Phase;
use prost::Message;
use rustix::io::Errno;
use slipway_shim_api::status::Code;
use slipway_shim_api::{task, ttrpc};
use slipway_sys::apart::{Apart, apart};
use slipway_sys::cgroup::Resources;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long the kernel may look for memory. A limit that was written is in force then, whether it is kept to or not.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than any answer has.
const MAX_ANSWER: usize = 64 * 1024;

/// Limits that are being changed.
#[derive(Debug)]
pub struct Update {
    serial: u32,
    container: u32,
    id: String,
    work: Apart,
    said: Vec<u8>,
    reply: Reply,
    until: Instant,
}

impl Shim {
    /// Task.Update: answered when the limits are written.
    ///
    /// # Errors
    /// When the container does not run, the request is wrong, or limits of it are being changed already.
    pub fn update(
        &mut self,
        reply: Reply,
        request: &task::UpdateTaskRequest,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let act = || format!("update container {}", request.id);
        let (key, container) = self.find_mut(&request.id)?;
        // Its cgroup is there from the worker's first instruction on.
        if !matches!(container.phase, Phase::Creating(_)) {
            container.init("update")?;
        }
        let json = request
            .resources
            .as_ref()
            .map(|any| any.value.as_slice())
            .unwrap_or_default();
        let resources: Resources = serde_json::from_slice(json)
            .map_err(|e| Fault::invalid(format_args!("the resources of container {}: {e}", request.id)))?;
        if self.updates.iter().any(|update| update.container == key) {
            return Err(Fault::precondition(format_args!(
                "{}: another change of its limits goes on",
                act()
            )));
        }
        let serial = self.number();
        let (_, container) = self.find_mut(&request.id)?;
        if let Some(watch) = &mut container.oom {
            watch.expect(&resources);
        }
        let cgroup = &container.cgroup;
        let work = apart(|| outcome(cgroup.apply(&resources).map_err(Fault::from)))
            .map_err(|e| Fault::failed(act(), &e))?;
        let until = self.reactor.after(PATIENCE, Timer::Update(serial));
        let watched = self
            .reactor
            .watch(&work.answer, Source::Update(serial), Interest::Read);
        self.updates.push(Update {
            serial,
            container: key,
            id: request.id.clone(),
            work,
            said: Vec::new(),
            reply,
            until,
        });
        if let Err(e) = watched {
            self.give_update_up(serial, Fault::failed("watch it", &e));
        }
        Ok(None)
    }

    /// Who changes limits has something to say.
    pub fn on_update(&mut self, serial: u32) {
        let Some(update) = self.updates.iter_mut().find(|u| u.serial == serial) else {
            return;
        };
        let mut some = [0u8; 1024];
        loop {
            match rustix::io::read(&update.work.answer, &mut some) {
                Ok(0) => break,
                Ok(n) if update.said.len() < MAX_ANSWER => update.said.extend_from_slice(&some[..n]),
                Ok(_) => {}
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        let result = understand(&update.said);
        self.end_update(serial, result);
    }

    /// Changing limits has taken as long as it may.
    pub fn on_update_timeout(&mut self, serial: u32) {
        let fault = Fault::new(
            Code::DeadlineExceeded,
            format_args!("the limits are not kept to after {PATIENCE:?}"),
        );
        self.give_update_up(serial, fault);
    }

    /// A container has ended: its limits need no more changing, and its cgroup cannot go while somebody writes to it.
    pub fn end_update_of(&mut self, key: u32) {
        if let Some(serial) = self.updates.iter().find(|u| u.container == key).map(|u| u.serial) {
            self.give_update_up(serial, Fault::precondition("the container has ended"));
        }
    }

    fn give_update_up(&mut self, serial: u32, fault: Fault) {
        if let Some(update) = self.updates.iter().find(|u| u.serial == serial) {
            // Reaped with whatever else has ended.
            crate::create::kill(&update.work.child);
        }
        self.end_update(serial, Err(fault));
    }

    fn end_update(&mut self, serial: u32, result: Result<(), Fault>) {
        let Some(at) = self.updates.iter().position(|u| u.serial == serial) else {
            return;
        };
        let update = self.updates.swap_remove(at);
        self.reactor.forget(update.work.answer.as_fd());
        self.reactor.cancel(update.until, Timer::Update(serial));
        let result = result
            .map(|()| Vec::new())
            .map_err(|fault| fault.during(format_args!("update container {}", update.id)));
        self.answer(update.reply, result);
    }
}

/// How it went, to be read by [`understand`].
fn outcome(result: Result<(), Fault>) -> Vec<u8> {
    let status = match result {
        Ok(()) => ttrpc::Status::default(),
        Err(fault) => fault.status(),
    };
    // Never empty, which is what a killed one says.
    ttrpc::Response {
        status: Some(status),
        payload: vec![1],
    }
    .encode_to_vec()
}

fn understand(said: &[u8]) -> Result<(), Fault> {
    let response = ttrpc::Response::decode(said).ok();
    match response.and_then(|r| r.status.filter(|_| r.payload == [1])) {
        Some(status) if status.code == 0 => Ok(()),
        Some(status) if status.code == Code::InvalidArgument as i32 => Err(Fault::invalid(status.message)),
        Some(status) if status.code == Code::FailedPrecondition as i32 => {
            Err(Fault::precondition(status.message))
        }
        Some(status) => Err(Fault::new(Code::Internal, status.message)),
        None => Err(Fault::new(
            Code::Internal,
            "who writes them has ended without a word",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_it_went_is_understood_and_silence_is_a_failure() {
        assert_eq!(understand(&outcome(Ok(()))), Ok(()));
        for fault in [
            Fault::invalid("no such limit"),
            Fault::precondition("not now"),
            Fault::new(Code::Internal, "failed"),
        ] {
            assert_eq!(understand(&outcome(Err(fault.clone()))), Err(fault));
        }
        for nonsense in [&b""[..], b"x", &[0xff; 40]] {
            assert_eq!(understand(nonsense).map_err(|f| f.code), Err(Code::Internal));
        }
    }
}
