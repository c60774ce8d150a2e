//! The parent's side of the child process: asks with a deadline, replaces the child that misses it or dies, and watches the
//! GPUs again in the new one.
//!
//! A process that hangs in the driver may not die even of SIGKILL: it is signalled and left behind, never waited for. How
//! soon a new one is started doubles with each failure, up to [`MAX_PAUSE`].

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::child::{Answer, Ask, Line, MAX_LINE, Request};
use crate::model::{Inventory, Probe};
use crate::nvml::GpuEvent;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Most time between two attempts.
pub const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Requests that wait for their answer.
const MAX_WAITING: usize = 64;
/// Events that wait to be taken.
const MAX_EVENTS: usize = 1024;

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// NVML said no, or cannot be loaded.
    #[error("ask NVML: {0}")]
    Nvml(String),
    /// It did not answer; its process has been replaced.
    #[error("ask NVML: no answer within {} ms; its process was replaced", .0.as_millis())]
    Hangs(Duration),
    /// Its process ended, or could not be started.
    #[error("ask NVML: its process {0}")]
    Process(String),
    /// The supervisor has ended.
    #[error("ask NVML: it is being shut down")]
    Gone,
}

/// How the child process is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments: they make it call [`crate::child::serve`].
    pub args: Vec<String>,
    /// Its environment, beside what this process has.
    pub env: Vec<(String, String)>,
    /// How long an answer may take.
    pub deadline: Duration,
}

/// A handle on the supervised child. Cheap to clone; the child ends with the last one.
#[derive(Debug, Clone)]
pub struct Supervisor {
    asks: mpsc::Sender<Asked>,
}

struct Asked {
    ask: Ask,
    answer: oneshot::Sender<Result<Answer, GpuError>>,
}

impl Supervisor {
    /// Starts supervising; the first request starts the child. The receiver hears what happens to watched GPUs.
    pub fn start(launch: Launch) -> (Supervisor, mpsc::Receiver<GpuEvent>) {
        let (asks, asked) = mpsc::channel(MAX_WAITING);
        let (events, heard) = mpsc::channel(MAX_EVENTS);
        tokio::spawn(run(launch, asked, events));
        (Supervisor { asks }, heard)
    }

    /// All that there is.
    ///
    /// # Errors
    /// NVML cannot be loaded, fails, or does not answer.
    pub async fn inventory(&self) -> Result<Inventory, GpuError> {
        match self.ask(Ask::Inventory).await? {
            Answer::Inventory(found) => Ok(found),
            other => Err(unexpected(other)),
        }
    }

    /// Whether a GPU is well.
    ///
    /// # Errors
    /// As [`Supervisor::inventory`]; what NVML says of the GPU itself is in the probe.
    pub async fn probe(&self, uuid: &str) -> Result<Probe, GpuError> {
        match self.ask(Ask::Probe(uuid.to_owned())).await? {
            Answer::Probe(probe) => Ok(probe),
            other => Err(unexpected(other)),
        }
    }

