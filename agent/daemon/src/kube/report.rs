//! The queue towards the API server, and the file for node feature discovery.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::client::{Client, KubeError, MERGE, STRATEGIC};
use super::events::{CONDITION, Note, condition, notes, stamp};
use super::labels::{self, Labels};
use crate::board::{Board, Posted};
use crate::cause::chain;
use crate::config::Resources;
use crate::incident::Incident;

/// Events that wait for an API server; the oldest go first when there are more.
const MAX_NOTES: usize = 256;
/// The same thing is told once in that time.
const REPEAT: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// How often labels and condition are said again, should somebody have changed them.
const AGAIN: Duration = Duration::from_secs(300);

/// What is told, and to whom.
pub struct Report {
    /// The API server.
    pub client: Client,
    /// The node's name.
    pub node: String,
    /// How things are handed out.
    pub wanted: Resources,
    /// Whether the node is labelled.
    pub labels: bool,
}

/// What has to be so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Wanted {
    labels: Labels,
    /// GPUs that may not be handed out, and why.
    sick: Vec<(String, String)>,
}

/// What the API server does not take of what is said of the node, though it answers: it is tried again, and nothing else waits
/// for it.
struct Refused {
    why: String,
    pause: Duration,
    until: Instant,
}

struct Queue {
    report: Report,
    wanted: Option<Wanted>,
    said: Option<(Wanted, Instant)>,
    refused: Option<Refused>,
    /// The condition's status and since when it is so.
    since: Option<(bool, String)>,
    notes: VecDeque<(String, Note)>,
    told: BTreeMap<String, Instant>,
    next: u64,
    started: u64,
}

/// Whether the same request would be refused again: what it is about is gone, or it is not allowed.
fn is_final(error: &KubeError) -> bool {
    let refused = |c: StatusCode| c.is_client_error() && ![401, 408, 429].contains(&c.as_u16());
    error.refused().is_some_and(refused)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

impl Report {
    /// Tells for ever.
    pub async fn run(
        self,
        mut board: Board,
        mut incidents: mpsc::Receiver<Incident>,
        mut more: mpsc::Receiver<Note>,
    ) {
        let mut queue = Queue {
            report: self,
            wanted: None,
            said: None,
            refused: None,
            since: None,
            notes: VecDeque::new(),
            told: BTreeMap::new(),
            next: 0,
            started: now(),
        };
        let mut pause = FIRST_PAUSE;
        let mut warned = String::new();
        loop {
            let posted = board.borrow_and_update().clone();
            queue.learn(&posted);
            let wait = match queue.work().await {
                Ok(()) => {
                    if !std::mem::take(&mut warned).is_empty() {
                        tracing::info!("the API server answers again");
                    }
                    pause = FIRST_PAUSE;
                    let again = queue.refused.as_ref();
                    let again = again.map(|r| r.until.saturating_duration_since(Instant::now()));
                    again.unwrap_or(AGAIN)
                }
                Err(e) => {
                    let text = chain(&e);
                    if text != warned {
                        tracing::warn!(
                            error = text,
                            waiting = queue.notes.len(),
                            "Kubernetes is not told; trying again"
                        );
                        warned = text;
                    }
                    let wait = pause;
                    pause = (pause * 2).min(MAX_PAUSE);
                    wait
                }
            };
            let until = Instant::now() + wait;
            // While it is waited, things are heard and put together; a failure's pause is not cut short by them.
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    changed = board.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let posted = board.borrow_and_update().clone();
                        queue.learn(&posted);
                    }
                    incident = incidents.recv() => match incident {
                        Some(incident) => queue.happened(&incident),
                        None => return,
                    },
                    note = more.recv() => match note {
                        Some(note) => queue.keep(note),
                        None => return,
                    },
                }
                if warned.is_empty() && queue.is_behind() {
                    break;
                }
            }
        }
    }
}

