//! One container and its pod, to their end: announced, evicted, killed. What could not be done is tried again, for as long as
//! the GPU is sick or slipwayd has the container announced; done is what slipwayd or the API server has said to be.

use std::sync::atomic::Ordering;
use std::time::Duration;

use slipway_fault_api::v1::FailContainerRequest;
use tokio::time::Instant;

use super::act::{Faults, now};
use super::case::{Case, Pod, Target};
use super::evict::{self, Evicted};
use super::runtime::{self, AskError, Ended};
use crate::cause::chain;
use crate::config::FaultAction;
use crate::kube::{KubeError, Note};

/// How long slipwayd is waited for, which may be being restarted.
const RUNTIME: Duration = Duration::from_secs(10);
/// How long the API server is waited for before a container is ended without its pod being known.
const API: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// For how much longer than everything else takes a container has no successor.
const HOLD: u64 = 60;

/// What is to be done about a pod.
enum Step {
    /// Nothing more.
    Done,
    /// The container is to be ended, and then nothing more.
    End,
    /// Nothing for now: it runs, and may.
    Not,
    /// Its eviction is not allowed now, and why.
    Blocked(String, Pod),
    /// Its eviction is not allowed at all.
    Forbidden(KubeError),
}

/// What is told once, until it is something else.
#[derive(Default)]
struct Said(String);

impl Said {
    fn is_new(&mut self, why: &str) -> bool {
        let new = self.0 != why;
        why.clone_into(&mut self.0);
        new
    }
}

impl Faults {
    /// Has the runtime know why the container will end, and start no other: it may end by itself at any moment. One that has
    /// ended is known to have. On a GPU that is well, only what was announced is asked about.
    pub(super) async fn announce(&self, case: &Case, n: usize) {
        let Some(mut target) = self.target(case, n).await else {
            return;
        };
        if target.done || !target.announced && !self.is_sick(case) {
            return;
        }
        if (target.uid.is_none() || target.id.is_none())
            && let Some(client) = &self.client
            && let Ok(Some(pod)) = evict::look(client, &target, (&self.node, case.opened)).await
        {
            self.adopt(case, n, &mut target, &pod).await;
        }
        if case.only_waiting {
            return;
        }
        match self.ask(case, &target, true).await {
            Ok(Ended::Announced) => self.book.target(case, n, |t| t.announced = true).await,
            Ok(Ended::Failed(_) | Ended::Gone | Ended::Dying(_)) => {
                self.book.target(case, n, |t| t.killed = true).await;
            }
            Err(e) => tracing::debug!(error = chain(&e), pod = target.pod, "it is not announced"),
        }
    }

    /// Takes over what the API server knows of a target and kubelet has not told. From then on it is that pod, and that
    /// container, and no other.
    async fn adopt(&self, case: &Case, n: usize, target: &mut Target, pod: &Pod) {
        let before = target.clone();
        target.uid.get_or_insert_with(|| pod.runs_as.clone());
        // Whatever this pod has in it now has the GPU.
        if target.id.is_none() && self.is_sick(case) {
            target.id.clone_from(&pod.id);
        }
        if *target != before {
            let (uid, id) = (target.uid.clone(), target.id.clone());
            self.book.target(case, n, |t| (t.uid, t.id) = (uid, id)).await;
        }
    }

