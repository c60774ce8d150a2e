//! The pod around the containers: its cgroup, its namespaces, its built-in init. Making them, and taking them back in the
//! opposite order. Knows nothing of networks: the network namespace is pinned for somebody else to fill.
//!
//! ```text
//! <state-dir>/ns/{user,net,ipc,uts}   namespaces of their own, as bind mounts
//! <state-dir>/ns/pid                  that of the built-in init
//! ```

use crate::conn::Reply;
use crate::create::kill;
use crate::diag::{Chain, info, warning};
use crate::fault::Fault;
use crate::reactor::Timer;
use crate::shim::Shim;
use crate::task::Phase;
use prost::Message;
use slipway_shim_api::pod::{self, NamespaceMode};
use slipway_shim_api::status::Code;
use slipway_sys::cgroup::{Cgroup, CgroupPath, Resources};
use slipway_sys::init::InitPlan;
use slipway_sys::ns::{self, IdMap, IdMaps, Kind, NewNamespaces};
use slipway_sys::process::{Child, Status};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long StopPod may take.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks at whether everything is gone.
const STOP_PAUSE: Duration = Duration::from_millis(2);
/// How long the built-in init of a pod that could not be made may take to die.
const UNDO: Duration = Duration::from_secs(1);

/// The pod's cgroup.
#[derive(Debug)]
pub struct OwnCgroup {
    /// It.
    pub cgroup: Cgroup,
    /// Made here.
    pub made: bool,
}

/// The built-in init.
#[derive(Debug)]
pub struct Init {
    /// Its process.
    pub process: Child,
}

/// Someone waits for the pod to have stopped.
#[derive(Debug)]
struct Stopping {
    replies: Vec<Reply>,
    until: Instant,
}

/// What a pod has.
#[derive(Debug, Default)]
pub struct Pod {
    /// CreatePod has succeeded.
    pub created: bool,
    /// Pinned namespaces.
    pub namespaces: Vec<(Kind, PathBuf)>,
    /// The pod's cgroup.
    pub cgroup: Option<OwnCgroup>,
    /// The built-in init's cgroup.
    pub init_cgroup: Option<Cgroup>,
    /// The built-in init.
    pub init: Option<Init>,
    stopping: Option<Stopping>,
}

impl Shim {
    /// Pod.CreatePod.
    ///
    /// # Errors
    /// When anything of it fails; what was made is taken back.
    pub fn create_pod(&mut self, request: &pod::CreatePodRequest) -> Result<Vec<u8>, Fault> {
        if self.pod.created {
            let id = &self.config.id;
            return Err(Fault::new(
                Code::AlreadyExists,
                format_args!("pod {id} is created already"),
            ));
        }
        if Path::new(&request.state_dir) != self.config.state_dir {
            return Err(Fault::invalid(format_args!(
                "create pod {}: its state directory is {}, not {}",
                request.pod_id,
                self.config.state_dir.display(),
                request.state_dir
            )));
        }
        let made = self
            .make_cgroup(request)
            .and_then(|()| self.make_namespaces(request))
            .and_then(|()| self.make_init(request))
            .and_then(|()| Ok(self.save()?));
        if let Err(fault) = made {
            self.undo_pod();
            return Err(fault.during(format_args!("create pod {}", request.pod_id)));
        }
        self.pod.created = true;
        info!("pod {} is created", request.pod_id);
        let response = pod::CreatePodResponse {
            namespaces: self.namespaces(),
            init_pid: self.pod.init.as_ref().map_or(0, |init| init.process.pid),
            version: crate::VERSION.to_owned(),
        };
        Ok(response.encode_to_vec())
    }

    fn namespaces(&self) -> Vec<pod::Namespace> {
        let describe = |(kind, path): &(Kind, PathBuf)| pod::Namespace {
            kind: kind.name().to_owned(),
            path: path.to_string_lossy().into_owned(),
        };
        self.pod.namespaces.iter().map(describe).collect()
    }

