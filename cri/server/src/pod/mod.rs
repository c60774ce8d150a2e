//! A pod in memory: what was asked for, what has become of it, its shim's connection, its turn.
//!
//! The verbs are the files beside this one. Lock order: the pod's turn, the pod's gate, a container's turn. State changes go to the disk first, then to memory, one at a time
//! ([`Pod::transition`]); reading needs no await.

mod addresses;
pub mod dir;
pub mod known;
pub mod list;
pub mod network;
pub mod remove;
pub mod run;
pub mod stats;
pub mod status;
pub mod stop;
pub mod upkeep;
pub mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use slipway_shim_client::Shim;
use tokio::sync::{
    Mutex as AsyncMutex, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch as watched,
};

use crate::config::Handler;
use crate::container::stats::Samples;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::ids::PodId;
use crate::op::{Busy, Held, Turn};
use crate::records::{Kind, PinnedNamespace, PodNetworkState, PodPhase, PodRecord, PodState, Records};

/// How long those inside a pod may take to leave when it is taken down; longer than a hung host path holds them up.
const GATE: Duration = Duration::from_secs(20);

/// One pod sandbox.
pub struct Pod {
    record: PodRecord,
    state: watched::Sender<PodState>,
    /// Makes the order of states on disk that in memory; true: its records are deleted, and no state comes after.
    writing: AsyncMutex<bool>,
    shim: Mutex<Option<Shim>>,
    turn: Turn,
    /// Held shared while something is made in the pod, alone while it is taken down.
    gate: Arc<RwLock<()>>,
    /// Whether what is noted of it and its containers is what its shim knows.
    pub known: known::Known,
    /// What the last statistics were, for rates.
    pub samples: Mutex<Samples>,
}

impl Pod {
    pub fn new(record: PodRecord, state: PodState) -> Pod {
        Pod {
            record,
            state: watched::Sender::new(state),
            writing: AsyncMutex::default(),
            shim: Mutex::default(),
            turn: Turn::default(),
            gate: Arc::default(),
            known: known::Known::yes(),
            samples: Mutex::default(),
        }
    }

    pub fn id(&self) -> &PodId {
        &self.record.id
    }

    pub fn record(&self) -> &PodRecord {
        &self.record
    }

    pub fn state(&self) -> PodState {
        self.state.borrow().clone()
    }

    pub fn phase(&self) -> PodPhase {
        self.state.borrow().phase.clone()
    }

    /// Nobody has been told of it yet.
    pub fn hidden(&self) -> bool {
        self.state.borrow().phase == PodPhase::Starting
    }

    /// Changes the state: disk, then memory. `change` answers whether there is anything to change.
    pub async fn transition(
        &self,
        records: &Records,
        change: impl FnOnce(&mut PodState) -> bool,
    ) -> Result<(), Error> {
        let gone = self.writing.lock().await;
        let mut next = self.state();
        if *gone || !change(&mut next) {
            return Ok(());
        }
        next.version = crate::records::version();
        let id = self.id().as_str();
        if next.phase.gives_back() {
            records.put_giving_back(Kind::PodState, id, &next).await?;
        } else {
            records.put(Kind::PodState, id, &next).await?;
        }
        self.state.send_replace(next);
        Ok(())
    }

    /// Deletes its records, for good: a change of state that comes later changes nothing.
    pub async fn forget(&self, records: &Records) -> Result<(), Error> {
        let mut gone = self.writing.lock().await;
        let id = self.id().as_str();
        records.delete_all([Kind::PodState, Kind::Pod], id).await?;
        *gone = true;
        Ok(())
    }

    /// Notes that it is being removed: whatever happens, it is never anything else again.
    pub async fn note_removing(&self, records: &Records) -> Result<(), Error> {
        self.transition(records, |state| {
            let first = state.phase != PodPhase::Removing;
            state.phase = PodPhase::Removing;
            first
        })
        .await
    }

    /// The connection to its shim, while there is one.
    pub fn shim(&self) -> Option<Shim> {
        self.shim.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// As [`Pod::shim`], for verbs that cannot do without.
    ///
    /// # Errors
    /// [`Error::State`] when the pod has none any more.
    pub fn live_shim(&self, verb: &'static str) -> Result<Shim, Error> {
        self.shim().ok_or_else(|| Error::State {
            kind: "pod",
            id: self.id().to_string(),
            state: "without a shim".to_owned(),
            verb,
        })
    }

    pub fn set_shim(&self, shim: Option<Shim>) -> Option<Shim> {
        std::mem::replace(
            &mut *self.shim.lock().unwrap_or_else(PoisonError::into_inner),
            shim,
        )
    }

    /// Forgets that shim, if it still is the pod's.
    pub fn forget_shim(&self, shim: &Shim) {
        let mut current = self.shim.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|own| own.is(shim)) {
            *current = None;
        }
    }

