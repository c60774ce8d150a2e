//! A container in memory: what was asked for, what has become of it, its turn.
//!
//! The verbs are the files beside this one. State changes go to the disk first, then to memory, one at a time
//! ([`Container::transition`]); whoever waits for an exit watches the state.

pub mod blockio;
pub mod bundle;
pub mod command;
pub mod create;
pub mod exec;
pub mod exit;
pub mod fault;
pub mod list;
pub mod logs;
pub mod mounts;
pub mod processes;
pub mod remove;
pub mod spec;
pub mod start;
pub mod stats;
pub mod status;
pub mod stop;
pub mod update;
pub mod volumes;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, watch};

use crate::container::stats::Samples;
use crate::error::Error;
use crate::ids::{ContainerId, PodId};
use crate::op::{Busy, Held, Turn};
use crate::records::{ContainerPhase, ContainerRecord, ContainerState, Exited, Kind, Made, Records};

/// One container.
pub struct Container {
    record: ContainerRecord,
    state: watch::Sender<ContainerState>,
    /// Makes the order of states on disk that in memory; true: its records are deleted, and no state comes after.
    writing: AsyncMutex<bool>,
    turn: Turn,
    /// How its init ended before CreateContainer had noted that there is one.
    early_exit: Mutex<Option<Exited>>,
    /// After its end: the shim has forgotten it and its rootfs is unmounted.
    settled: AtomicBool,
    /// What the last statistics were, for rates and for sizes that take long to count.
    pub samples: Mutex<Samples>,
}

impl Container {
    pub fn new(record: ContainerRecord, state: ContainerState) -> Container {
        Container {
            record,
            state: watch::Sender::new(state),
            writing: AsyncMutex::default(),
            turn: Turn::default(),
            early_exit: Mutex::default(),
            settled: AtomicBool::new(false),
            samples: Mutex::default(),
        }
    }

    /// One that is being created.
    pub fn creating(record: ContainerRecord) -> Container {
        let state = ContainerState {
            version: crate::records::version(),
            phase: ContainerPhase::Creating,
            made: Made::default(),
            resources: None,
            fault: None,
        };
        Container::new(record, state)
    }

    pub fn id(&self) -> &ContainerId {
        &self.record.id
    }

    pub fn pod(&self) -> &PodId {
        &self.record.pod
    }

    pub fn record(&self) -> &ContainerRecord {
        &self.record
    }

    pub fn state(&self) -> ContainerState {
        self.state.borrow().clone()
    }

    pub fn phase(&self) -> ContainerPhase {
        self.state.borrow().phase.clone()
    }

    /// Nobody has been told of it yet, or it is what is left of one that nobody was told of.
    pub fn hidden(&self) -> bool {
        matches!(
            self.state.borrow().phase,
            ContainerPhase::Creating | ContainerPhase::Removing(None)
        )
    }

    /// Changes the state: disk, then memory. `change` answers whether there is anything to change.
    pub async fn transition(
        &self,
        records: &Records,
        change: impl FnOnce(&mut ContainerState) -> bool,
    ) -> Result<(), Error> {
        self.transition_then(records, change, || ()).await
    }

    /// The same. When it has changed, `then` is called before another change can be: so what happened is told in the order
    /// in which it did.
    pub async fn transition_then(
        &self,
        records: &Records,
        change: impl FnOnce(&mut ContainerState) -> bool,
        then: impl FnOnce(),
    ) -> Result<(), Error> {
        let gone = self.writing.lock().await;
        let mut next = self.state();
        if *gone || !change(&mut next) {
            return Ok(());
        }
        next.version = crate::records::version();
        let id = self.id().as_str();
        if next.phase.gives_back() || next.fault.is_some() {
            records.put_giving_back(Kind::ContainerState, id, &next).await?;
        } else {
            records.put(Kind::ContainerState, id, &next).await?;
        }
        self.state.send_replace(next);
        then();
        Ok(())
    }

    /// Deletes its records, for good: a change of state that comes later changes nothing.
    pub async fn forget(&self, records: &Records) -> Result<(), Error> {
        let mut gone = self.writing.lock().await;
        let id = self.id().as_str();
        records
            .delete_all([Kind::ContainerState, Kind::Container], id)
            .await?;
        *gone = true;
        Ok(())
    }

    /// Keeps an end that is told while CreateContainer is not done, which takes it with its last step.
    pub fn set_early_exit(&self, exit: Exited) {
        *self.early_exit.lock().unwrap_or_else(PoisonError::into_inner) = Some(exit);
    }