    fn make_cgroup(&mut self, request: &pod::CreatePodRequest) -> Result<(), Fault> {
        if request.cgroup_parent.is_empty() {
            return Ok(());
        }
        let path = CgroupPath::parse(&request.cgroup_parent)?;
        let mut cgroup = Cgroup::open(&self.layout, &path)?;
        // Written down before it is made: a crash in between removes an empty directory at most.
        let made = !cgroup.exists();
        if made {
            cgroup.claim();
        }
        self.pod.cgroup = Some(OwnCgroup { cgroup, made });
        self.save()?;
        let (cgroup, made) = Cgroup::ensure(&self.layout, &path)?;
        if !request.resources_json.is_empty() {
            let resources = Resources::from_json(&request.resources_json)
                .map_err(|e| Fault::invalid(format_args!("the pod's resources: {e}")))?;
            cgroup.apply(&resources)?;
        }
        self.pod.cgroup = Some(OwnCgroup { cgroup, made });
        Ok(())
    }

    fn make_namespaces(&mut self, request: &pod::CreatePodRequest) -> Result<(), Fault> {
        let own = |mode: NamespaceMode| mode == NamespaceMode::Pod;
        let maps = |maps: &[pod::IdMapping]| -> Vec<IdMap> {
            let map = |m: &pod::IdMapping| IdMap {
                container_id: m.container_id,
                host_id: m.host_id,
                length: m.length,
            };
            maps.iter().map(map).collect()
        };
        let user = (!request.uid_map.is_empty() || !request.gid_map.is_empty()).then(|| IdMaps {
            uids: maps(&request.uid_map),
            gids: maps(&request.gid_map),
        });
        let new = NewNamespaces {
            user,
            net: own(request.net()),
            ipc: own(request.ipc()),
            uts: own(request.uts()).then(|| request.hostname.clone()),
        };
        if new == NewNamespaces::default() {
            return Ok(());
        }
        let dir = self.ns_dir()?;
        // Written down before they are there.
        let candidates = [Kind::User, Kind::Net, Kind::Ipc, Kind::Uts];
        self.pod.namespaces = candidates
            .into_iter()
            .map(|kind| (kind, dir.join(kind.name())))
            .collect();
        self.save()?;
        let sysctls: Vec<(String, String)> = request.sysctls.clone().into_iter().collect();
        self.pod.namespaces = ns::pin(&new, &dir, &sysctls)?;
        Ok(())
    }

