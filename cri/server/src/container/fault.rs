//! Failing a container: why is written down, then everything in it is killed, and its end is told with that reason. Whoever
//! finds one that was failed and lives (the next start, the janitor) finishes it. One whose fault is only announced goes on
//! until somebody stops it, without a grace period.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::pod as wire;

use super::{Container, exit, stop};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;
use crate::pod::Pod;
use crate::records::{ContainerPhase, Exited, Fault};

const VERB: &str = "FailContainer";

/// Which container is meant. All of it has to be so.
#[derive(Debug, Clone)]
pub struct Target {
    pub pod_uid: String,
    /// Its name.
    pub container: String,
    /// Its whole id.
    pub id: String,
}

/// How a container that was to be failed has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// For that reason, or one it was failed for before.
    Failed(Exited),
    /// By itself, before.
    Before(Exited),
    /// Not yet: that was not asked for.
    Announced,
}

/// Fails a container; one that is failed already keeps its first reason, one that has ended keeps its end.
pub async fn fail(daemon: &Arc<Daemon>, target: &Target, fault: Fault) -> Result<Outcome, Error> {
    let container = find(daemon, target)?;
    look(daemon, &container).await?;
    let (kill, mut recorded) = (fault.kill, false);
    container
        .transition(&daemon.records, |state| {
            let live = matches!(
                state.phase,
                ContainerPhase::Created | ContainerPhase::Running { .. }
            );
            recorded = match &mut state.fault {
                Some(old) if old.stands_at(fault.at_ns) => old.join(&fault),
                other if live => {
                    *other = Some(fault);
                    true
                }
                _ => false,
            };
            recorded
        })
        .await?;
    if recorded {
        tracing::warn!(kill, "it is failed");
    }
    // Somebody has to kill it now, whatever becomes of this request.
    let finished = async {
        fail::point("fail_container.after_record").await?;
        finish(daemon, &container).await?;
        fail::point("fail_container.after_kill").await?;
        Ok(())
    };
    finished.await.inspect_err(|_: &Error| daemon.janitor.wake())?;
    outcome(&container).ok_or_else(|| not_found(target))
}

/// Kills a container that was failed and lives; nothing to do for any other.
pub async fn finish(daemon: &Arc<Daemon>, container: &Container) -> Result<(), Error> {
    if !unfinished(container) {
        return Ok(());
    }
    if container.phase() == ContainerPhase::Created {
        // A start may be in progress: what comes of it is what gets killed. There is none after it.
        drop(stop::begin(daemon, container, VERB).await?);
    }
    if container.live() {
        stop::kill(daemon, container).await?;
    }
    Ok(())
}

/// That no container of this name is held back from a pod.
///
/// # Errors
/// [`Error::Held`].
pub fn check_hold(daemon: &Daemon, pod: &Pod, name: &str) -> Result<(), Error> {
    let now = crate::time::now_ns();
    for container in daemon.registry.containers_of(pod.id()) {
        let Some(fault) = container.state().fault else {
            continue;
        };
        let left = fault.held_until_ns.saturating_sub(now);
        if left > 0 && container.record().config.metadata.name == name {
            return Err(Error::Held {
                name: name.to_owned(),
                id: container.id().to_string(),
                left: Duration::from_nanos(left.unsigned_abs()),
                reason: fault.reason,
                message: fault.message,
            });
        }
    }
    Ok(())
}

/// Why it must not go on now.
pub fn standing(container: &Container) -> Option<Fault> {
    let fault = container.state().fault?;
    fault.stands_at(crate::time::now_ns()).then_some(fault)
}

/// Whether it was failed and lives.
pub fn unfinished(container: &Container) -> bool {
    container.live() && container.state().fault.is_some_and(|fault| fault.kill)
}

/// The container that is meant, and no other.
fn find(daemon: &Daemon, target: &Target) -> Result<Arc<Container>, Error> {
    let container = daemon.visible_container(&target.id)?;
    // A beginning of an id may be another container's tomorrow.
    let same = container.id().as_str() == target.id
        && container.record().config.metadata.name == target.container
        && daemon
            .registry
            .pod(container.pod().as_str())?
            .record()
            .config
            .metadata
            .uid
            == target.pod_uid;
    if same {
        Ok(container)
    } else {
        Err(not_found(target))
    }
}

fn not_found(target: &Target) -> Error {
    Error::NotFound {
        kind: "container",
        id: format!(
            "{} ({} of the pod {})",
            target.id, target.container, target.pod_uid
        ),
    }
}

/// Notes an end that the shim knows of and nobody has told yet. A shim that does not answer tells later: an end has its
/// time.
async fn look(daemon: &Daemon, container: &Container) -> Result<(), Error> {
    if !container.live() {
        return Ok(());
    }
    let pod = daemon.registry.pod(container.pod().as_str())?;
    let Some(shim) = pod.shim() else { return Ok(()) };
    let Ok(info) = shim.info().await else {
        return Ok(());
    };
    let seen = info
        .containers
        .iter()
        .find(|seen| seen.id == container.id().as_str());
    match seen {
        Some(seen) if seen.state() == wire::ContainerState::Stopped => {
            exit::note(daemon, container, exit::seen_exit(seen)).await
        }
        _ => Ok(()),
    }
}

/// How it has ended; none: it has been removed meanwhile.
fn outcome(container: &Container) -> Option<Outcome> {
    let state = container.state();
    let exit = match state.phase {
        ContainerPhase::Exited(exit) | ContainerPhase::Removing(Some(exit)) => exit,
        ContainerPhase::Created | ContainerPhase::Running { .. } => return Some(Outcome::Announced),
        ContainerPhase::Creating | ContainerPhase::Removing(None) => return None,
    };
    Some(match state.fault {
        Some(fault) if fault.caused(&exit) => Outcome::Failed(exit),
        _ => Outcome::Before(exit),
    })
}