    /// Hears of a GPU from now on, over every replacement of the child, until it is told lost.
    ///
    /// # Errors
    /// As [`Supervisor::inventory`].
    pub async fn watch(&self, uuid: &str) -> Result<(), GpuError> {
        match self.ask(Ask::Watch(uuid.to_owned())).await? {
            Answer::Watching => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    async fn ask(&self, ask: Ask) -> Result<Answer, GpuError> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked { ask, answer };
        self.asks.send(asked).await.map_err(|_| GpuError::Gone)?;
        match answered.await.map_err(|_| GpuError::Gone)?? {
            Answer::Failed(said) => Err(GpuError::Nvml(said)),
            answer => Ok(answer),
        }
    }
}

fn unexpected(answer: Answer) -> GpuError {
    GpuError::Process(format!("answered something else: {answer:?}"))
}

/// A running child.
struct Running {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::Receiver<Line>,
}

impl Running {
    fn start(launch: &Launch) -> Result<Running, GpuError> {
        let failed = |e: std::io::Error| GpuError::Process(format!("cannot be started: {e}"));
        let mut child = Command::new(&launch.program)
            .args(&launch.args)
            .envs(launch.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let broken = || GpuError::Process("has no pipes".into());
        let stdin = child.stdin.take().ok_or_else(broken)?;
        let stdout = child.stdout.take().ok_or_else(broken)?;
        let (to, lines) = mpsc::channel(MAX_WAITING);
        tokio::spawn(async move {
            let mut reader = BufReader::new(stdout);
            loop {
                let mut text = Vec::new();
                let read = (&mut reader)
                    .take(MAX_LINE as u64)
                    .read_until(b'\n', &mut text)
                    .await;
                let Ok(1..) = read else { break };
                let Ok(line) = serde_json::from_slice(&text) else {
                    break;
                };
                if to.send(line).await.is_err() {
                    break;
                }
            }
        });
        Ok(Running { child, stdin, lines })
    }

    async fn send(&mut self, request: &Request) -> Result<(), GpuError> {
        let mut text = serde_json::to_vec(request).map_err(|e| GpuError::Process(e.to_string()))?;
        text.push(b'\n');
        let broken = |e: std::io::Error| GpuError::Process(format!("does not read: {e}"));
        self.stdin.write_all(&text).await.map_err(broken)
    }
}

/// What a request waits for.
struct Waiting {
    answer: oneshot::Sender<Result<Answer, GpuError>>,
    watch: Option<String>,
    /// It was watched by the last child already: nobody else waits for this answer.
    again: bool,
    until: Instant,
}

struct State {
    launch: Launch,
    running: Option<Running>,
    waiting: HashMap<u64, Waiting>,
    next: u64,
    /// What a new child is to watch.
    watched: Vec<String>,
    pause: Duration,
    not_before: Instant,
}

async fn run(launch: Launch, mut asked: mpsc::Receiver<Asked>, events: mpsc::Sender<GpuEvent>) {
    let mut state = State {
        launch,
        running: None,
        waiting: HashMap::new(),
        next: 0,
        watched: Vec::new(),
        pause: FIRST_PAUSE,
        not_before: Instant::now(),
    };
    loop {
        let until = state.waiting.values().map(|w| w.until).min();
        let again = (state.running.is_none() && !state.watched.is_empty()).then_some(state.not_before);
        tokio::select! {
            ask = asked.recv() => match ask {
                Some(ask) => state.ask(ask).await,
                None => return,
            },
            line = next_line(&mut state.running) => match line {
                Some(Line::Answer(id, answer)) => {
                    if let Some(lost) = state.answered(id, answer)
                        && events.send(lost).await.is_err()
                    {
                        return;
                    }
                }
                Some(Line::Event(event)) => {
                    if let crate::nvml::EventKind::Lost { .. } = event.kind {
                        state.watched.retain(|uuid| *uuid != event.uuid);
                    }
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
                None => state.replace(&GpuError::Process("ended".into())),
            },
            () = at(until) => {
                let limit = state.launch.deadline;
                tracing::warn!(deadline_ms = limit.as_millis() as u64, "NVML does not answer: its process is replaced");
                state.replace(&GpuError::Hangs(limit));
            }
            () = at(again) => state.restart().await,
        }
    }
}

async fn next_line(running: &mut Option<Running>) -> Option<Line> {
    match running {
        Some(running) => running.lines.recv().await,
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl State {
    async fn ask(&mut self, asked: Asked) {
        if self.running.is_none() {
            if Instant::now() < self.not_before {
                let left = self.not_before - Instant::now();
                let text = format!(
                    "failed a moment ago; the next attempt is in {} ms",
                    left.as_millis()
                );
                let _ = asked.answer.send(Err(GpuError::Process(text)));
                return;
            }
            self.restart().await;
        }
        let watch = match &asked.ask {
            Ask::Watch(uuid) => Some(uuid.clone()),
            _ => None,
        };
        let waiting = Waiting {
            answer: asked.answer,
            watch,
            again: false,
            until: Instant::now() + self.launch.deadline,
        };
        self.send(asked.ask, waiting).await;
    }

    async fn send(&mut self, ask: Ask, waiting: Waiting) {
        let id = self.next;
        self.next += 1;
        self.waiting.insert(id, waiting);
        let sent = match &mut self.running {
            Some(running) => running.send(&Request { id, ask }).await,
            None => Err(GpuError::Process("could not be started".into())),
        };
        if let Err(e) = sent {
            self.replace(&e);
        }
    }

    /// What is to be told besides: a GPU that was watched and cannot be any more.
    fn answered(&mut self, id: u64, answer: Answer) -> Option<GpuEvent> {
        let waiting = self.waiting.remove(&id)?;
        self.pause = FIRST_PAUSE;
        let mut lost = None;
        match (waiting.watch, &answer) {
            (Some(uuid), Answer::Watching) if !self.watched.contains(&uuid) => self.watched.push(uuid),
            (Some(uuid), Answer::Failed(error)) if waiting.again => {
                self.watched.retain(|w| *w != uuid);
                let kind = crate::nvml::EventKind::Lost { error: error.clone() };
                lost = Some(GpuEvent { uuid, kind });
            }
            _ => {}
        }
        let _ = waiting.answer.send(Ok(answer));
        lost
    }

    /// Ends the child and fails what waits for it. The next request, or what is watched, starts another.
    fn replace(&mut self, why: &GpuError) {
        if let Some(mut running) = self.running.take() {
            // Not waited for: it may hang in the kernel. tokio reaps it when it can.
            let _ = running.child.start_kill();
        }
        for (_, waiting) in self.waiting.drain() {
            let _ = waiting.answer.send(Err(why.clone()));
        }
        self.not_before = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    /// Starts a child and has it watch what the last one did.
    async fn restart(&mut self) {
        match Running::start(&self.launch) {
            Ok(running) => self.running = Some(running),
            Err(e) => return self.replace(&e),
        }
        for uuid in self.watched.clone() {
            let (answer, _) = oneshot::channel();
            let waiting = Waiting {
                answer,
                watch: Some(uuid.clone()),
                again: true,
                until: Instant::now() + self.launch.deadline,
            };
            self.send(Ask::Watch(uuid), waiting).await;
        }
    }
}
