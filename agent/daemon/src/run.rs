//! The story of the daemon: wait for a driver, say what there is, and keep saying it right.
//!
//! `look` asks NVML, `post` says what came of it. An event of a GPU is heard whatever else is being done, and posted before
//! anything is written, logged or asked.

mod look;
mod post;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use slipway_gpu::health::{Health, Policy};
use slipway_gpu::{EventKind, GpuError, GpuEvent, Inventory, Launch, Supervisor};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::board::Posted;
use crate::cdi::{self, Roots};
use crate::config::{Config, LabelsBy};
use crate::control;
use crate::fault::{self, Faults};
use crate::gone::{self, Gone};
use crate::http::{self, Gather, Seen};
use crate::ill::{self, Ill};
use crate::incident;
use crate::kmsg::Log;
use crate::kube::{Client, Report, keep_features};
use crate::node::Without;
use crate::own;
use crate::pods::Pods;
use crate::record::{self, Folder, Kept, Known};
use crate::status::Status;

/// Most time between two looks for a driver that is not there.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// How the child process is started: this program again.
pub fn launch(config: &Config) -> Result<Launch> {
    let library = if config.driver.library.as_os_str().is_empty() {
        cdi::find_nvml(&config.driver.root)
            .with_context(|| {
                let root = config.driver.root.display();
                format!("libnvidia-ml.so.1 is not below {root}: install NVIDIA's driver on this machine, or say in the configuration file where it is (driver.root, driver.library)")
            })?
    } else {
        config.driver.library.clone()
    };
    Ok(Launch {
        program: own::ITSELF.into(),
        args: vec![
            "nvml-child".into(),
            library.display().to_string(),
            config.paths.sys.display().to_string(),
        ],
        env: Vec::new(),
        deadline: config.driver.deadline(),
    })
}