    fn ns_dir(&self) -> Result<PathBuf, Fault> {
        let dir = self.config.state_dir.join("ns");
        match std::fs::create_dir(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(Fault::failed(format_args!("make {}", dir.display()), &e))
            }
            _ => Ok(dir),
        }
    }

    fn make_init(&mut self, request: &pod::CreatePodRequest) -> Result<(), Fault> {
        if request.pid() != NamespaceMode::Pod {
            return Ok(());
        }
        let path = init_cgroup_path(request)?;
        self.pod.init_cgroup = Some(Cgroup::open(&self.layout, &path)?);
        self.save()?;
        let cgroup = Cgroup::create(&self.layout, &path)?;
        let cgroup = self.pod.init_cgroup.insert(cgroup);
        let join: Vec<(Kind, &Path)> = self
            .pod
            .namespaces
            .iter()
            .map(|(kind, path)| (*kind, path.as_path()))
            .collect();
        let plan = InitPlan {
            join: &join,
            cgroup: Some(cgroup),
            oom_score_adj: request.init_oom_score_adj,
        };
        let process = slipway_sys::init::spawn(&plan)?;
        cgroup.settle();
        let pid = process.pid;
        self.pod.init = Some(Init { process });
        let path = self.ns_dir()?.join(Kind::Pid.name());
        self.pod.namespaces.push((Kind::Pid, path.clone()));
        self.save()?;
        ns::pin_of(pid, Kind::Pid, &path)
            .map_err(|e| Fault::failed("pin the namespace of the built-in init", &e))
    }

    /// Takes back a pod that could not be created.
    fn undo_pod(&mut self) {
        if let Some(init) = self.pod.init.take() {
            kill(&init.process);
            let ended = slipway_sys::process::wait_ended(init.process.pidfd.as_fd(), UNDO)
                .and_then(|_| slipway_sys::process::try_reap(init.process.pid));
            if let Err(e) = ended {
                warning!("{}", Chain(&e));
            }
        }
        for (_, path) in std::mem::take(&mut self.pod.namespaces) {
            if let Err(e) = ns::unpin(&path) {
                warning!("{}", Chain(&e));
            }
        }
        if let Some(cgroup) = self.pod.init_cgroup.take()
            && let Err(e) = cgroup.remove(Duration::from_millis(100))
        {
            warning!("{}", Chain(&e));
        }
        if let Some(own) = self.pod.cgroup.take() {
            own.cgroup.give_back();
        }
        self.save_or_warn();
    }

    /// The built-in init was reaped: with it went everything in its PID namespace.
    pub fn pod_init_exited(&mut self, status: Status) {
        let Some(init) = self.pod.init.take() else { return };
        info!(
            "the built-in init has ended ({})",
            crate::worker::in_words(status)
        );
        let exit = pod::Exit {
            pid: init.process.pid,
            exit_code: status.exit_code(),
            oom_killed: false,
            failure: String::new(),
            exited_at_ns: crate::clock::now(),
            started_at_ns: 0,
        };
        if self.pod.stopping.is_none() {
            self.happened("", pod::event::What::Exit(exit));
        }
        self.look_at_stopping();
    }

    /// Pod.StopPod: answered when nothing of the pod runs.
    pub fn stop_pod(&mut self, reply: Reply) {
        match &mut self.pod.stopping {
            Some(stopping) => stopping.replies.push(reply),
            None => {
                self.pod.stopping = Some(Stopping {
                    replies: vec![reply],
                    until: Instant::now() + STOP_DEADLINE,
                });
            }
        }
        self.kill_everything();
        self.look_at_stopping();
    }

    fn kill_everything(&mut self) {
        let creating = self.containers.iter();
        let creating = creating.filter(|(_, container)| matches!(container.phase, Phase::Creating(_)));
        for key in creating.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.end_creating(key);
        }
        for container in self.containers.values() {
            let killed = match &container.phase {
                Phase::Created(_) | Phase::Starting(_) | Phase::Running(_) | Phase::Paused(_) => {
                    container.cgroup.kill()
                }
                _ => Ok(()),
            };
            if let Err(e) = killed {
                warning!("kill container {}: {}", container.id, Chain(&e));
            }
        }
        if let Some(init) = &self.pod.init {
            kill(&init.process);
        }
    }

    /// Goes on with stopping as far as it goes; comes again by timer, and when a container has ended.
    pub fn look_at_stopping(&mut self) {
        let Some(stopping) = &self.pod.stopping else {
            return;
        };
        let overdue = Instant::now() > stopping.until;
        let alive = |phase: &Phase| !matches!(phase, Phase::Stopped(_));
        let left: Vec<String> = self
            .containers
            .values()
            .filter(|c| alive(&c.phase))
            .map(|c| c.id.clone())
            .collect();
        let runs = !left.is_empty() || self.pod.init.is_some();
        let result = if !runs {
            self.let_go(false)
        } else if overdue {
            let who = if left.is_empty() {
                "its init".to_owned()
            } else {
                left.join(", ")
            };
            Err(Fault::new(
                Code::DeadlineExceeded,
                format_args!(
                    "stop pod {}: not dead after {STOP_DEADLINE:?}: {who}",
                    self.config.id
                ),
            ))
        } else {
            self.reactor.look_again(STOP_PAUSE, Timer::PodStop);
            return;
        };
        let Some(stopping) = self.pod.stopping.take() else {
            return;
        };
        for reply in stopping.replies {
            self.answer(reply, result.clone().map(|()| Vec::new()));
        }
    }

    /// Unpins the namespaces (the network's only when `all`), removes the init's cgroup and, when `all`, lets go of the
    /// pod's. Idempotent.
    fn let_go(&mut self, all: bool) -> Result<(), Fault> {
        let mut failed = None;
        self.pod.namespaces.retain(|(kind, path)| {
            if *kind == Kind::Net && !all {
                return true;
            }
            match ns::unpin(path) {
                Ok(()) => false,
                Err(e) => {
                    failed = Some(Fault::failed("stop the pod", &e));
                    true
                }
            }
        });
        if let Some(cgroup) = &self.pod.init_cgroup {
            match cgroup.remove(Duration::from_millis(200)) {
                Ok(()) => self.pod.init_cgroup = None,
                Err(e) => failed = Some(e.into()),
            }
        }
        // Others may be in it: a parent that several pods have, or somebody else's.
        if all && let Some(own) = self.pod.cgroup.take() {
            own.cgroup.give_back();
        }
        self.save_or_warn();
        failed.map_or(Ok(()), Err)
    }

    /// Pod.ReleasePod.
    ///
    /// # Errors
    /// When something does not let go, or the pod was not stopped.
    pub fn release_pod(&mut self) -> Result<Vec<u8>, Fault> {
        if self.pod.init.is_some()
            || self
                .containers
                .values()
                .any(|c| !matches!(c.phase, Phase::Stopped(_)))
        {
            return Err(Fault::precondition(format_args!(
                "release pod {}: it was not stopped",
                self.config.id
            )));
        }
        self.let_go(true)?;
        Ok(Vec::new())
    }

    /// Pod.Info.
    pub fn info(&self) -> Vec<u8> {
        let containers = self.containers.values().map(|c| {
            let exit = if let Phase::Stopped(exit) = &c.phase {
                Some(exit)
            } else {
                None
            };
            let log = c.streams.log.as_ref();
            let log_path = log
                .map(|log| log.path().to_owned())
                .or_else(|| c.streams.log_path.clone());
            pod::Container {
                id: c.id.clone(),
                bundle: c.bundle.to_string_lossy().into_owned(),
                pid: c
                    .phase
                    .init()
                    .map_or_else(|| exit.map_or(0, |exit| exit.pid), |init| init.pid),
                state: c.phase.pod_state().into(),
                created_at_ns: c.created_at,
                started_at_ns: c.started_at,
                exited_at_ns: exit.map_or(0, |exit| exit.at_ns),
                exit_code: exit.map_or(0, |exit| exit.code),
                oom_killed: exit.is_some_and(|exit| exit.oom_killed),
                cgroup: c.cgroup.path().to_string_lossy().into_owned(),
                log_bytes_lost: log.map_or(c.streams.log_lost, crate::log::LogFile::lost),
                log_path: log_path
                    .map(|p| p.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                terminal: c.asked.terminal,
                failure: c
                    .failure
                    .as_ref()
                    .map(|failure| failure.status().message)
                    .unwrap_or_default(),
            }
        });
        pod::InfoResponse {
            version: crate::VERSION.to_owned(),
            pid: self.pid(),
            pod_id: self.config.id.clone(),
            namespaces: self.namespaces(),
            init_pid: self.pod.init.as_ref().map_or(0, |init| init.process.pid),
            containers: containers.collect(),
            last_event: self.events.last(),
        }
        .encode_to_vec()
    }
}

/// A leaf of the pod's cgroup, or of the root's when the pod has none.
fn init_cgroup_path(request: &pod::CreatePodRequest) -> Result<CgroupPath, Fault> {
    let id = &request.pod_id;
    crate::create::check_id(id)?;
    Ok(if request.systemd_cgroup {
        CgroupPath::Scope {
            slice: request.cgroup_parent.clone(),
            prefix: "slipway".to_owned(),
            name: format!("{id}-init"),
        }
    } else if request.cgroup_parent.is_empty() {
        CgroupPath::Fs(PathBuf::from("/slipway").join(format!("{id}-init")))
    } else {
        CgroupPath::Fs(Path::new(&request.cgroup_parent).join(format!("{id}-init")))
    })
}
