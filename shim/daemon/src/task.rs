//! A container (containerd calls it a task) and the phases of its life. Knows what may follow what; who makes it happen is
//! in `create`, `ending` and `exec`.
//!
//! ```text
//!            worker's report        start              init's exec
//!  Creating ────────────────▶ Created ─────▶ Starting ────────────▶ Running ◀──▶ Paused
//!     │ failure                  │ init's end    │                     │            │
//!     ▼                          ▼               ▼                     ▼            ▼
//!  Ending(Failed) ─▶ gone     Ending(Exited): what is left is killed, the streams run dry ──▶ Stopped ──delete──▶ gone
//! ```
//! Where Create was answered when the worker began, somebody else is to hear of its failure: then `Ending(Failed)` goes on
//! to `Stopped` too, once everything is taken back.

use crate::conn::Reply;
use crate::diag::{Chain, warning};
use crate::exec::Exec;
use crate::fault::Fault;
use crate::log::{LogFile, Splitter};
use crate::record::Exit;
use crate::stdio::Theirs;
use crate::worker::Report;
use slipway_shim_api::{pod, process, types};
use slipway_sys::cgroup::{Cgroup, CgroupPath, OomWatch, Resources};
use slipway_sys::process::Child;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

/// An act that a container's phase does not allow.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{act} container {id}: it is {phase}")]
pub struct Illegal {
    /// What was attempted.
    pub act: &'static str,
    /// On which container.
    pub id: String,
    /// What it is.
    pub phase: &'static str,
}

/// A container being made.
#[derive(Debug)]
pub struct Creating {
    /// The worker.
    pub worker: Child,
    /// What it says.
    pub report: Report,
    /// When its time is over.
    pub deadline: Instant,
    /// Who hears how it ends.
    pub asker: Asker,
}

/// Who hears how a creation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Task.Create, which is not answered yet. A failure leaves nothing.
    Create(Reply),
    /// Task.Start, when it has come. A failure is kept for it.
    Start(Option<Reply>),
}

impl Asker {
    /// Has a Task.Start wait; whether it may.
    fn wait(&mut self, reply: Reply) -> bool {
        let may = *self == Asker::Start(None);
        if may {
            *self = Asker::Start(Some(reply));
        }
        may
    }

    /// Whoever waits on that connection does not any more.
    fn forget(&mut self, conn: u32) {
        if matches!(self, Asker::Start(Some(reply)) if reply.conn == conn) {
            *self = Asker::Start(None);
        }
    }
}

/// A container whose init was told to run its program.
#[derive(Debug)]
pub struct Starting {
    /// Its init.
    pub init: Child,
    /// When its time is over.
    pub deadline: Instant,
    /// Who asked.
    pub reply: Reply,
}

/// How a life ends.
#[derive(Debug)]
pub enum Outcome {
    /// Init has exited.
    Exited(Exit),
    /// It was never made; who asked is told why when nothing of it is left.
    Failed {
        /// Who asked.
        asker: Asker,
        /// Why.
        fault: Fault,
    },
}

/// A container without an init, until nothing else of it is left either.
#[derive(Debug)]
pub struct Ending {
    /// What is reported then.
    pub outcome: Outcome,
    /// Since when.
    pub since: Instant,
    /// Since when its cgroup is empty.
    pub empty_since: Option<Instant>,
    /// How often was looked.
    pub looks: u32,
}

/// Where in its life a container is.
#[derive(Debug)]
pub enum Phase {
    /// The worker is at it.
    Creating(Creating),
    /// Init waits to be told to run its program.
    Created(Child),
    /// It was told.
    Starting(Starting),
    /// It runs.
    Running(Child),
    /// It is frozen.
    Paused(Child),
    /// It has no init any more.
    Ending(Ending),
    /// It has ended, and nothing of it runs.
    Stopped(Exit),
    /// Between two phases, inside one function.
    Moving,
}