    /// Enters a pod that is ready, to make something in it; it cannot be taken down meanwhile.
    ///
    /// # Errors
    /// [`Error::State`] when it is not ready.
    pub async fn enter(&self, verb: &'static str) -> Result<(OwnedRwLockReadGuard<()>, Shim), Error> {
        let inside = self.gate.clone().read_owned().await;
        self.ready(verb)?;
        Ok((inside, self.live_shim(verb)?))
    }

    /// That it is ready now.
    ///
    /// # Errors
    /// [`Error::State`] when it is not.
    pub fn ready(&self, verb: &'static str) -> Result<(), Error> {
        match self.phase() {
            PodPhase::Ready => Ok(()),
            phase => Err(Error::State {
                kind: "pod",
                id: self.id().to_string(),
                state: describe(&phase).to_owned(),
                verb,
            }),
        }
    }

    /// Lets nobody in, unless somebody is inside.
    pub fn try_close_gate(&self) -> Option<OwnedRwLockWriteGuard<()>> {
        self.gate.clone().try_write_owned().ok()
    }

    /// Waits for those inside to leave and lets nobody in.
    ///
    /// # Errors
    /// [`Error::Timeout`] when somebody stays inside.
    pub async fn close_gate(&self) -> Result<OwnedRwLockWriteGuard<()>, Error> {
        let closed = tokio::time::timeout(GATE, self.gate.clone().write_owned()).await;
        closed.map_err(|_| Error::Timeout {
            kind: "a CreateContainer or StartContainer in pod",
            id: self.id().to_string(),
            what: "end, so that the pod can be taken down",
            timeout: GATE,
        })
    }

    /// The variant of the runtime it was asked to run with; the default when that is not configured any more.
    pub fn handler(&self, daemon: &Daemon) -> Handler {
        let runtime = &daemon.config.runtime;
        let name = &self.record.config.runtime_handler;
        runtime.handler(name).unwrap_or_else(|| {
            tracing::warn!(pod = %self.id(), handler = name, "the pod's runtime handler is not configured any more");
            runtime.handler("").unwrap_or_default()
        })
    }

    /// Where one of its namespaces is pinned.
    pub fn namespace(&self, daemon: &Daemon, kind: &str) -> PathBuf {
        let state = self.state.borrow();
        let pinned = state.namespaces.iter().find(|ns| ns.kind == kind);
        pinned.map_or_else(
            || {
                dir::PodDir::new(&daemon.paths.pods, self.id())
                    .path()
                    .join("ns")
                    .join(kind)
            },
            |ns| ns.path.clone(),
        )
    }

    /// Notes what the shim pinned, in memory; the next transition writes it.
    pub async fn remember_namespaces(&self, namespaces: Vec<PinnedNamespace>, init_pid: Option<u32>) {
        // Not while another change is on its way to the disk: it would replace this one.
        let _writing = self.writing.lock().await;
        self.state.send_modify(|state| {
            state.namespaces = namespaces;
            state.init_pid = init_pid;
        });
    }

    /// Notes what it holds of the network, in memory; the next transition writes it.
    pub async fn remember_network(&self, network: PodNetworkState) {
        let _writing = self.writing.lock().await;
        self.state.send_modify(|state| state.network = network);
    }

    pub fn try_begin(&self, verb: &'static str) -> Result<Held, Error> {
        self.turn.try_begin(verb).map_err(|busy| self.busy(busy))
    }

    pub async fn begin(&self, verb: &'static str) -> Result<Held, Error> {
        self.turn.begin(verb).await.map_err(|busy| self.busy(busy))
    }

    fn busy(&self, source: Busy) -> Error {
        Error::Busy {
            kind: "pod",
            id: self.id().to_string(),
            source,
        }
    }
}

/// How a phase reads in an error.
pub fn describe(phase: &PodPhase) -> &'static str {
    match phase {
        PodPhase::Starting => "still being set up",
        PodPhase::Ready => "ready",
        PodPhase::NotReady { .. } => "not ready",
        PodPhase::Stopping => "being stopped",
        PodPhase::Stopped => "stopped",
        PodPhase::Removing => "being removed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_image::{OwnerKind, Store};

    #[tokio::test]
    async fn a_state_that_comes_after_the_removal_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(Store::open(dir.path(), OwnerKind::Daemon).unwrap());
        let record = PodRecord {
            version: crate::records::version(),
            id: PodId::random().unwrap(),
            created_at_ns: 0,
            boot_id: String::new(),
            config: crate::model::PodConfig::default(),
        };
        let pod = Pod::new(record, PodState::starting());
        let id = pod.id().as_str();
        records
            .reserve(Kind::Pod, id, "a name", pod.record())
            .await
            .unwrap();
        pod.note_removing(&records).await.unwrap();
        pod.forget(&records).await.unwrap();
        let late = |state: &mut PodState| {
            state.phase = PodPhase::Stopped;
            true
        };
        pod.transition(&records, late).await.unwrap();
        assert_eq!(pod.phase(), PodPhase::Removing);
        let mut unreadable = crate::records::Unreadable::default();
        let states = records
            .list::<PodState>(Kind::PodState, &mut unreadable)
            .await
            .unwrap();
        assert!(states.is_empty(), "{states:?}");
    }
}
