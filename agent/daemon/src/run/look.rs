//! Looking at everything: what NVML says now, what that makes of each GPU, and when a process that is good for nothing any
//! more is replaced.
//!
//! Each GPU is asked by itself, and one answer says what it is and whether it is well. One that does not answer is left alone
//! for a while, for its question costs the others their process.

use std::time::Duration;

use slipway_gpu::signs::Found;
use slipway_gpu::{Gpu, GpuError, GpuEvent, Inventory, Look, Probe, System};
use tokio::sync::mpsc;

use super::{Again, Agent, now};
use crate::gone::gone;
use crate::ill::Ill;

/// How often a silent GPU is left out at first, in looks.
const SILENT: u32 = 3;
/// More GPUs than any machine has.
const MAX_GPUS: u32 = 64;

/// What came of asking one GPU.
enum Seen {
    /// An answer, be it an error.
    Look(Box<Look>),
    /// None in time.
    Silent(String),
    /// It was not asked.
    Unasked,
}

impl Seen {
    fn fails(&self) -> bool {
        matches!(self, Seen::Look(look) if look.gpu.is_none())
    }
}

struct Round {
    system: System,
    gpus: Vec<Seen>,
}

impl Agent {
    /// Looks at everything again. A GPU is watched before it is first handed out, so that nothing that happens to it
    /// afterwards is missed. None: the supervision has ended.
    pub(super) async fn look(&mut self, events: &mut mpsc::Receiver<GpuEvent>) -> Option<()> {
        self.overtaken.clear();
        let mut round = self.ask_all(events).await?;
        let useless = match &round {
            Ok(round) => !round.gpus.is_empty() && round.gpus.iter().all(Seen::fails),
            Err(e) => matches!(e, GpuError::Nvml(_)),
        };
        // A driver that was loaded anew has errors only for a process that was there before.
        if useless && self.may_renew().await? {
            round = self.ask_all(events).await?;
        }
        match round {
            Ok(round) => {
                let fails = round.gpus.iter().any(Seen::fails);
                self.judge(round, events).await?;
                if !fails {
                    self.failing = None;
                } else if !useless {
                    // One that was reset is there for a new process only.
                    self.may_renew().await?;
                }
            }
            // Somebody is at work on the driver: nothing is asked, and everything stays.
            Err(GpuError::Released) => return Some(()),
            Err(e) => {
                self.unreachable(&e);
                // Nothing has been seen: that is not to say that there is nothing.
                if self.offered.is_none() && matches!(e, GpuError::Process(_)) {
                    return Some(());
                }
            }
        }
        self.refresh(events).await
    }

    /// Replaces the process, unless that was done a moment ago for the same reason.
    async fn may_renew(&mut self) -> Option<bool> {
        match &mut self.failing {
            Some(again) if !again.is_due() => return Some(false),
            Some(again) => again.later(),
            None => self.failing = Some(Again::first(self.config.health.probe())),
        }
        self.supervisor.renew().await.ok()?;
        Some(true)
    }

    async fn ask_all(&mut self, events: &mut mpsc::Receiver<GpuEvent>) -> Option<Result<Round, GpuError>> {
        let supervisor = self.supervisor.clone();
        let system = match self.while_hearing(events, supervisor.system()).await? {
            Ok(system) => system,
            Err(e) => return Some(Err(e)),
        };
        let mut gpus = Vec::new();
        for index in 0..system.count.min(MAX_GPUS) {
            if self.silent.get(&index).is_some_and(|s| !s.is_due()) {
                gpus.push(Seen::Unasked);
                continue;
            }
            let seen = match self.while_hearing(events, supervisor.look(index)).await? {
                Ok(look) => Seen::Look(Box::new(look)),
                Err(e @ (GpuError::Hangs(_) | GpuError::StillHangs)) => self.is_silent(index, &e),
                Err(GpuError::Nvml(error)) => Seen::Look(Box::new(Look {
                    gpu: None,
                    probe: failed(error),
                })),
                Err(e) => return Some(Err(e)),
            };
            gpus.push(seen);
        }
        Some(Ok(Round { system, gpus }))
    }

