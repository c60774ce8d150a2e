//! A pod in memory: what was asked for, what has become of it, its shim's connection, its turn.
//!
//! The verbs are the files beside this one. Lock order: the pod's turn, the pod's gate, a container's turn. State changes go to the disk first, then to memory, one at a time
//! ([`Pod::transition`]); reading needs no await.

pub mod dir;
pub mod list;
pub mod network;
pub mod remove;
pub mod run;
pub mod stats;
pub mod status;
pub mod stop;
pub mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use slipway_shim_client::Shim;
use tokio::sync::{
    Mutex as AsyncMutex, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch as watched,
};

use crate::config::Handler;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::ids::PodId;
use crate::op::{Busy, Held, Turn};
use crate::records::{Kind, PinnedNamespace, PodNetworkState, PodPhase, PodRecord, PodState, Records};

/// One pod sandbox.
pub struct Pod {
    record: PodRecord,
    state: watched::Sender<PodState>,
    /// Makes the order of states on disk that in memory.
    writing: AsyncMutex<()>,
    shim: Mutex<Option<Shim>>,
    turn: Turn,
    /// Held shared while something is made in the pod, alone while it is taken down.
    gate: Arc<RwLock<()>>,
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
        let _writing = self.writing.lock().await;
        let mut next = self.state();
        if !change(&mut next) {
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

    /// Waits for those inside to leave and lets nobody in.
    pub async fn close_gate(&self) -> OwnedRwLockWriteGuard<()> {
        self.gate.clone().write_owned().await
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