    /// See [`Container::set_early_exit`].
    pub fn take_early_exit(&self) -> Option<Exited> {
        self.early_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Its end has been dealt with: see [`exit::settle`].
    pub fn settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    pub fn set_settled(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Its init runs, waits to, or is being made.
    pub fn live(&self) -> bool {
        matches!(
            self.state.borrow().phase,
            ContainerPhase::Created | ContainerPhase::Running { .. }
        )
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        let mut changes = self.state.subscribe();
        let ended = changes.wait_for(|state| {
            matches!(
                state.phase,
                ContainerPhase::Exited(_) | ContainerPhase::Removing(_)
            )
        });
        // The sender is ours: it is not gone before us.
        let _ = ended.await;
    }

    /// Waits until it has ended; false when it has not after `patience`.
    pub async fn ended_within(&self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.ended()).await.is_ok()
    }

    pub fn try_begin(&self, verb: &'static str) -> Result<Held, Error> {
        self.turn.try_begin(verb).map_err(|busy| self.busy(busy))
    }

    pub async fn begin(&self, verb: &'static str) -> Result<Held, Error> {
        self.turn.begin(verb).await.map_err(|busy| self.busy(busy))
    }

    fn busy(&self, source: Busy) -> Error {
        Error::Busy {
            kind: "container",
            id: self.id().to_string(),
            source,
        }
    }

    /// An error that says the verb makes no sense now.
    pub fn wrong_state(&self, verb: &'static str) -> Error {
        Error::State {
            kind: "container",
            id: self.id().to_string(),
            state: describe(&self.phase()).to_owned(),
            verb,
        }
    }
}

/// How a phase reads in an error.
pub fn describe(phase: &ContainerPhase) -> &'static str {
    match phase {
        ContainerPhase::Creating => "still being created",
        ContainerPhase::Created => "created and not running",
        ContainerPhase::Running { .. } => "running",
        ContainerPhase::Exited(_) => "exited",
        ContainerPhase::Removing(_) => "being removed",
    }
}

impl ContainerPhase {
    /// The phase after an exit, which may be told more than once and before the start has been noted: then the exit's own
    /// time of the start counts.
    ///
    /// `None`: the exit changes nothing.
    pub fn after_exit(&self, exit: Exited) -> Option<ContainerPhase> {
        let started = |started_at_ns| Exited {
            started_at_ns,
            ..exit.clone()
        };
        match self {
            // CreateContainer takes it with its last step: see `Container::set_early_exit`.
            ContainerPhase::Creating => None,
            ContainerPhase::Created => Some(ContainerPhase::Exited(exit)),
            ContainerPhase::Running { started_at_ns } => {
                Some(ContainerPhase::Exited(started(*started_at_ns)))
            }
            ContainerPhase::Exited(_) | ContainerPhase::Removing(Some(_)) => None,
            ContainerPhase::Removing(None) => Some(ContainerPhase::Removing(Some(exit))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> Exited {
        Exited {
            finished_at_ns: 9,
            code,
            ..Exited::default()
        }
    }

    #[test]
    fn an_exit_keeps_the_time_of_the_start() {
        let running = ContainerPhase::Running { started_at_ns: 5 };
        let Some(ContainerPhase::Exited(after)) = running.after_exit(exit(3)) else {
            panic!("no exit")
        };
        assert_eq!((after.started_at_ns, after.finished_at_ns, after.code), (5, 9, 3));
    }

    #[test]
    fn an_exit_that_comes_before_the_start_is_noted_says_when_it_began() {
        let told = Exited {
            started_at_ns: 7,
            ..exit(0)
        };
        let Some(ContainerPhase::Exited(after)) = ContainerPhase::Created.after_exit(told.clone()) else {
            panic!("no exit")
        };
        assert_eq!((after.started_at_ns, after.finished_at_ns), (7, 9));
        let running = ContainerPhase::Running { started_at_ns: 5 };
        let Some(ContainerPhase::Exited(after)) = running.after_exit(told) else {
            panic!("no exit")
        };
        assert_eq!(after.started_at_ns, 5, "what was told once stays");
    }

    #[test]
    fn an_exit_told_twice_changes_nothing() {
        let exited = ContainerPhase::Exited(exit(1));
        assert_eq!(exited.after_exit(exit(137)), None);
        assert_eq!(ContainerPhase::Removing(Some(exit(1))).after_exit(exit(2)), None);
    }

    #[test]
    fn a_container_that_is_being_created_does_not_exit() {
        assert_eq!(ContainerPhase::Creating.after_exit(exit(1)), None);
    }
}