impl Phase {
    /// For messages.
    pub fn name(&self) -> &'static str {
        match self {
            Phase::Creating(_) => "being created",
            Phase::Created(_) => "created and not started",
            Phase::Starting(_) => "being started",
            Phase::Running(_) => "running",
            Phase::Paused(_) => "paused",
            Phase::Ending(_) => "ending",
            Phase::Stopped(_) => "stopped",
            Phase::Moving => "changing",
        }
    }

    /// The init, while there is one.
    pub fn init(&self) -> Option<&Child> {
        match self {
            Phase::Created(init) | Phase::Running(init) | Phase::Paused(init) => Some(init),
            Phase::Starting(starting) => Some(&starting.init),
            Phase::Creating(_) | Phase::Ending(_) | Phase::Stopped(_) | Phase::Moving => None,
        }
    }

    /// As `slipway.pod.v1` names it.
    pub fn pod_state(&self) -> pod::ContainerState {
        match self {
            Phase::Creating(_) => pod::ContainerState::Creating,
            Phase::Created(_) | Phase::Starting(_) => pod::ContainerState::Created,
            Phase::Running(_) => pod::ContainerState::Running,
            Phase::Paused(_) => pod::ContainerState::Paused,
            // Its exit is not known to anyone yet, and its processes may still run.
            Phase::Ending(_) => pod::ContainerState::Running,
            Phase::Stopped(_) => pod::ContainerState::Stopped,
            Phase::Moving => pod::ContainerState::Unknown,
        }
    }

    /// As containerd names it.
    pub fn task_status(&self) -> process::Status {
        match self {
            Phase::Creating(_) | Phase::Created(_) | Phase::Starting(_) => process::Status::Created,
            Phase::Running(_) | Phase::Ending(_) => process::Status::Running,
            Phase::Paused(_) => process::Status::Paused,
            Phase::Stopped(_) => process::Status::Stopped,
            Phase::Moving => process::Status::Unknown,
        }
    }
}

/// One of a container's output streams that the shim reads.
#[derive(Debug)]
pub struct Stream {
    /// The reading end, or the terminal's master.
    pub fd: OwnedFd,
    /// Its lines.
    pub splitter: Splitter,
    /// Who is attached, by number.
    pub sinks: Vec<u32>,
}

/// The shim's side of a container's streams.
#[derive(Debug, Default)]
pub struct Streams {
    /// Read while there are writers.
    pub stdout: Option<Stream>,
    /// Read while there are writers.
    pub stderr: Option<Stream>,
    /// Where they are written to.
    pub log: Option<LogFile>,
    /// They are read though nothing is written.
    pub discards: bool,
    /// A kept stdin's other end.
    pub stdin: Option<OwnedFd>,
    /// The fifo that stdin is to come from.
    pub stdin_fifo: Option<OwnedFd>,
    /// The kept stdin is closed when the first attached one has ended.
    pub stdin_once: bool,
    /// The terminal's master.
    pub terminal: Option<OwnedFd>,
    /// Fifos held open.
    pub fifos: Vec<OwnedFd>,
    /// Pumps of this container's, by number.
    pub pumps: Vec<u32>,
    /// Bytes of the log lost, kept beyond the log's closing.
    pub log_lost: u64,
    /// Where the log is, kept beyond its closing.
    pub log_path: Option<PathBuf>,
}

/// The strings a container or exec was asked for with.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// stdin
    pub stdin: String,
    /// stdout
    pub stdout: String,
    /// stderr
    pub stderr: String,
    /// A terminal instead.
    pub terminal: bool,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// It was made, and is ours to empty and remove.
    pub cgroup_made: bool,
    /// Where in its life it is.
    pub phase: Phase,
    /// What init says between its start and its exec.
    pub start_report: Option<Report>,
    /// The shim mounted bundle/rootfs.
    pub rootfs_mounted: bool,
    /// How its streams were asked for.
    pub asked: Asked,
    /// Its streams.
    pub streams: Streams,
    /// Its own ends of its streams, until the worker has them.
    pub theirs: Theirs,
    /// Another container's that it joins, until the worker has it.
    pub pid_namespace: Option<OwnedFd>,
    /// What is to be mounted as its root (containerd).
    pub rootfs: Vec<types::Mount>,
    /// Its limits, until they are applied.
    pub resources: Resources,
    /// Where its cgroup is to be.
    pub cgroup_path: CgroupPath,
    /// Hears of kills for want of memory.
    pub oom: Option<OomWatch>,
    /// The kernel has killed something of it for want of memory. Kept here: systemd removes a scope, and its counters, as soon as
    /// nothing runs in it.
    pub oom_killed: bool,
    /// Looks at a want of memory that has killed nothing yet.
    pub oom_looks: crate::oom::Looks,
    /// Processes run in it besides init.
    pub execs: Vec<Exec>,
    /// Who waits for its end.
    pub waiters: Vec<Reply>,
    /// Who waits for it to be gone.
    pub deleters: Vec<Reply>,
    /// Looks at whether its cgroup lets itself be removed.
    pub remove_tries: u32,
    /// In nanoseconds since 1970; 0: not yet.
    pub created_at: i64,
    /// In nanoseconds since 1970; 0: not yet.
    pub started_at: i64,
    /// Why it could not be created, once nothing of it is left.
    pub failure: Option<Fault>,
}

impl Container {
    /// Who hears how its creation ends, while it has not ended.
    fn asker(&mut self) -> Option<&mut Asker> {
        match &mut self.phase {
            Phase::Creating(creating) => Some(&mut creating.asker),
            Phase::Ending(Ending {
                outcome: Outcome::Failed { asker, .. },
                ..
            }) => Some(asker),
            _ => None,
        }
    }

