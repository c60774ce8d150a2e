//! The story of the daemon: wait for a driver, say what there is, and keep saying it right.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use slipway_gpu::health::{Health, Policy};
use slipway_gpu::{EventKind, Gpu, GpuEvent, Inventory, Launch, Supervisor};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::cdi::{self, Roots};
use crate::config::Config;
use crate::node;
use crate::plugin::{Plugin, Posted, keep_registered};

/// Most time between two looks for a driver that is not there.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Beside the record of health.
const KNOWN: &str = "gpus.json";

/// How the child process is started: this program again.
pub fn launch(config: &Config) -> Result<Launch> {
    let library = if config.driver.library.as_os_str().is_empty() {
        cdi::find_nvml(&config.driver.root)
            .with_context(|| format!("libnvidia-ml.so.1 is not below {}", config.driver.root.display()))?
    } else {
        config.driver.library.clone()
    };
    Ok(Launch {
        program: std::env::current_exe().context("find this program")?,
        args: vec![
            "nvml-child".into(),
            library.display().to_string(),
            config.paths.sys.display().to_string(),
        ],
        env: Vec::new(),
        deadline: config.driver.deadline(),
    })
}

/// Where the driver's files are.
pub fn roots(config: &Config) -> Roots {
    Roots {
        driver: config.driver.root.clone(),
        dev: config.driver.dev_dir(),
        proc: config.paths.proc.clone(),
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let work = async {
        let (supervisor, events) = driver(&config).await;
        Agent::new(config, supervisor)?.run(events).await
    };
    tokio::select! {
        done = work => done,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

/// Waits until there is a driver. Each new reason is logged once.
async fn driver(config: &Config) -> (Supervisor, mpsc::Receiver<GpuEvent>) {
    let mut told = String::new();
    let mut pause = Duration::from_millis(100);
    loop {
        let why = match launch(config) {
            Ok(launch) => {
                let (supervisor, events) = Supervisor::start(launch);
                match supervisor.inventory().await {
                    Ok(_) => return (supervisor, events),
                    Err(e) => e.to_string(),
                }
            }
            Err(e) => format!("{e:#}"),
        };
        if why != told {
            tracing::warn!(why, "waiting for the driver");
            told = why;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// The GPUs that were there last.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    boot_id: String,
    gpus: Vec<Gpu>,
}

impl Known {
    /// Those of another boot may have been taken out since, and a record that cannot be read is none: it is only for GPUs
    /// that do not answer.
    fn load(path: &Path, boot_id: String) -> Known {
        let read = std::fs::read(path).ok();
        let kept: Option<Known> = read.and_then(|text| serde_json::from_slice(&text).ok());
        kept.filter(|k| k.boot_id == boot_id).unwrap_or(Known {
            boot_id,
            gpus: Vec::new(),
        })
    }

    fn save(&self, path: &Path) -> std::io::Result<()> {
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(new, path)
    }
}

struct Agent {
    config: Config,
    supervisor: Supervisor,
    policy: Policy,
    inventory: Inventory,
    known: Known,
    health: Health,
    record: PathBuf,
    watched: BTreeSet<String>,
    board: watch::Sender<Arc<Posted>>,
    plugins: BTreeMap<String, JoinHandle<()>>,
    warned: BTreeSet<String>,
}

fn boot_id(proc: &Path) -> String {
    let text = std::fs::read_to_string(proc.join("sys/kernel/random/boot_id"));
    text.map(|t| t.trim().to_owned()).unwrap_or_default()
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

impl Agent {
    fn new(config: Config, supervisor: Supervisor) -> Result<Agent> {
        let state = &config.paths.state;
        std::fs::create_dir_all(state).with_context(|| format!("make {}", state.display()))?;
        let record = state.join("health.json");
        let boot = boot_id(&config.paths.proc);
        let (health, told) = Health::load(&record, &boot);
        if let Some(error) = told {
            tracing::warn!(file = %record.display(), error, "the record of sick GPUs cannot be used: all count as well");
        }
        for (uuid, sick) in health.unhealthy() {
            tracing::warn!(
                gpu = uuid,
                reason = sick.reason,
                since = sick.since,
                "still unhealthy"
            );
        }
        Ok(Agent {
            policy: Policy {
                harmless: config.health.harmless_xids.clone(),
            },
            config,
            supervisor,
            inventory: Inventory::default(),
            known: Known::load(&record.with_file_name(KNOWN), boot),
            health,
            record,
            watched: BTreeSet::new(),
            board: watch::channel(Arc::default()).0,
            plugins: BTreeMap::new(),
            warned: BTreeSet::new(),
        })
    }

    async fn run(mut self, mut events: mpsc::Receiver<GpuEvent>) -> Result<()> {
        let mut ticks = tokio::time::interval(Duration::from_secs(self.config.health.probe_seconds));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // What was heard goes before what is to be looked at.
                biased;
                event = events.recv() => match event {
                    Some(event) => self.heard(&event),
                    None => anyhow::bail!("the supervision of NVML has ended"),
                },
                _ = ticks.tick() => {
                    // None: the events have ended, which is told above.
                    let _ = self.look(&mut events).await;
                }
            }
        }
    }

    /// Something happened to a GPU.
    fn heard(&mut self, event: &GpuEvent) {
        let gpu = event.uuid.as_str();
        let changed = match &event.kind {
            EventKind::Xid {
                xid,
                instance,
                recovery,
            } => {
                let changed = self.health.xid(&self.policy, gpu, *xid, *recovery, now());
                let unhealthy = self.health.of(gpu).is_some();
                tracing::warn!(gpu, xid, ?instance, ?recovery, unhealthy, "XID");
                changed
            }
            EventKind::Lost { error } => {
                tracing::warn!(gpu, error, "the GPU can be watched no longer");
                self.watched.remove(gpu);
                self.health.lost(gpu, error, now())
            }
        };
        if changed {
            self.changed();
        }
    }

    /// The health of a GPU is another. Kubelet hears of it before the disk does: each millisecond may place a pod on it.
    fn changed(&mut self) {
        self.post();
        if let Err(e) = self.health.save(&self.record) {
            let error = &e as &dyn std::error::Error;
            tracing::error!(file = %self.record.display(), error, "the record of sick GPUs cannot be written");
        }
    }

    /// Looks at everything again. While NVML is asked, events are heard at once. A GPU is watched before it is first handed
    /// out, so that nothing that happens to it afterwards is missed.
    async fn look(&mut self, events: &mut mpsc::Receiver<GpuEvent>) -> Option<()> {
        let supervisor = self.supervisor.clone();
        let found = match self.while_hearing(events, supervisor.inventory()).await? {
            Ok(found) => found,
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(error, "the GPUs cannot be listed: what was known of them stays");
                return Some(());
            }
        };
        for gpu in &found.gpus {
            self.watch(&gpu.uuid, events).await?;
        }
        self.found(found);
        let all: Vec<String> = self.inventory.gpus.iter().map(|g| g.uuid.clone()).collect();
        for uuid in all {
            let Ok(probe) = self.while_hearing(events, supervisor.probe(&uuid)).await? else {
                return Some(());
            };
            if self.health.probed(&uuid, &probe, now()) {
                match self.health.of(&uuid) {
                    Some(sick) => tracing::warn!(gpu = uuid, reason = sick.reason, "unhealthy"),
                    None => tracing::info!(gpu = uuid, "healthy again"),
                }
                self.changed();
            }
        }
        Some(())
    }

    async fn watch(&mut self, uuid: &str, events: &mut mpsc::Receiver<GpuEvent>) -> Option<()> {
        if self.watched.contains(uuid) {
            return Some(());
        }
        let supervisor = self.supervisor.clone();
        match self.while_hearing(events, supervisor.watch(uuid)).await? {
            Ok(()) => {
                self.watched.insert(uuid.to_owned());
            }
            Err(e) if self.warned.insert(format!("{uuid} {e}")) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(
                    gpu = uuid,
                    error,
                    "the GPU's XIDs cannot be heard; it is looked at from time to time only"
                );
            }
            Err(_) => {}
        }
        Some(())
    }

    /// The answer; none when the supervision has ended.
    async fn while_hearing<T>(
        &mut self,
        events: &mut mpsc::Receiver<GpuEvent>,
        answer: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                event = events.recv() => self.heard(&event?),
                answer = &mut answer => return Some(answer),
            }
        }
    }

    /// A new inventory. A GPU that does not answer any more stays in it, over restarts of the agent too, so that kubelet
    /// hears that it is unhealthy and not that it never was.
    fn found(&mut self, mut found: Inventory) {
        let mut sick = false;
        for failed in std::mem::take(&mut found.failed) {
            let there = |uuid: &str| found.gpus.iter().any(|g| g.uuid == uuid);
            let known = self
                .known
                .gpus
                .iter()
                .find(|g| g.index == failed.index && !there(&g.uuid));
            match known.cloned() {
                Some(gpu) => {
                    if self.health.lost(&gpu.uuid, &failed.error, now()) {
                        tracing::warn!(gpu = gpu.uuid, error = failed.error, "the GPU does not answer");
                        sick = true;
                    }
                    found.gpus.push(gpu);
                }
                None if self.warned.insert(format!("{failed:?}")) => {
                    tracing::warn!(
                        index = failed.index,
                        error = failed.error,
                        "a GPU does not answer"
                    );
                }
                None => {}
            }
        }
        found.gpus.sort_by_key(|g| g.index);
        if self.inventory == found && self.board.borrow().spec.is_some() {
            if sick {
                self.changed();
            }
            return;
        }
        tracing::info!(gpus = found.gpus.len(), driver = found.driver, "the node's GPUs");
        self.known.gpus.clone_from(&found.gpus);
        self.inventory = found;
        self.changed();
        if let Err(e) = self.known.save(&self.config.paths.state.join(KNOWN)) {
            let error = &e as &dyn std::error::Error;
            tracing::error!(error, "the record of GPUs cannot be written");
        }
    }

    /// Writes the CDI file, posts what is handed out, and has a plugin for each resource.
    fn post(&mut self) {
        let spec = self.write_cdi();
        let offer = node::offer(&self.inventory, &self.health, &self.config.resources);
        for warning in offer.warnings {
            if self.warned.insert(warning.clone()) {
                tracing::warn!("{warning}");
            }
        }
        let names: Vec<String> = offer.resources.keys().cloned().collect();
        self.board.send_replace(Arc::new(Posted {
            inventory: self.inventory.clone(),
            items: offer.resources,
            spec,
        }));
        // A resource that is gone keeps its plugin, which says that there is none of it.
        for resource in names {
            let plugin = Plugin {
                resource: resource.clone(),
                folder: self.config.paths.kubelet.clone(),
                kind: self.config.cdi.kind.clone(),
                settings: self.config.resources.clone(),
                board: self.board.subscribe(),
            };
            self.plugins
                .entry(resource)
                .or_insert_with(|| tokio::spawn(keep_registered(plugin)));
        }
    }

    fn write_cdi(&mut self) -> Option<slipway_cdi::Spec> {
        let folder = &self.config.paths.cdi;
        let made = cdi::generate(&self.inventory, &roots(&self.config), &self.config.cdi.kind);
        let spec = match made {
            Ok(spec) => spec,
            Err(cdi::GenerateError::NoDevices) => {
                if let Err(e) = cdi::remove(folder) {
                    let error = &e as &dyn std::error::Error;
                    tracing::error!(folder = %folder.display(), error, "the CDI file cannot be removed");
                }
                return None;
            }
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::error!(error, "no CDI file can be made; the one before stays");
                return self.board.borrow().spec.clone();
            }
        };
        match cdi::write(&spec, folder) {
            Ok(true) => {
                tracing::info!(folder = %folder.display(), devices = spec.devices.len(), "the CDI file is written")
            }
            Ok(false) => {}
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::error!(folder = %folder.display(), error, "the CDI file cannot be written; trying again");
                // Nothing is posted as written: the next look tries again.
                return None;
            }
        }
        self.check_alone(&spec);
        Some(spec)
    }

    /// Another file of the same folder with the same devices makes both unusable: every container would fail.
    fn check_alone(&mut self, spec: &slipway_cdi::Spec) {
        let folder = &self.config.paths.cdi;
        let cache = slipway_cdi::Cache::new(vec![folder.clone()]);
        let first = spec.devices.first().map(|d| format!("{}={}", spec.kind, d.name));
        let names: Vec<String> = first.into_iter().collect();
        let absent = |_: &Path| Err(std::io::ErrorKind::NotFound.into());
        if let Err(e @ slipway_cdi::ResolveError::Conflict { .. }) = cache.resolve(&names, &absent) {
            let error = &e as &dyn std::error::Error;
            if self.warned.insert(e.to_string()) {
                tracing::error!(
                    error,
                    "no container can have a GPU: remove the other file, or set cdi.kind to another name"
                );
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.plugins.values().for_each(JoinHandle::abort);
    }
}
