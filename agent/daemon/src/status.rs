//! What the agent says of itself to whoever asks whether it lives and whether it is of use.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slipway_gpu::Supervisor;

#[derive(Debug)]
struct State {
    /// Why there is no driver; none: there is one.
    waiting: Option<String>,
    /// When the story last went on, and how long it may take until it does.
    beat: (Instant, Duration),
    /// By resource: whether kubelet has its list.
    registered: BTreeMap<String, bool>,
    supervisor: Option<Supervisor>,
}

/// The agent's state.
#[derive(Debug)]
pub struct Status(Mutex<State>);

impl Default for Status {
    fn default() -> Status {
        Status(Mutex::new(State {
            waiting: Some("the agent is being started".into()),
            beat: (Instant::now(), Duration::from_secs(60)),
            registered: BTreeMap::new(),
            supervisor: None,
        }))
    }
}

impl Status {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no driver yet, for this reason.
    pub fn waits(&self, why: &str) {
        let mut state = self.state();
        state.waiting = Some(why.to_owned());
        state.beat.0 = Instant::now();
    }

    /// There is a driver, asked through this.
    pub fn works(&self, supervisor: &Supervisor) {
        let mut state = self.state();
        state.waiting = None;
        state.supervisor = Some(supervisor.clone());
    }

    /// The story goes on, and will again within `limit`.
    pub fn beats(&self, limit: Duration) {
        self.state().beat = (Instant::now(), limit);
    }

    /// Whether kubelet has the list of a resource.
    pub fn registered(&self, resource: &str, whether: bool) {
        self.state().registered.insert(resource.to_owned(), whether);
    }

    /// Who may be asked about GPUs.
    pub fn supervisor(&self) -> Option<Supervisor> {
        self.state().supervisor.clone()
    }

    /// Whether the program does what it should.
    ///
    /// # Errors
    /// What it does not.
    pub fn alive(&self) -> Result<(), String> {
        let (at, limit) = self.state().beat;
        match at.elapsed() {
            past if past <= limit => Ok(()),
            past => Err(format!(
                "the GPUs have not been looked at for {} s",
                past.as_secs()
            )),
        }
    }

    /// Whether GPUs can be had.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self) -> Result<(), String> {
        let state = self.state();
        if let Some(why) = &state.waiting {
            return Err(format!("waiting for the driver: {why}"));
        }
        let missing: Vec<&str> = state
            .registered
            .iter()
            .filter(|(_, there)| !**there)
            .map(|(resource, _)| resource.as_str())
            .collect();
        match missing.as_slice() {
            [] if state.registered.is_empty() => Err("the GPUs have not been looked at yet".into()),
            [] => Ok(()),
            missing => Err(format!("kubelet does not have {} yet", missing.join(", "))),
        }
    }
}