    fn is_silent(&mut self, index: u32, error: &GpuError) -> Seen {
        let first: Duration = self.config.health.probe() * SILENT;
        self.silent
            .entry(index)
            .and_modify(Again::later)
            .or_insert_with(|| Again::first(first));
        Seen::Silent(error.to_string())
    }

    /// The driver does not answer: so none of its GPUs does. Where only our own process fails, what was known stays.
    fn unreachable(&mut self, error: &GpuError) {
        let told = error as &dyn std::error::Error;
        if let GpuError::Process(_) = error {
            tracing::warn!(
                error = told,
                "the GPUs cannot be looked at: what was known of them stays"
            );
            return;
        }
        if self.inventory.gpus.is_empty() {
            // Those of the last run, for kubelet to hear that they are not well rather than that there are none.
            self.inventory.gpus.clone_from(&self.known.gpus);
        }
        if self.warned.insert(format!("unreachable {error}")) {
            tracing::warn!(error = told, "the driver does not answer");
        }
        for gpu in self.inventory.gpus.clone() {
            self.probed(&gpu.uuid, &failed(error.to_string()));
        }
    }

    /// What a look makes of every GPU. One that does not answer any more stays, over restarts of the agent too, so that
    /// kubelet hears that it is unhealthy and not that it never was.
    async fn judge(&mut self, round: Round, events: &mut mpsc::Receiver<GpuEvent>) -> Option<()> {
        let System { driver, cuda, .. } = round.system;
        let mut found = Inventory {
            driver,
            cuda,
            ..Inventory::default()
        };
        let (mut missing, mut unwatched) = (Vec::new(), Vec::new());
        for (index, seen) in (0..).zip(round.gpus) {
            match seen {
                Seen::Look(look) => match *look {
                    Look {
                        gpu: Some(gpu),
                        probe,
                    } => {
                        match self.watched.contains(&gpu.uuid) {
                            true => self.answers(&gpu, &probe),
                            false => unwatched.push((gpu.clone(), probe)),
                        }
                        found.gpus.push(gpu);
                    }
                    Look { gpu: None, probe } => {
                        self.silent.remove(&index);
                        missing.push((index, probe.error));
                    }
                },
                Seen::Silent(error) => missing.push((index, Some(error))),
                Seen::Unasked => missing.push((index, None)),
            }
        }
        // One that cannot be watched is not well in between, though it answers a look.
        for (gpu, probe) in unwatched {
            match self.watch(&gpu, events).await? {
                None => self.answers(&gpu, &probe),
                Some(error) => self.probed(&gpu.uuid, &failed(error)),
            }
        }
        for (index, error) in missing {
            self.stays(&mut found, index, error);
        }
        self.vanished(&mut found);
        found.gpus.sort_by_key(|g| g.index);
        if self.inventory != found {
            tracing::info!(gpus = found.gpus.len(), driver = found.driver, "the node's GPUs");
            for gone in gone(&self.known.gpus, &found.gpus) {
                let _ = self.sides.gone.try_send(gone);
            }
            self.known.gpus.clone_from(&found.gpus);
            self.inventory = found;
            self.keep();
        }
        Some(())
    }

    /// A GPU that did not answer, or was not asked (no error: its state is as it was).
    fn stays(&mut self, found: &mut Inventory, index: u32, error: Option<String>) {
        let there = |gpu: &Gpu| found.gpus.iter().any(|g| g.uuid == gpu.uuid);
        let known = self.known.gpus.iter().find(|g| g.index == index && !there(g));
        match (known.cloned(), error) {
            (Some(gpu), error) => {
                if let Some(error) = error {
                    self.probed(&gpu.uuid, &failed(error));
                }
                found.gpus.push(gpu);
            }
            (None, Some(error)) if self.warned.insert(format!("{index} {error}")) => {
                tracing::warn!(index, error, "a GPU does not answer");
            }
            _ => {}
        }
    }