    /// Has a Task.Start wait for the end of its creation; false: it has ended, or somebody waits already.
    pub fn start_when_created(&mut self, reply: Reply) -> bool {
        self.asker().is_some_and(|asker| asker.wait(reply))
    }

    /// A connection has ended: what was to be started for it is not.
    pub fn forget_start(&mut self, conn: u32) {
        if let Some(asker) = self.asker() {
            asker.forget(conn);
        }
    }

    /// Kills processes of its, with what can be found of what they started.
    pub fn kill_trees(&self, roots: &[&Child]) {
        crate::tree::kill(roots, || {
            self.cgroup.procs().unwrap_or_else(|e| {
                warning!("list the processes of container {}: {}", self.id, Chain(&e));
                Vec::new()
            })
        });
    }

    /// The error of an act its phase does not allow.
    pub fn illegal(&self, act: &'static str) -> Illegal {
        Illegal {
            act,
            id: self.id.clone(),
            phase: self.phase.name(),
        }
    }

    /// Its init, or why there is none.
    ///
    /// # Errors
    /// `NotFound` once it has ended, as containerd expects of a signal to a dead process.
    pub fn init(&self, act: &'static str) -> Result<&Child, Fault> {
        self.phase.init().ok_or_else(|| match self.phase {
            Phase::Ending(_) | Phase::Stopped(_) => Fault::not_found(self.illegal(act)),
            _ => self.illegal(act).into(),
        })
    }

