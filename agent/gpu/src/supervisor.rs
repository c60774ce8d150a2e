//! The parent's side of the child process: asks one thing at a time with a deadline, replaces the child that misses it or
//! dies, and watches the GPUs again in the new one, except the one that made it hang.
//!
//! The deadline is of one question, which is about one GPU: what waits for its turn has not begun.
//!
//! A process that hangs in the driver may not die even of SIGKILL: it is signalled and left behind, and its GPU is not asked
//! again before it has ended, so that one GPU costs one such process. No more than [`MAX_LEFT`] are left behind: then
//! nothing is started until one of them has ended. How soon a new one is started doubles with each failure, up to
//! [`MAX_PAUSE`].

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::child::{Answer, Ask, Line, MAX_LINE, Request};
use crate::model::{Failed, Inventory, Look, Sample, System};
use crate::nvml::{EventKind, GpuEvent};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Most time between two attempts.
pub const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Processes that were told to end and have not.
pub const MAX_LEFT: usize = 4;
/// How long a question waits for the next attempt before it is answered that there is none.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a process may take to end when it is released.
const ENDING: Duration = Duration::from_secs(5);
/// Requests that wait for their turn.
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
    /// Its process has been given up and is still there, so no other is made to hang as it does.
    #[error("ask NVML: the process that was asked last still hangs in the driver and cannot be ended")]
    StillHangs,
    /// Too many processes hang in the kernel.
    #[error(
        "ask NVML: {0} of its processes hang in the driver and cannot be ended; no other is started before one has (a reboot ends them)"
    )]
    Stuck(usize),
    /// It has been let go of on purpose.
    #[error("ask NVML: it is released, until \"slipway-agent gpu resume\"")]
    Released,
    /// The supervisor has ended.
    #[error("ask NVML: it is being shut down")]
    Gone,
}

/// How the child process is started.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    asks: mpsc::Sender<Wanted>,
}

/// Whom an answer is for.
type Answered = oneshot::Sender<Result<Answer, GpuError>>;

enum Wanted {
    Answer(Ask, Answered),
    /// Another process.
    Renewal,
    /// None, and when it is gone, or why it is not.
    Release(oneshot::Sender<Result<(), GpuError>>),
    /// One again.
    Resume,
}

impl Supervisor {
    /// Starts supervising; the first request starts the child. The receiver hears what happens to watched GPUs.
    pub fn start(launch: Launch) -> (Supervisor, mpsc::Receiver<GpuEvent>) {
        let (asks, asked) = mpsc::channel(MAX_WAITING);
        let (events, heard) = mpsc::channel(MAX_EVENTS);
        tokio::spawn(run(launch, asked, events));
        (Supervisor { asks }, heard)
    }

    /// What the driver says of itself.
    ///
    /// # Errors
    /// NVML cannot be loaded, fails, or does not answer.
    pub async fn system(&self) -> Result<System, GpuError> {
        match self.ask(Ask::System).await? {
            Answer::System(system) => Ok(system),
            other => Err(unexpected(other)),
        }
    }

    /// What the GPU of this index is, and whether it is well.
    ///
    /// # Errors
    /// As [`Supervisor::system`]; what NVML says of the GPU itself is in the probe.
    pub async fn look(&self, index: u32) -> Result<Look, GpuError> {
        match self.ask(Ask::Look(index)).await? {
            Answer::Look(look) => Ok(*look),
            other => Err(unexpected(other)),
        }
    }

    /// What the GPU of this index and UUID does.
    ///
    /// # Errors
    /// As [`Supervisor::system`], also where NVML says no.
    pub async fn sample(&self, index: u32, uuid: &str) -> Result<Sample, GpuError> {
        match self.ask(Ask::Sample(index, uuid.to_owned())).await? {
            Answer::Sample(sample) => Ok(*sample),
            other => Err(unexpected(other)),
        }
    }

    /// Everything, once.
    ///
    /// # Errors
    /// As [`Supervisor::system`]. A GPU that fails is listed as such; one that does not answer is an error.
    pub async fn inventory(&self) -> Result<Inventory, GpuError> {
        let System { driver, cuda, count } = self.system().await?;
        let mut found = Inventory {
            driver,
            cuda,
            ..Inventory::default()
        };
        for index in 0..count {
            let look = self.look(index).await?;
            match look.gpu {
                Some(gpu) => found.gpus.push(gpu),
                None => found.failed.push(Failed {
                    index,
                    error: look.probe.error.unwrap_or_default(),
                }),
            }
        }
        Ok(found)
    }

