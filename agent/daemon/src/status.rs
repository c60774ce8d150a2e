//! What the agent says of itself to whoever asks whether it lives and whether it is of use.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slipway_gpu::Supervisor;
use tokio::sync::Notify;

#[derive(Debug)]
enum Driver {
    /// It has not been asked yet.
    Unasked,
    /// There is none, for this reason.
    None(String),
    /// There is one, asked through this.
    There(Supervisor),
}

#[derive(Debug)]
struct State {
    driver: Driver,
    /// When the story last went on, and how long it may take until it does.
    beat: (Instant, Duration),
    /// By resource: whether kubelet has its list.
    registered: BTreeMap<String, bool>,
    /// Who talks to NVML, whether it has found a driver or not.
    handle: Option<Supervisor>,
    /// Whether NVML has been let go of.
    released: bool,
}

/// The agent's state.
#[derive(Debug)]
pub struct Status(Mutex<State>, Notify);

impl Default for Status {
    fn default() -> Status {
        let state = State {
            driver: Driver::Unasked,
            beat: (Instant::now(), Duration::from_secs(60)),
            registered: BTreeMap::new(),
            handle: None,
            released: false,
        };
        Status(Mutex::new(state), Notify::new())
    }
}

impl Status {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no driver yet, for this reason.
    pub fn waits(&self, why: &str) {
        let mut state = self.state();
        state.driver = Driver::None(why.to_owned());
        state.beat.0 = Instant::now();
    }

    /// There is a driver, asked through this.
    pub fn works(&self, supervisor: &Supervisor) {
        self.state().driver = Driver::There(supervisor.clone());
    }

    /// This is who talks to NVML, whether there is a driver or not.
    pub fn talks(&self, supervisor: &Supervisor) {
        self.state().handle = Some(supervisor.clone());
    }

    /// Who talks to NVML.
    pub fn handle(&self) -> Option<Supervisor> {
        self.state().handle.clone()
    }

    /// Whether NVML has been let go of.
    pub fn released(&self) -> bool {
        self.state().released
    }

    /// NVML has been let go of, or not; whether that is another state than before.
    pub fn set_released(&self, whether: bool) -> bool {
        std::mem::replace(&mut self.state().released, whether) != whether
    }

    /// Has the GPUs looked at soon.
    pub fn look_again(&self) {
        self.1.notify_one();
    }

    /// Until the GPUs are to be looked at.
    pub async fn asked_to_look(&self) {
        self.1.notified().await;
    }

    /// The story goes on, and will again within `limit`.
    pub fn beats(&self, limit: Duration) {
        self.state().beat = (Instant::now(), limit);
    }

    /// Whether kubelet has the list of a resource.
    pub fn registered(&self, resource: &str, whether: bool) {
        self.state().registered.insert(resource.to_owned(), whether);
    }

    /// Of which resources kubelet has the list, or not.
    #[cfg(test)]
    pub fn registrations(&self) -> Vec<(String, bool)> {
        let state = self.state();
        state
            .registered
            .iter()
            .map(|(r, has)| (r.clone(), *has))
            .collect()
    }

    /// Who may be asked about GPUs.
    pub fn supervisor(&self) -> Option<Supervisor> {
        match &self.state().driver {
            Driver::There(supervisor) => Some(supervisor.clone()),
            Driver::Unasked | Driver::None(_) => None,
        }
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

    /// Whether kubelet has the node's GPUs, in words. A node without a driver has none that it could wait for: there the
    /// agent is all that it can be, and the rollout of a DaemonSet goes on.
    ///
    /// # Errors
    /// Why kubelet has not.
    pub fn ready(&self) -> Result<String, String> {
        let state = self.state();
        match &state.driver {
            Driver::Unasked => return Err("the agent is being started".into()),
            Driver::None(why) => return Ok(format!("waiting for the driver: {why}")),
            Driver::There(_) => {}
        }
        let missing: Vec<&str> = state
            .registered
            .iter()
            .filter(|(_, there)| !**there)
            .map(|(resource, _)| resource.as_str())
            .collect();
        match missing.as_slice() {
            [] if state.registered.is_empty() => Err("the GPUs have not been looked at yet".into()),
            [] => Ok("ok".into()),
            missing => Err(format!("kubelet does not have {} yet", missing.join(", "))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_driver_it_is_ready_and_with_one_when_kubelet_has_its_gpus() {
        let status = Status::default();
        assert!(status.ready().is_err(), "it has not been looked for");
        status.waits("no library");
        assert_eq!(status.ready(), Ok("waiting for the driver: no library".into()));
        let (supervisor, _events) = Supervisor::start(slipway_gpu::Launch {
            program: "/nowhere".into(),
            args: Vec::new(),
            env: Vec::new(),
            deadline: Duration::from_secs(1),
        });
        status.works(&supervisor);
        assert!(status.ready().is_err(), "nothing is registered");
        status.registered("nvidia.com/gpu", false);
        assert_eq!(
            status.ready(),
            Err("kubelet does not have nvidia.com/gpu yet".into())
        );
        status.registered("nvidia.com/gpu", true);
        assert_eq!(status.ready(), Ok("ok".into()));
    }
}