    /// The worker reported the init.
    ///
    /// # Errors
    /// When it is not being created.
    pub fn created(&mut self, init: Child) -> Result<Creating, Illegal> {
        match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Creating(creating) => {
                self.phase = Phase::Created(init);
                self.created_at = crate::clock::now();
                Ok(creating)
            }
            other => {
                self.phase = other;
                Err(self.illegal("finish creating"))
            }
        }
    }

    /// Init was told to run its program.
    ///
    /// # Errors
    /// When it is not created, or was started before.
    pub fn starting(&mut self, reply: Reply, deadline: Instant) -> Result<(), Illegal> {
        match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Created(init) => {
                self.phase = Phase::Starting(Starting {
                    init,
                    deadline,
                    reply,
                });
                Ok(())
            }
            other => {
                self.phase = other;
                Err(self.illegal("start"))
            }
        }
    }

    /// Init runs its program. Answers who asked for it and until when.
    ///
    /// # Errors
    /// When it is not being started.
    pub fn running(&mut self) -> Result<(Reply, Instant), Illegal> {
        let asked = self.not_running()?;
        self.started_at = crate::clock::now();
        Ok(asked)
    }

    /// Init was told to run its program, and cannot: its end follows. Answers who asked for it and until when.
    ///
    /// # Errors
    /// When it is not being started.
    pub fn not_running(&mut self) -> Result<(Reply, Instant), Illegal> {
        match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Starting(Starting {
                init,
                deadline,
                reply,
            }) => {
                self.phase = Phase::Running(init);
                Ok((reply, deadline))
            }
            other => {
                self.phase = other;
                Err(self.illegal("finish starting"))
            }
        }
    }

    /// Freezes or thaws: `act` has changed the cgroup when this is called with its result in hand.
    ///
    /// # Errors
    /// When it does not run, or is not paused.
    pub fn set_paused(&mut self, paused: bool) -> Result<(), Illegal> {
        self.phase = match (std::mem::replace(&mut self.phase, Phase::Moving), paused) {
            (Phase::Running(init), true) => Phase::Paused(init),
            (Phase::Paused(init), false) => Phase::Running(init),
            (other, _) => {
                self.phase = other;
                return Err(self.illegal(if paused { "pause" } else { "resume" }));
            }
        };
        Ok(())
    }

    /// It has no init any more, or never had one. Answers the phase it was in.
    pub fn ending(&mut self, outcome: Outcome) -> Phase {
        // That it runs may be heard together with its end, which was looked at the clock for first.
        if let Outcome::Exited(exit) = &outcome {
            self.started_at = self.started_at.min(exit.at_ns);
        }
        let ending = Ending {
            outcome,
            since: Instant::now(),
            empty_since: None,
            looks: 0,
        };
        std::mem::replace(&mut self.phase, Phase::Ending(ending))
    }

    /// Nothing of it is left. Answers what is to be reported.
    ///
    /// # Errors
    /// When it was not ending.
    pub fn ended(&mut self) -> Result<Outcome, Illegal> {
        match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Ending(Ending { outcome, .. }) => {
                if let Outcome::Exited(exit) = outcome {
                    self.phase = Phase::Stopped(exit);
                }
                Ok(outcome)
            }
            other => {
                self.phase = other;
                Err(self.illegal("finish"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_sys::cgroup::Layout;
    use std::path::Path;

    fn child() -> Child {
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("a descriptor");
        Child { pid: 1, pidfd: fd }
    }

    fn container(phase: Phase) -> Container {
        let layout = Layout::at(&[("cpu", Path::new("/sys/fs/cgroup/cpu"))], None);
        Container {
            id: "c".into(),
            bundle: "/b".into(),
            cgroup: Cgroup::open(&layout, &CgroupPath::Fs("/none".into())).expect("a path"),
            cgroup_made: false,
            phase,
            start_report: None,
            rootfs_mounted: false,
            asked: Asked::default(),
            streams: Streams::default(),
            theirs: Theirs::default(),
            pid_namespace: None,
            rootfs: Vec::new(),
            resources: Resources::default(),
            cgroup_path: CgroupPath::Fs("/none".into()),
            oom: None,
            oom_killed: false,
            oom_looks: crate::oom::Looks::default(),
            execs: Vec::new(),
            waiters: Vec::new(),
            deleters: Vec::new(),
            remove_tries: 0,
            created_at: 0,
            started_at: 0,
            failure: None,
        }
    }

    const REPLY: Reply = Reply { conn: 1, stream: 1 };
    const EXIT: Exit = Exit {
        code: 3,
        at_ns: 1,
        oom_killed: false,
        pid: 1,
    };

    #[test]
    fn a_container_is_created_started_paused_resumed_and_ends() {
        let mut c = container(Phase::Created(child()));
        c.starting(REPLY, Instant::now()).expect("started");
        assert_eq!(c.running().expect("runs").0, REPLY);
        assert!(c.started_at > 0);
        c.set_paused(true).expect("paused");
        c.set_paused(false).expect("resumed");
        assert!(matches!(c.ending(Outcome::Exited(EXIT)), Phase::Running(_)));
        assert!(matches!(c.ended(), Ok(Outcome::Exited(EXIT))));
        assert!(matches!(c.phase, Phase::Stopped(EXIT)));
    }

    #[test]
    fn one_whose_program_could_not_be_run_was_never_started_and_no_end_is_before_its_start() {
        let mut c = container(Phase::Created(child()));
        c.starting(REPLY, Instant::now()).expect("started");
        assert_eq!(c.not_running().expect("its end follows").0, REPLY);
        c.ending(Outcome::Exited(EXIT));
        assert_eq!(c.started_at, 0);
        let mut c = container(Phase::Created(child()));
        c.starting(REPLY, Instant::now()).expect("started");
        c.running().expect("runs");
        c.ending(Outcome::Exited(EXIT));
        assert_eq!(c.started_at, EXIT.at_ns);
    }

    #[test]
    fn an_act_out_of_phase_is_refused_by_name_and_changes_nothing() {
        let mut c = container(Phase::Running(child()));
        let error = c.starting(REPLY, Instant::now()).expect_err("it runs");
        assert_eq!(error.to_string(), "start container c: it is running");
        assert!(matches!(c.phase, Phase::Running(_)));
        assert!(c.set_paused(false).is_err());
        assert!(c.ended().is_err());
        assert!(c.running().is_err());
        assert!(matches!(c.phase, Phase::Running(_)));
        let mut c = container(Phase::Stopped(EXIT));
        assert!(c.created(child()).is_err());
        assert!(c.set_paused(true).is_err());
        assert!(matches!(c.phase, Phase::Stopped(EXIT)));
    }

    #[test]
    fn a_signal_to_a_container_that_has_ended_finds_nothing() {
        let c = container(Phase::Stopped(EXIT));
        let fault = c.init("kill").expect_err("no init");
        assert_eq!(fault.code, slipway_shim_api::status::Code::NotFound);
    }

    #[test]
    fn a_failed_creation_leaves_no_stopped_container() {
        let mut c = container(Phase::Moving);
        c.ending(Outcome::Failed {
            asker: Asker::Create(REPLY),
            fault: Fault::invalid("x"),
        });
        assert!(!c.start_when_created(REPLY), "whoever creates it is told");
        assert!(matches!(c.ended(), Ok(Outcome::Failed { .. })));
        assert!(!matches!(c.phase, Phase::Stopped(_)));
    }

    #[test]
    fn one_start_waits_for_a_creation_until_its_client_is_gone() {
        let mut c = container(Phase::Moving);
        assert!(!c.start_when_created(REPLY));
        c.ending(Outcome::Failed {
            asker: Asker::Start(None),
            fault: Fault::invalid("x"),
        });
        assert!(c.start_when_created(REPLY));
        assert!(!c.start_when_created(REPLY), "one waits already");
        c.forget_start(REPLY.conn + 1);
        assert!(!c.start_when_created(REPLY));
        c.forget_start(REPLY.conn);
        assert!(c.start_when_created(REPLY));
    }
}