    /// Asks slipwayd.
    async fn ask(&self, case: &Case, target: &Target, only_announce: bool) -> Result<Ended, AskError> {
        let (Some(uid), Some(id)) = (target.uid.clone(), target.id.clone()) else {
            return Err(AskError::Unknown {
                container: target.container.clone(),
            });
        };
        if target.is_elsewhere() {
            return Err(AskError::Elsewhere { id });
        }
        let evicts = self.config.action == FaultAction::FailAndEvict;
        let hold = self.config.wait_seconds + HOLD;
        let request = FailContainerRequest {
            pod_uid: uid,
            container: target.container.clone(),
            container_id: id.rsplit("://").next().unwrap_or_default().to_owned(),
            reason: case.reason(),
            message: case.message(),
            only_announce,
            hold_seconds: if evicts {
                u32::try_from(hold).unwrap_or(u32::MAX)
            } else {
                0
            },
        };
        let until = Instant::now() + RUNTIME;
        loop {
            let asked = runtime::fail(self.config.socket.clone(), request.clone()).await;
            match asked {
                Err(AskError::Absent { .. })
                    if Instant::now() < until && !self.told.load(Ordering::Relaxed) =>
                {
                    tokio::time::sleep(FIRST_PAUSE).await;
                }
                Err(e @ AskError::Absent { .. }) => {
                    if !self.told.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            error = chain(&e),
                            "containers cannot be failed here (faults.socket): their pods are evicted where they may be"
                        );
                    }
                    return Err(e);
                }
                asked => {
                    self.told.store(false, Ordering::Relaxed);
                    return asked;
                }
            }
        }
    }

    /// One container and its pod, to their end.
    pub(super) async fn end(&self, case: &Case, n: usize) {
        let began = Instant::now();
        let mut blocked = None::<Instant>;
        let (mut of_pod, mut of_container) = (Said::default(), Said::default());
        let mut pause = FIRST_PAUSE;
        while let Some(mut target) = self.target(case, n).await
            && !target.done
            && self.is_to_go_on(case, n, &mut target).await
        {
            self.catch_up(case, n, &mut target).await;
            let (why, kills, last) = match self.step(case, n, &mut target).await {
                Ok(Step::Done) => break,
                Ok(Step::End) => (None, true, true),
                Ok(Step::Not) => (None, false, false),
                Ok(Step::Forbidden(e)) => (Some(chain(&e)), true, false),
                Ok(Step::Blocked(why, pod)) => {
                    let since = *blocked.get_or_insert_with(Instant::now);
                    let patience = Duration::from_secs(self.config.evict_seconds);
                    if patience.is_zero() || since.elapsed() < patience {
                        (Some(why), true, false)
                    } else {
                        match self.delete(case, &target, &pod, patience).await {
                            Ok(()) => (None, true, true),
                            Err(e) => (Some(chain(&e)), true, false),
                        }
                    }
                }
                Err(e) => (
                    Some(chain(&e)),
                    began.elapsed() >= API && !case.only_waiting,
                    false,
                ),
            };
            let (namespace, pod) = (&target.namespace, &target.pod);
            if let Some(why) = why
                && of_pod.is_new(&why)
            {
                tracing::warn!(namespace, pod, why, "the pod is not evicted; trying on");
            }
            if kills && !target.killed {
                match self.kill(case, n, &target).await {
                    Ok(()) => target.killed = true,
                    // That has been told.
                    Err(AskError::Absent { .. }) => {}
                    Err(e @ AskError::Elsewhere { .. }) => {
                        let why = chain(&e);
                        if of_container.is_new(&why) {
                            tracing::warn!(namespace, pod, why, "the container is not failed");
                        }
                    }
                    Err(e) => {
                        let why = chain(&e);
                        if of_container.is_new(&why) {
                            let container = &target.container;
                            tracing::error!(
                                namespace,
                                pod,
                                container,
                                why,
                                "the container is not failed; trying on"
                            );
                        }
                    }
                }
            }
            if last && target.killed {
                break;
            }
            // Not past the moment from which on it is ended without its pod.
            let left = API.saturating_sub(began.elapsed());
            let wait = if left.is_zero() { pause } else { pause.min(left) };
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
        self.book.target(case, n, |t| t.done = true).await;
    }

    /// What could not be found out or announced at first: kubelet may have been slow, slipwayd away.
    async fn catch_up(&self, case: &Case, n: usize, target: &mut Target) {
        if case.only_waiting || target.announced || target.killed {
            return;
        }
        if target.uid.is_none() || target.id.is_none() {
            self.ask_kubelet(case).await;
            match self.target(case, n).await {
                Some(now) if now.uid.is_some() && now.id.is_some() => {}
                _ => return,
            }
        }
        self.announce(case, n).await;
        if let Some(now) = self.target(case, n).await {
            *target = now;
        }
    }

    /// Whether there is anything left to be done: the GPU is sick, or the container has lost what it had on it and lives.
    async fn is_to_go_on(&self, case: &Case, n: usize, target: &mut Target) -> bool {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.is_sick(case) {
                return true;
            }
            if !target.announced || target.killed {
                return false;
            }
            match self.ask(case, target, true).await {
                Ok(Ended::Announced) => return true,
                Ok(Ended::Failed(_) | Ended::Gone | Ended::Dying(_)) => {
                    target.killed = true;
                    self.book.target(case, n, |t| t.killed = true).await;
                }
                Err(e) => {
                    tracing::debug!(
                        error = chain(&e),
                        pod = target.pod,
                        "whether it lives is not known"
                    );
                    tokio::time::sleep(pause).await;
                }
            }
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// What is to be done about it now, as the API server knows its pod.
    async fn step(&self, case: &Case, n: usize, target: &mut Target) -> Result<Step, KubeError> {
        let Some(client) = &self.client else {
            return Ok(if case.only_waiting { Step::Not } else { Step::End });
        };
        let pod = match evict::look(client, target, (&self.node, case.opened)).await {
            Ok(Some(pod)) => pod,
            Ok(None) => return Ok(Step::Done),
            Err(e) if self.config.action == FaultAction::Fail => {
                tracing::debug!(error = chain(&e), "the pod is not known");
                return Ok(Step::End);
            }
            Err(e) => return Err(e),
        };
        if pod.ended || pod.is_over {
            return Ok(Step::Done);
        }
        self.adopt(case, n, target, &pod).await;
        if case.only_waiting && pod.runs {
            return Ok(Step::Not);
        }
        // Of a pod that is on its way out, a container that is not there never will be.
        let leaving = match target.killed || target.id.is_none() {
            true => Step::Done,
            false => Step::End,
        };
        if pod.leaves {
            return Ok(leaving);
        }
        // One that has not started waits for the GPU for ever; one that cannot be failed ends in no other way.
        let fails = target.id.is_some() && !target.is_elsewhere() && !self.told.load(Ordering::Relaxed);
        let stays = !pod.restarts && fails;
        if self.config.action == FaultAction::Fail || pod.is_static || stays {
            return Ok(Step::End);
        }
        Ok(match evict::evict(client, target, &pod).await? {
            Evicted::Done => {
                let text = format!("the pod is evicted: {}", case.message());
                self.note(target, "GpuFaultEvicted", text);
                leaving
            }
            Evicted::Gone => Step::Done,
            Evicted::Blocked(why) => Step::Blocked(why, pod),
            Evicted::Forbidden(e) => Step::Forbidden(e),
        })
    }

    async fn delete(
        &self,
        case: &Case,
        target: &Target,
        pod: &Pod,
        patience: Duration,
    ) -> Result<(), KubeError> {
        let Some(client) = &self.client else {
            return Ok(());
        };
        if evict::delete(client, target, pod).await? {
            let said = format!(
                "the pod is deleted, as a disruption budget has not let it be evicted for {} s: {}",
                patience.as_secs(),
                case.message()
            );
            self.note(target, "GpuFaultDeleted", said);
        }
        Ok(())
    }

    /// Ends the container now.
    async fn kill(&self, case: &Case, n: usize, target: &Target) -> Result<(), AskError> {
        let (namespace, pod, container) = (&target.namespace, &target.pod, &target.container);
        match self.ask(case, target, false).await? {
            Ended::Failed(code) => {
                let text = format!(
                    "the container is ended ({}, exit code {code}): {}",
                    case.reason(),
                    case.message()
                );
                tracing::warn!(namespace, pod, container, "{text}");
                self.note(target, "GpuFaultFailed", text);
            }
            Ended::Gone => tracing::info!(namespace, pod, container, "the container had ended by itself"),
            // slipwayd goes on with it, over its own restarts too.
            Ended::Dying(why) => tracing::error!(
                namespace,
                pod,
                container,
                why,
                "the container is killed and does not die"
            ),
            Ended::Announced => {
                return Err(AskError::Refused {
                    id: target.id.clone().unwrap_or_default(),
                    message: "it goes on".to_owned(),
                });
            }
        }
        self.book.target(case, n, |t| t.killed = true).await;
        Ok(())
    }

    fn note(&self, target: &Target, reason: &'static str, message: String) {
        let note = Note {
            about: Some(target.holder()),
            reason,
            message,
            warning: true,
            at: now(),
        };
        // Nobody listens: there is no API server to tell.
        let _ = self.notes.try_send(note);
    }
}