impl Queue {
    /// What the node is now. GPUs that have become sick or well are told as Events of the node.
    fn learn(&mut self, posted: &Posted) {
        // Nothing is known yet.
        if posted.inventory.driver.is_empty() {
            return;
        }
        let mut sick: Vec<(String, String)> = Vec::new();
        for gpu in &posted.inventory.gpus {
            let name = format!("GPU {} ({})", gpu.index, gpu.uuid);
            let kept_back = || {
                let items = posted.items.values().flatten();
                let mut reasons = items
                    .filter(|i| i.gpu == gpu.uuid)
                    .filter_map(|i| i.unhealthy.clone());
                reasons.next()
            };
            let why = posted.health.of(&gpu.uuid).map(|u| u.reason.clone());
            if let Some(why) = why.or_else(kept_back) {
                sick.push((name, why));
            }
        }
        let before = self.wanted.take().map(|w| w.sick);
        let was = |gpu: &String| match &before {
            Some(before) => before.iter().any(|(b, _)| b == gpu),
            // What was so before the agent was started has been told.
            None => posted
                .health
                .unhealthy()
                .any(|(uuid, u)| u.since < self.started && gpu.contains(uuid)),
        };
        let note = |reason, message, warning| Note {
            about: None,
            reason,
            message,
            warning,
            at: now(),
        };
        let new = sick.iter().filter(|(gpu, _)| !was(gpu));
        let mut all: Vec<Note> = new
            .map(|(gpu, why)| {
                note(
                    "GpuUnhealthy",
                    format!("{gpu} is not handed out any more: {why}"),
                    true,
                )
            })
            .collect();
        let well = before
            .iter()
            .flatten()
            .filter(|(b, _)| sick.iter().all(|(s, _)| s != b));
        all.extend(well.map(|(gpu, _)| note("GpuHealthy", format!("{gpu} is handed out again"), false)));
        all.into_iter().for_each(|n| self.keep(n));
        self.wanted = Some(Wanted {
            labels: labels::labels(&posted.inventory, &self.report.wanted),
            sick,
        });
    }

    fn happened(&mut self, incident: &Incident) {
        notes(incident, now()).into_iter().for_each(|n| self.keep(n));
    }

    fn keep(&mut self, note: Note) {
        let key = format!("{:?}", note.key());
        self.told.retain(|_, at| at.elapsed() < REPEAT);
        // A GPU of the node's that comes and goes is told each time.
        if note.about.is_some() && self.told.insert(key, Instant::now()).is_some() {
            return;
        }
        if self.notes.len() >= MAX_NOTES {
            self.notes.pop_front();
        }
        self.next += 1;
        let of = note.about.as_ref().map_or(self.report.node.as_str(), |h| &h.pod);
        // Unique over restarts of the agent, and at most 253 characters.
        let name = format!("{of:.200}.{:x}{:04x}", note.at, self.next & 0xffff);
        self.notes.push_back((name, note));
    }

    fn is_behind(&self) -> bool {
        let node = self.said.as_ref().map(|(w, _)| w) != self.wanted.as_ref();
        !self.notes.is_empty() || node && !self.is_refused()
    }

    /// Whether the API server has refused what is said of the node a moment ago.
    fn is_refused(&self) -> bool {
        self.refused.as_ref().is_some_and(|r| Instant::now() < r.until)
    }

    fn refuse(&mut self, error: &KubeError) {
        let why = chain(error);
        let before = self.refused.take();
        if before.as_ref().is_none_or(|r| r.why != why) {
            tracing::warn!(
                error = why,
                "labels and condition of the node are not taken; trying again"
            );
        }
        let pause = before.map_or(FIRST_PAUSE, |r| (r.pause * 2).min(MAX_PAUSE));
        let until = Instant::now() + pause;
        self.refused = Some(Refused { why, pause, until });
    }

    /// Says what there is to say, until something fails.
    async fn work(&mut self) -> Result<(), KubeError> {
        if let Some(wanted) = self.wanted.clone() {
            let fresh = |(said, at): &(Wanted, Instant)| *said == wanted && at.elapsed() < AGAIN;
            if self.said.as_ref().is_some_and(fresh) {
                self.refused = None;
            } else if !self.is_refused() {
                match self.node(&wanted).await {
                    Ok(()) => {
                        self.said = Some((wanted, Instant::now()));
                        if self.refused.take().is_some() {
                            tracing::info!("labels and condition of the node are taken again");
                        }
                    }
                    // No reason to keep Events back.
                    Err(e) if is_final(&e) => self.refuse(&e),
                    Err(e) => return Err(e),
                }
            }
        }
        while let Some((name, note)) = self.notes.front().cloned() {
            match self.event(&name, &note).await {
                Ok(()) => {}
                // The pod or its namespace is gone, or this is not allowed: it never will be.
                Err(e) if is_final(&e) => {
                    // It was made, and the answer was lost.
                    if e.refused().is_none_or(|c| c.as_u16() != 409) {
                        tracing::warn!(error = chain(&e), reason = note.reason, "an Event is not told");
                    }
                }
                Err(e) => return Err(e),
            }
            self.notes.pop_front();
        }
        Ok(())
    }

