//! How a created container comes to run its program: init is told, and tells by the end of its socket that it does, or
//! what is in the way.

use crate::conn::Reply;
use crate::create::kill;
use crate::diag::{info, warning};
use crate::fault::Fault;
use crate::reactor::Timer;
use crate::shim::Shim;
use crate::task::Phase;
use crate::worker::{self, WorkerError};
use prost::Message;
use slipway_shim_api::names::topic;
use slipway_shim_api::{events, task};
use std::time::Duration;

/// How long init may take from its start to its program's first instruction.
const START_DEADLINE: Duration = Duration::from_secs(10);

impl Shim {
    /// A worker, or an init on its way to its program, has had its time.
    pub fn on_deadline(&mut self, key: u32) {
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        match &container.phase {
            Phase::Creating(_) => self.creation_failed(
                key,
                WorkerError::Deadline {
                    after: worker::DEADLINE,
                },
            ),
            Phase::Starting(_) => self.start_failed(
                key,
                WorkerError::Deadline {
                    after: START_DEADLINE,
                },
            ),
            _ => {}
        }
    }

    /// Task.Start of a container: answered when init runs its program. Waits for a creation that was only begun.
    ///
    /// # Errors
    /// When it is not created or could not be, or its init does not listen.
    pub fn start(&mut self, reply: Reply, id: &str) -> Result<Option<Vec<u8>>, Fault> {
        let (key, container) = self.find_mut(id)?;
        if let Some(failure) = &container.failure {
            return Err(failure.clone());
        }
        if !container.start_when_created(reply) {
            self.start_created(reply, key)?;
        }
        Ok(None)
    }

    /// The same of one that is created.
    ///
    /// # Errors
    /// When it is not, or its init does not listen.
    pub fn start_created(&mut self, reply: Reply, key: u32) -> Result<(), Fault> {
        let deadline = std::time::Instant::now() + START_DEADLINE;
        let Some(container) = self.containers.get_mut(&key) else {
            return Ok(());
        };
        container.starting(reply, deadline)?;
        if let Err(e) = worker::release(&container.bundle, &container.id) {
            // It is dead or about to be: its exit follows.
            let _ = container.not_running();
            if let Some(init) = container.phase.init() {
                kill(init);
            }
            let act = format_args!("start container {}", container.id);
            return Err(Fault::failed(act, &e));
        }
        if container.start_report.is_none() {
            self.started(key);
            return Ok(());
        }
        let deadline = self.reactor.after(START_DEADLINE, Timer::Worker(key));
        if let Some(container) = self.containers.get_mut(&key)
            && let Phase::Starting(starting) = &mut container.phase
        {
            starting.deadline = deadline;
        }
        Ok(())
    }

    /// Init runs its program (or ended without telling why not; then its exit follows).
    pub fn started(&mut self, key: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        // The socket of a created container ends when its init does, too.
        let Ok((reply, deadline)) = container.running() else {
            return;
        };
        self.reactor.cancel(deadline, Timer::Worker(key));
        let pid = container.phase.init().map_or(0, |init| init.pid);
        let container_id = container.id.clone();
        info!("container {container_id} runs");
        self.publish(
            topic::START,
            "containerd.events.TaskStart",
            &events::TaskStart { container_id, pid },
        );
        self.answer(reply, Ok(task::StartResponse { pid }.encode_to_vec()));
    }

    pub fn start_failed(&mut self, key: u32, error: WorkerError) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        if let Some(report) = container.start_report.take() {
            self.reactor.forget(report.fd());
        }
        let fault = Fault::from(error).during(format_args!("start container {}", container.id));
        warning!("{fault}");
        let Ok((reply, deadline)) = container.not_running() else {
            return;
        };
        self.reactor.cancel(deadline, Timer::Worker(key));
        if let Some(init) = container.phase.init() {
            kill(init);
        }
        self.answer(reply, Err(fault));
    }
}