/// Where the driver's files are, and which program does the hooks: this one, unless another is configured. To be asked once,
/// since this one's file may be another's later.
pub fn roots(config: &Config) -> Roots {
    Roots {
        driver: config.driver.root.clone(),
        dev: config.driver.dev_dir(),
        proc: config.paths.proc.clone(),
        hook: match config.cdi.hook.as_os_str().is_empty() {
            true => own::path(),
            false => config.cdi.hook.clone(),
        },
        extra: config.cdi.extra.clone(),
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<()> {
    let roots = roots(&config);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let kept = kept(&config)?;
    let (records, written) = record::keep(Folder(config.paths.state.clone()), kept.clone());
    let work = async move {
        let board = watch::channel(Arc::new(last(&kept))).0;
        let sides = Sides::start(&config, &board);
        let (supervisor, events) = driver(&config, &sides.status).await;
        sides.status.works(&supervisor);
        let agent = Agent::new((config, roots), supervisor, kept, records, board, sides);
        agent.run(events).await
    };
    let done = tokio::select! {
        done = work => done,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // What was sent last is on disk when the program ends.
    written.await.context("write the records")?;
    done
}

/// What goes on beside the story, whether there is a driver or not.
struct Sides {
    status: Arc<Status>,
    xids: mpsc::Sender<incident::Xid>,
    gone: mpsc::Sender<Gone>,
    ill: mpsc::Sender<Ill>,
    refused: mpsc::Sender<String>,
    tasks: Vec<JoinHandle<()>>,
}

impl Sides {
    fn start(config: &Config, board: &watch::Sender<Arc<Posted>>) -> Sides {
        let status = Arc::<Status>::default();
        let pods = Arc::new(Pods::of(&config.paths.pod_resources, &config.paths.pods));
        let seen = Seen::default();
        let record = control::Record::of(&config.paths, boot_id(&config.paths.proc));
        status.set_released(record.left().is_some());
        let work = control::serve(control::socket(&config.paths), Arc::clone(&status), record);
        let control = tokio::spawn(work);
        let proc = config.paths.proc.clone();
        let mut tasks = vec![control];
        if let Some(listen) = config.http.listen {
            let gather = Gather::from(
                board.subscribe(),
                Arc::clone(&status),
                Arc::clone(&pods),
                seen.clone(),
                proc.clone(),
            );
            tasks.push(tokio::spawn(http::serve(listen, Arc::clone(&status), gather)));
        }
        let (note, notes) = mpsc::channel(gone::MAX_WAITING);
        let kubernetes = &config.kubernetes;
        let client = kubernetes.source().map(Client::of);
        let faults = Faults::of(
            config.faults.clone(),
            (&config.paths.state, &boot_id(&config.paths.proc)),
            board.subscribe(),
            Arc::clone(&pods),
            (client.clone(), kubernetes.node()),
            note.clone(),
        );
        let (refused, kept_from) = mpsc::channel(fault::MAX_WAITING);
        tasks.push(tokio::spawn(faults.run(2 * config.driver.deadline(), kept_from)));
        let inquiry = incident::Inquiry {
            log: Log::follow(&config.paths.kmsg),
            pods: Arc::clone(&pods),
            seen,
            proc,
        };
        let (xids, heard) = mpsc::channel(incident::MAX_WAITING);
        let (to, incidents) = mpsc::channel(incident::MAX_WAITING);
        let (gone, vanished) = mpsc::channel(gone::MAX_WAITING);
        if let Some(client) = client {
            let report = Report {
                client,
                node: kubernetes.node(),
                wanted: config.resources.clone(),
                labels: kubernetes.labels == LabelsBy::Api,
            };
            tasks.push(tokio::spawn(report.run(board.subscribe(), incidents, notes)));
        }
        if kubernetes.labels == LabelsBy::Nfd {
            let file = kubernetes.nfd_file.clone();
            let work = keep_features(file, config.resources.clone(), board.subscribe());
            tasks.push(tokio::spawn(work));
        }
        tasks.push(tokio::spawn(incident::inquire(inquiry, heard, to)));
        let (ill, fallen) = mpsc::channel(ill::MAX_WAITING);
        let work = ill::tell(Arc::clone(&pods), fallen, note.clone());
        tasks.push(tokio::spawn(work));
        tasks.push(tokio::spawn(gone::tell(pods, vanished, note)));
        Sides {
            status,
            xids,
            gone,
            ill,
            refused,
            tasks,
        }
    }
}

impl Drop for Sides {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// What was kept by the last run.
fn kept(config: &Config) -> Result<Kept> {
    let folder = Folder(config.paths.state.clone());
    std::fs::create_dir_all(&folder.0).with_context(|| format!("make {}", folder.0.display()))?;
    let boot = boot_id(&config.paths.proc);
    let (health, told) = Health::load(&folder.health(), &boot);
    if let Some(error) = told {
        tracing::warn!(file = %folder.health().display(), error, "the record of sick GPUs cannot be used: all count as well");
    }
    for (uuid, sick) in health.unhealthy() {
        tracing::warn!(
            gpu = uuid,
            reason = sick.reason,
            since = sick.since,
            "still unhealthy"
        );
    }
    let known = Known::load(&folder.known(), boot);
    Ok(Kept { health, known })
}

/// What is known before anything has been seen.
fn last(kept: &Kept) -> Posted {
    Posted {
        inventory: Inventory {
            gpus: kept.known.gpus.clone(),
            ..Inventory::default()
        },
        health: kept.health.clone(),
        ..Posted::default()
    }
}

/// Waits until there is a driver. Each reason is logged once. The supervisor stays over all attempts, since it knows which
/// processes hang and cannot be ended: a driver that hangs costs one.
async fn driver(config: &Config, status: &Status) -> (Supervisor, mpsc::Receiver<GpuEvent>) {
    let mut told = BTreeSet::new();
    let mut pause = Duration::from_millis(100);
    let mut kept: Option<(Launch, Supervisor, mpsc::Receiver<GpuEvent>)> = None;
    loop {
        let why = match launch(config) {
            Ok(launch) => {
                let (launch, supervisor, events) = match kept.take() {
                    Some(same) if same.0 == launch => same,
                    _ => {
                        let (supervisor, events) = Supervisor::start(launch.clone());
                        if status.released() {
                            // No process of its own is there that could hang.
                            let _ = supervisor.release().await;
                        }
                        (launch, supervisor, events)
                    }
                };
                status.talks(&supervisor);
                let error = match supervisor.system().await {
                    Ok(_) => return (supervisor, events),
                    Err(e) => e,
                };
                if let GpuError::Nvml(_) = error {
                    // A driver that is loaded meanwhile is there for a new process only.
                    let _ = supervisor.renew().await;
                }
                kept = Some((launch, supervisor, events));
                error.to_string()
            }
            Err(e) => format!("{e:#}"),
        };
        status.waits(&why);
        if told.insert(why.clone()) {
            tracing::warn!(why, "waiting for the driver");
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = status.asked_to_look() => {}
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Something that failed and is tried again, after a pause that doubles.
#[derive(Debug)]
struct Again {
    pause: Duration,
    at: Instant,
}

impl Again {
    const MAX: Duration = Duration::from_secs(600);

    fn first(pause: Duration) -> Again {
        let at = Instant::now() + pause;
        Again { pause, at }
    }

    /// It failed again.
    fn later(&mut self) {
        self.pause = (self.pause * 2).min(Again::MAX);
        self.at = Instant::now() + self.pause;
    }

    fn is_due(&self) -> bool {
        self.at <= Instant::now()
    }
}

/// What goes together: the GPUs, and what the CDI file has of them. A device that is said to be there before it is in the file
/// costs the container that gets it.
struct Offered {
    inventory: Inventory,
    without: Without,
    spec: Option<slipway_cdi::Spec>,
}

struct Agent {
    config: Config,
    roots: Roots,
    supervisor: Supervisor,
    policy: Policy,
    inventory: Inventory,
    known: Known,
    health: Health,
    xids: BTreeMap<(String, u64), u64>,
    records: watch::Sender<Arc<Kept>>,
    watched: BTreeSet<String>,
    /// GPUs that could be watched no longer, and when that was last so.
    lost: BTreeMap<String, Instant>,
    /// GPUs that an XID has condemned since the look at hand began: what it was told of them before says nothing.
    overtaken: BTreeSet<String>,
    /// GPUs that did not answer, by index: each is left alone for a while, so that it does not hold up the others.
    silent: BTreeMap<u32, Again>,
    /// Since some GPU fails: when a new process is tried.
    failing: Option<Again>,
    /// None: nothing has been looked at yet, and nothing is said to kubelet.
    offered: Option<Offered>,
    board: watch::Sender<Arc<Posted>>,
    sides: Sides,
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
    fn new(
        (config, roots): (Config, Roots),
        supervisor: Supervisor,
        kept: Kept,
        records: watch::Sender<Arc<Kept>>,
        board: watch::Sender<Arc<Posted>>,
        sides: Sides,
    ) -> Agent {
        let Kept { health, known } = kept;
        Agent {
            policy: config.health.policy(),
            config,
            roots,
            supervisor,
            inventory: Inventory::default(),
            known,
            health,
            xids: BTreeMap::new(),
            records,
            watched: BTreeSet::new(),
            lost: BTreeMap::new(),
            overtaken: BTreeSet::new(),
            silent: BTreeMap::new(),
            failing: None,
            offered: None,
            board,
            sides,
            plugins: BTreeMap::new(),
            warned: BTreeSet::new(),
        }
    }

    async fn run(mut self, mut events: mpsc::Receiver<GpuEvent>) -> Result<()> {
        let mut ticks = tokio::time::interval(self.config.health.probe());
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let status = Arc::clone(&self.sides.status);
        loop {
            tokio::select! {
                // What was heard goes before what is to be looked at.
                biased;
                event = events.recv() => match event {
                    Some(event) => self.heard(&event),
                    None => anyhow::bail!("the supervision of NVML has ended"),
                },
                () = status.asked_to_look() => self.turn(&mut events).await,
                _ = ticks.tick() => self.turn(&mut events).await,
            }
        }
    }

    async fn turn(&mut self, events: &mut mpsc::Receiver<GpuEvent>) {
        self.sides.status.beats(self.limit());
        // None: the events have ended, which is told by them.
        let _ = self.look(events).await;
    }

    /// How long a look may take with every GPU silent.
    fn limit(&self) -> Duration {
        let gpus = u32::try_from(self.inventory.gpus.len()).unwrap_or(64).max(8);
        2 * self.config.driver.deadline() * (gpus + 2) + 3 * self.config.health.probe()
    }

    /// Something happened to a GPU. Kubelet hears of it first: each millisecond may place a pod on it.
    fn heard(&mut self, event: &GpuEvent) {
        let gpu = event.uuid.as_str();
        match &event.kind {
            EventKind::Xid {
                xid,
                instance,
                recovery,
            } => {
                let changed = self.health.xid(&self.policy, gpu, *xid, *recovery, now());
                *self.xids.entry((gpu.to_owned(), *xid)).or_default() += 1;
                self.post();
                let condemned = self.health.of(gpu).map(|u| u.reason.clone());
                let unhealthy = condemned.is_some();
                if unhealthy {
                    self.overtaken.insert(gpu.to_owned());
                }
                tracing::warn!(gpu, xid, ?instance, ?recovery, unhealthy, "XID");
                if let Some(gpu) = self.inventory.gpus.iter().find(|g| g.uuid == gpu) {
                    // Who it was is found out beside; of a storm, of the first ones.
                    let _ = self.sides.xids.try_send(incident::Xid {
                        gpu: gpu.clone(),
                        xid: *xid,
                        instance: *instance,
                        condemned,
                    });
                }
                if changed {
                    self.keep();
                }
            }
            // Whether it is well, the next look says: that it cannot be watched is no illness of its own.
            EventKind::Lost { error } => {
                self.watched.remove(gpu);
                if self.warned.insert(format!("{gpu} {error}")) {
                    tracing::warn!(gpu, error, "the GPU's XIDs are heard no longer");
                }
                // It is to be watched again, or is ill; of one that is known to be, there is nothing more to hear in haste. Where
                // that does not last, once in the time between two looks.
                let before = self.lost.insert(gpu.to_owned(), Instant::now());
                let often = before.is_some_and(|at| at.elapsed() < self.config.health.probe());
                if !often && self.health.of(gpu).is_none() {
                    self.sides.status.look_again();
                }
            }
        }
    }

    /// The answer; none when the supervision has ended. Events are heard at once meanwhile.
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

    /// Has the records written, beside everything else.
    fn keep(&self) {
        self.records.send_replace(Arc::new(Kept {
            health: self.health.clone(),
            known: self.known.clone(),
        }));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.plugins.values().for_each(JoinHandle::abort);
    }
}