    /// Labels and condition.
    async fn node(&mut self, wanted: &Wanted) -> Result<(), KubeError> {
        let path = format!("/api/v1/nodes/{}", self.report.node);
        let there = self.report.client.get(&path).await?;
        let labelled = match self.label(&path, &there, wanted).await {
            // Whoever may not label nodes may say how they are.
            Err(e) if !is_final(&e) => return Err(e),
            labelled => labelled,
        };
        let status = !wanted.sick.is_empty();
        let at = stamp(now());
        if self.since.as_ref().is_none_or(|(was, _)| *was != status) {
            let mut conditions = there["status"]["conditions"].as_array().into_iter().flatten();
            let old = conditions.find(|c| c["type"] == CONDITION);
            let same = old.filter(|c| c["status"] == if status { "True" } else { "False" });
            let since = same.and_then(|c| c["lastTransitionTime"].as_str());
            self.since = Some((status, since.map_or_else(|| at.clone(), str::to_owned)));
        }
        let since = self.since.as_ref().map_or(at.as_str(), |(_, since)| since);
        let patch = json!({ "status": { "conditions": [condition(&wanted.sick, since, &at)] } });
        let path = format!("{path}/status");
        self.report.client.patch(&path, STRATEGIC, &patch).await?;
        labelled
    }

    async fn label(&self, path: &str, there: &Value, wanted: &Wanted) -> Result<(), KubeError> {
        if !self.report.labels {
            return Ok(());
        }
        let mut patch = serde_json::Map::new();
        let old = there["metadata"]["labels"].as_object();
        for (name, value) in old.into_iter().flatten() {
            match wanted.labels.get(name) {
                Some(new) if value == new => {}
                None if labels::is_ours(name, &self.report.wanted) => {
                    drop(patch.insert(name.clone(), Value::Null))
                }
                _ => {}
            }
        }
        for (name, value) in &wanted.labels {
            if old.and_then(|o| o.get(name)).is_none_or(|v| v != value) {
                patch.insert(name.clone(), json!(value));
            }
        }
        if !patch.is_empty() {
            let patch = json!({ "metadata": { "labels": patch } });
            self.report.client.patch(path, MERGE, &patch).await?;
            tracing::info!(node = self.report.node, "the node is labelled");
        }
        Ok(())
    }

    async fn event(&self, name: &str, note: &Note) -> Result<(), KubeError> {
        let client = &self.report.client;
        let uid = match &note.about {
            Some(h) => match &h.uid {
                Some(uid) => uid.clone(),
                None => {
                    let path = format!("/api/v1/namespaces/{}/pods/{}", h.namespace, h.pod);
                    let pod = client.get(&path).await?;
                    pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned()
                }
            },
            None => String::new(),
        };
        let namespace = note.about.as_ref().map_or("default", |h| &h.namespace);
        let path = format!("/api/v1/namespaces/{namespace}/events");
        client
            .post(&path, &note.event(name, &self.report.node, &uid))
            .await?;
        Ok(())
    }
}

/// Writes the node's labels as a feature file whenever they are others, for ever.
pub async fn keep_features(path: PathBuf, wanted: Resources, mut board: Board) {
    let mut written = None;
    loop {
        let posted = board.borrow_and_update().clone();
        let labels = labels::labels(&posted.inventory, &wanted);
        let known = !posted.inventory.driver.is_empty();
        let mut again = None;
        if known && written.as_ref() != Some(&labels) {
            match write(&path, &labels::features(&labels)) {
                Ok(()) => written = Some(labels),
                Err(e) => {
                    let error = &e as &dyn std::error::Error;
                    tracing::warn!(file = %path.display(), error, "the feature file cannot be written; trying again");
                    again = Some(MAX_PAUSE);
                }
            }
        }
        let pause = async {
            match again {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = board.changed() => if changed.is_err() { return },
            () = pause => {}
        }
    }
}

/// Whole before it is seen; a name with a dot is not read.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    std::fs::create_dir_all(folder)?;
    let new = folder.join(format!(".{}.new", name.to_string_lossy()));
    let mut file = std::fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(new, path)
}