    /// GPUs that NVML does not list any more, though they are in the machine: fallen off the bus, to a process that was
    /// started since.
    fn vanished(&mut self, found: &mut Inventory) {
        for gpu in self.known.gpus.clone() {
            let there = found.gpus.iter().any(|g| g.uuid == gpu.uuid || g.pci == gpu.pci);
            let device = self.config.paths.sys.join("bus/pci/devices").join(&gpu.pci);
            if !there && device.exists() {
                self.probed(&gpu.uuid, &failed("NVML lists it no longer".into()));
                found.gpus.push(gpu);
            }
        }
    }

    fn answers(&mut self, gpu: &Gpu, probe: &Probe) {
        self.silent.remove(&gpu.index);
        if !self.overtaken.contains(&gpu.uuid) {
            self.probed(&gpu.uuid, probe);
        }
    }

    fn probed(&mut self, uuid: &str, probe: &Probe) {
        let signs = self.health.signs(uuid).to_vec();
        let was = self.health.of(uuid).cloned();
        let changed = self.health.probed(&self.policy, uuid, probe, now());
        self.tell_signs(uuid, &signs);
        if !changed {
            return;
        }
        match self.health.of(uuid) {
            sick if sick == was.as_ref() => {}
            Some(sick) if was.is_some_and(|was| was.work > sick.work) => {
                tracing::info!(
                    gpu = uuid,
                    reason = sick.reason,
                    "it answers again, still unhealthy"
                );
            }
            Some(sick) => {
                tracing::warn!(gpu = uuid, reason = sick.reason, "unhealthy");
                let known = self.inventory.gpus.iter().chain(&self.known.gpus);
                if let Some(gpu) = known.into_iter().find(|g| g.uuid == uuid) {
                    let (gpu, reason) = (gpu.clone(), sick.reason.clone());
                    let _ = self.sides.ill.try_send(Ill { gpu, reason });
                }
            }
            None => tracing::info!(gpu = uuid, "healthy again"),
        }
        self.post();
        self.keep();
    }

    /// Each sign is told when it comes and when it goes.
    fn tell_signs(&self, gpu: &str, before: &[Found]) {
        let there = |list: &[Found], sign| list.iter().any(|f| f.sign == sign);
        let now = self.health.signs(gpu);
        for Found { sign, text, .. } in now.iter().filter(|f| !there(before, f.sign)) {
            tracing::warn!(gpu, %sign, "a sign of illness: {text}");
        }
        for Found { sign, .. } in before.iter().filter(|f| !there(now, f.sign)) {
            tracing::info!(gpu, %sign, "a sign of illness is gone");
        }
    }

    /// Has the GPU watched; what it did not answer to.
    async fn watch(&mut self, gpu: &Gpu, events: &mut mpsc::Receiver<GpuEvent>) -> Option<Option<String>> {
        let supervisor = self.supervisor.clone();
        let begun = self
            .while_hearing(events, supervisor.watch(gpu.index, &gpu.uuid))
            .await?;
        match begun {
            Ok(()) => {
                self.watched.insert(gpu.uuid.clone());
            }
            Err(e @ (GpuError::Hangs(_) | GpuError::StillHangs)) => {
                self.is_silent(gpu.index, &e);
                return Some(Some(e.to_string()));
            }
            Err(GpuError::Released) => {}
            Err(e) if self.warned.insert(format!("{} {e}", gpu.uuid)) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(
                    gpu = gpu.uuid,
                    error,
                    "the GPU's XIDs cannot be heard; it is looked at from time to time only"
                );
            }
            Err(_) => {}
        }
        Some(None)
    }
}

fn failed(error: String) -> Probe {
    Probe {
        error: Some(error),
        ..Probe::default()
    }
}