    /// Hears of a GPU from now on, over every replacement of the child, until it is told lost.
    ///
    /// # Errors
    /// As [`Supervisor::sample`].
    pub async fn watch(&self, index: u32, uuid: &str) -> Result<(), GpuError> {
        match self.ask(Ask::Watch(index, uuid.to_owned())).await? {
            Answer::Watching => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Replaces the child, because a driver that was loaded anew, or a GPU that was reset, is there for a new process only.
    /// What happens until the new one watches is not heard.
    ///
    /// # Errors
    /// The supervisor has ended.
    pub async fn renew(&self) -> Result<(), GpuError> {
        self.asks.send(Wanted::Renewal).await.map_err(|_| GpuError::Gone)
    }

    /// Ends the child and starts no other before [`Supervisor::resume`]: whatever is asked meanwhile is answered
    /// [`GpuError::Released`], and nothing is heard. Returns when the driver has no handle of ours any more.
    ///
    /// # Errors
    /// [`GpuError::Stuck`]: processes hang in the driver and keep theirs. None is started nevertheless.
    pub async fn release(&self) -> Result<(), GpuError> {
        let (to, done) = oneshot::channel();
        let wanted = Wanted::Release(to);
        self.asks.send(wanted).await.map_err(|_| GpuError::Gone)?;
        done.await.map_err(|_| GpuError::Gone)?
    }

    /// Ends a release. What was watched is watched again.
    ///
    /// # Errors
    /// The supervisor has ended.
    pub async fn resume(&self) -> Result<(), GpuError> {
        self.asks.send(Wanted::Resume).await.map_err(|_| GpuError::Gone)
    }

    async fn ask(&self, ask: Ask) -> Result<Answer, GpuError> {
        let (answer, answered) = oneshot::channel();
        let wanted = Wanted::Answer(ask, answer);
        self.asks.send(wanted).await.map_err(|_| GpuError::Gone)?;
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

/// The question that has been asked.
struct Flight {
    id: u64,
    ask: Ask,
    /// Whom the answer is for; none: it was watched by the last child already, and nobody waits.
    answer: Option<Answered>,
    until: Instant,
}

struct State {
    launch: Launch,
    running: Option<Running>,
    flight: Option<Flight>,
    /// The next question.
    held: Option<(Ask, Answered)>,
    next: u64,
    /// What a new child is to watch.
    watched: Vec<(u32, String)>,
    /// What this one is still to be told to.
    again: VecDeque<(u32, String)>,
    /// What was found on the way.
    tell: Vec<GpuEvent>,
    /// Processes that have been told to end, and what was asked of them when they did not answer.
    left: JoinSet<Option<Option<u32>>>,
    /// The GPUs (none: the driver) whose process hangs.
    stuck: Vec<Option<u32>>,
    pause: Duration,
    not_before: Instant,
    released: bool,
}

async fn run(launch: Launch, mut wanted: mpsc::Receiver<Wanted>, events: mpsc::Sender<GpuEvent>) {
    let mut state = State {
        launch,
        running: None,
        flight: None,
        held: None,
        next: 0,
        watched: Vec::new(),
        again: VecDeque::new(),
        tell: Vec::new(),
        left: JoinSet::new(),
        stuck: Vec::new(),
        pause: FIRST_PAUSE,
        not_before: Instant::now(),
        released: false,
    };
    loop {
        state.advance().await;
        for event in state.tell.drain(..) {
            if events.send(event).await.is_err() {
                return;
            }
        }
        let idle = state.flight.is_none();
        if idle && state.held.is_some() {
            continue;
        }
        let until = state.flight.as_ref().map(|f| f.until);
        let missed = state.running.is_none() && !state.watched.is_empty() && !state.released;
        let again = missed.then_some(state.not_before);
        tokio::select! {
            next = wanted.recv(), if idle => match next {
                Some(Wanted::Answer(ask, answer)) => state.held = Some((ask, answer)),
                Some(Wanted::Renewal) => state.renew(),
                Some(Wanted::Release(to)) => {
                    let _ = to.send(state.release().await);
                }
                Some(Wanted::Resume) => {
                    state.released = false;
                    (state.pause, state.not_before) = (FIRST_PAUSE, Instant::now());
                }
                None => return,
            },
            line = next_line(&mut state.running) => match line {
                Some(Line::Answer(id, answer)) => state.answered(id, answer),
                Some(Line::Event(event)) => {
                    if let EventKind::Lost { .. } = event.kind {
                        state.watched.retain(|(_, uuid)| *uuid != event.uuid);
                    }
                    state.tell.push(event);
                }
                None => state.replace(&GpuError::Process("ended".into())),
            },
            () = at(until) => state.hangs(),
            () = at(again) => if let Err(e) = state.start() {
                tracing::warn!(error = &e as &dyn std::error::Error, "NVML cannot be asked");
            },
            Some(ended) = state.left.join_next(), if !state.left.is_empty() => {
                state.has_ended(ended.ok().flatten());
            }
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
    /// Asks the next thing, when there is one and nothing is being asked: what was watched first, so that little is missed.
    async fn advance(&mut self) {
        if self.flight.is_some() {
            return;
        }
        if self.released
            && let Some((_, answer)) = self.held.take()
        {
            let _ = answer.send(Err(GpuError::Released));
        }
        let stuck = |(ask, _): &mut (Ask, Answered)| self.stuck.contains(&ask.gpu());
        if let Some((_, answer)) = self.held.take_if(stuck) {
            let _ = answer.send(Err(GpuError::StillHangs));
        }
        if self.running.is_none() {
            let Some((ask, answer)) = self.held.take() else {
                return;
            };
            let left = self.not_before.saturating_duration_since(Instant::now());
            if left > PATIENCE {
                let text = "failed a moment ago, and is not started again yet";
                let _ = answer.send(Err(GpuError::Process(text.into())));
                return;
            }
            tokio::time::sleep(left).await;
            if let Err(e) = self.start() {
                let _ = answer.send(Err(e));
                return;
            }
            self.held = Some((ask, answer));
        }
        if let Some((index, uuid)) = self.again.pop_front() {
            self.send(Ask::Watch(index, uuid), None).await;
        } else if let Some((ask, answer)) = self.held.take() {
            self.send(ask, Some(answer)).await;
        }
    }

    async fn send(&mut self, ask: Ask, answer: Option<Answered>) {
        let id = self.next;
        self.next += 1;
        self.flight = Some(Flight {
            id,
            ask: ask.clone(),
            answer,
            until: Instant::now() + self.launch.deadline,
        });
        let sent = match &mut self.running {
            Some(running) => running.send(&Request { id, ask }).await,
            None => Err(GpuError::Process("could not be started".into())),
        };
        if let Err(e) = sent {
            self.replace(&e);
        }
    }

    fn answered(&mut self, id: u64, answer: Answer) {
        let Some(flight) = self.flight.take_if(|f| f.id == id) else {
            return;
        };
        self.pause = FIRST_PAUSE;
        if let Ask::Watch(index, uuid) = flight.ask {
            self.watched.retain(|(_, w)| *w != uuid);
            match &answer {
                Answer::Watching => self.watched.push((index, uuid)),
                Answer::Failed(error) if flight.answer.is_none() => self.lost(uuid, error.clone()),
                _ => {}
            }
        }
        if let Some(to) = flight.answer {
            let _ = to.send(Ok(answer));
        }
    }

    fn lost(&mut self, uuid: String, error: String) {
        let kind = EventKind::Lost { error };
        self.tell.push(GpuEvent { uuid, kind });
    }

    /// The question has not been answered in time. The GPU that it was about is watched no longer: the new child would hang
    /// as this one does.
    fn hangs(&mut self) {
        let why = GpuError::Hangs(self.launch.deadline);
        let gpu = self.flight.as_ref().and_then(|f| f.ask.gpu());
        tracing::warn!(
            gpu,
            deadline_ms = self.launch.deadline.as_millis() as u64,
            "NVML does not answer: its process is replaced"
        );
        let silent = |(index, _): &mut (u32, String)| Some(*index) == gpu;
        let gone: Vec<_> = self.watched.extract_if(.., silent).collect();
        for (_, uuid) in gone {
            self.lost(uuid, why.to_string());
        }
        self.stuck.push(gpu);
        self.end(Some(gpu));
        self.replace(&why);
    }

    /// Ends the child and fails what was asked. The next question, or what is watched, starts another.
    fn replace(&mut self, why: &GpuError) {
        self.end(None);
        if let Some(answer) = self.flight.take().and_then(|f| f.answer) {
            let _ = answer.send(Err(why.clone()));
        }
        self.not_before = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    fn renew(&mut self) {
        self.end(None);
        self.not_before = Instant::now();
    }

    /// Ends the child for a while; what it was asked last has been answered.
    async fn release(&mut self) -> Result<(), GpuError> {
        self.released = true;
        self.end(None);
        let until = Instant::now() + ENDING;
        while !self.left.is_empty() {
            match tokio::time::timeout_at(until, self.left.join_next()).await {
                Ok(Some(ended)) => self.has_ended(ended.ok().flatten()),
                Ok(None) => break,
                Err(_) => return Err(GpuError::Stuck(self.left.len())),
            }
        }
        Ok(())
    }

    /// A process is gone; one that hung, at last. What died by itself has to wait.
    fn has_ended(&mut self, hung: Option<Option<u32>>) {
        if let Some(gpu) = hung {
            self.stuck.retain(|s| *s != gpu);
            if self.running.is_none() {
                self.not_before = Instant::now();
            }
        }
    }

    fn end(&mut self, hung: Option<Option<u32>>) {
        self.again.clear();
        if let Some(running) = self.running.take() {
            // Its pipes end here, which it sees if it sees anything.
            let mut child = running.child;
            let _ = child.start_kill();
            self.left.spawn(async move {
                let _ = child.wait().await;
                hung
            });
        }
    }

    /// Starts a child, which is to watch what the last one did.
    fn start(&mut self) -> Result<(), GpuError> {
        let started = match self.left.len() {
            left @ MAX_LEFT.. => Err(GpuError::Stuck(left)),
            _ => Running::start(&self.launch),
        };
        match started {
            Ok(running) => {
                self.running = Some(running);
                self.again = self.watched.iter().cloned().collect();
                Ok(())
            }
            Err(e) => {
                self.replace(&e);
                Err(e)
            }
        }
    }
}
