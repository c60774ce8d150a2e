//! One task a pod: what its shim tells (exits, OOM kills, lost log lines), and its death.
//!
//! Events are forgotten by the shim when the next ones are asked for, which happens after they are on disk.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::{DeadContainer, Error as ShimError, Shim, pod as wire};
use tracing::Instrument;

use super::Pod;
use super::dir::PodDir;
use crate::container::exit;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::records::{Exited, PodPhase};
use crate::recover;
use crate::recover::reconcile::{self, Before};

/// How long one question waits for an event.
const LONG_POLL: Duration = Duration::from_secs(300);
/// Between questions to a shim that answers with errors.
const PAUSE: Duration = Duration::from_millis(500);
/// The exit code of what died with its shim: as if killed by SIGKILL.
const KILLED: i32 = 137;

/// Follows the shim until it is gone.
pub fn spawn(daemon: &Arc<Daemon>, pod: &Arc<Pod>, shim: Shim, after: u64) {
    let (daemon, pod) = (daemon.clone(), pod.clone());
    let span = tracing::info_span!(parent: None, "watch", pod = %pod.id());
    let tasks = daemon.background.clone();
    tasks.spawn(async move { follow(&daemon, &pod, &shim, after).await }.instrument(span));
}

async fn follow(daemon: &Arc<Daemon>, pod: &Arc<Pod>, shim: &Shim, mut after: u64) {
    loop {
        match shim.events(after, LONG_POLL).await {
            Ok(events) => {
                if missed(after, &events)
                    && let Err(error) = catch_up(daemon, pod, shim).await
                {
                    // The events are asked for again, and what was missed with them.
                    tracing::error!(
                        error = error.chain(),
                        "what the shim's lost events told could not be recorded"
                    );
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                for event in events {
                    match handle(daemon, pod, &event).await {
                        Ok(()) => after = after.max(event.seq),
                        Err(error) => {
                            // Not on disk: not acknowledged. It is told again.
                            tracing::error!(
                                error = error.chain(),
                                "an event of the shim could not be recorded"
                            );
                            tokio::time::sleep(PAUSE).await;
                            break;
                        }
                    }
                }
            }
            Err(ShimError::Gone) => break,
            Err(error) => {
                tracing::warn!(%error, "the shim does not tell its events");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    // Whoever took the pod down, or handed it to another watcher, expected this.
    if watched(&pod.phase()) {
        shim_died(daemon, pod, shim).await;
    }
}

/// Whether the shim of a pod in this phase has to be there: its containers may run.
pub fn watched(phase: &PodPhase) -> bool {
    matches!(phase, PodPhase::Ready | PodPhase::NotReady { .. })
}

/// Whether the shim has dropped events that were not acknowledged, which it does when there are too many.
fn missed(after: u64, events: &[wire::Event]) -> bool {
    events.first().is_some_and(|first| first.seq > after + 1)
}

/// Asks the shim how things are, in the place of events that are lost.
async fn catch_up(daemon: &Arc<Daemon>, pod: &Arc<Pod>, shim: &Shim) -> Result<(), Error> {
    tracing::warn!("the shim has dropped events; asking it for everything");
    let before = Before::of(daemon, pod);
    let info = shim
        .info()
        .await
        .map_err(Error::shim("ask for the state", pod.id()))?;
    reconcile::note(daemon, pod, &before, &info).await?;
    for container in daemon.registry.containers_of(pod.id()) {
        exit::settle_later(daemon, container);
    }
    Ok(())
}

async fn handle(daemon: &Arc<Daemon>, pod: &Arc<Pod>, event: &wire::Event) -> Result<(), Error> {
    match &event.what {
        Some(wire::event::What::Exit(ended)) if event.container_id.is_empty() => {
            tracing::warn!(
                code = ended.exit_code,
                "the init of the pod's PID namespace has ended"
            );
            not_ready(daemon, pod, "the init of its PID namespace has ended").await
        }
        Some(wire::event::What::Exit(ended)) => {
            let Ok(container) = daemon.registry.container(&event.container_id) else {
                return Ok(());
            };
            let exit = exit::told_exit(container.id().as_str(), event.time_ns, ended);
            exit::note(daemon, &container, exit).await?;
            exit::settle_later(daemon, container);
            Ok(())
        }
        Some(wire::event::What::Oom(_)) => {
            tracing::warn!(
                container = event.container_id,
                "the kernel killed a process for want of memory"
            );
            Ok(())
        }
        Some(wire::event::What::LogLoss(loss)) => {
            tracing::warn!(
                container = event.container_id,
                bytes = loss.bytes,
                reason = loss.reason,
                "log lines were lost"
            );
            Ok(())
        }
        None => Ok(()),
    }
}

/// The shim of a pod is gone whose containers may run: everything of it is killed and seen dead before anyone is told.
async fn shim_died(daemon: &Arc<Daemon>, pod: &Arc<Pod>, dead: &Shim) {
    tracing::error!("the connection to the pod's shim ended");
    let died = async {
        let _turn = pod.begin("burying its shim").await?;
        let _closed = pod.close_gate().await?;
        if !watched(&pod.phase()) {
            return Ok(());
        }
        // Losing the connection is not the shim's death: one that answers is followed again, now or when it does.
        if let Some((shim, info)) = recover::reach(daemon, pod).await? {
            tracing::warn!("the connection to the pod's shim was lost; it lives and is followed again");
            recover::follow(daemon, pod, &shim, &info).await?;
            spawn(daemon, pod, shim, info.last_event);
            tidy_later(daemon, pod);
            return Ok(());
        }
        bury(daemon, pod, "the pod's shim ended unexpectedly").await?;
        not_ready(daemon, pod, "its shim ended unexpectedly").await?;
        exit::settle_all(daemon, pod).await
    };
    if let Err(error) = died.await {
        // Without one, the janitor looks after it.
        pod.forget_shim(dead);
        pod.known.set(pod.shim().is_some());
        tracing::error!(
            error = error.chain(),
            "the shim of a pod could neither be followed again nor be buried; trying again later"
        );
        daemon.janitor.wake();
    }
}

fn tidy_later(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    let (daemon, pod) = (daemon.clone(), pod.clone());
    let tasks = daemon.background.clone();
    tasks.spawn(async move { reconcile::tidy(&daemon, &pod).await }.in_current_span());
}

/// Cleans up after a dead shim: kills what it left, and notes how each container ended.
pub async fn bury(daemon: &Arc<Daemon>, pod: &Arc<Pod>, why: &str) -> Result<(), Error> {
    pod.set_shim(None);
    let dir = PodDir::new(&daemon.paths.pods, pod.id());
    let dead = if dir.path().exists() {
        daemon
            .launcher
            .cleanup(dir.path(), false)
            .await
            .map_err(Error::shim("clean up after the shim", pod.id()))?
    } else {
        Vec::new()
    };
    for container in daemon.registry.containers_of(pod.id()) {
        let found = dead.iter().find(|d| d.id == container.id().as_str());
        exit::note(daemon, &container, death(found, why)).await?;
    }
    Ok(())
}

/// How a container ended that died with its shim, or before it without having been noted.
fn death(found: Option<&DeadContainer>, why: &str) -> Exited {
    // When it ended, not when that was found out: slipwayd may have been away for hours.
    let at_ns = found.map_or(0, |dead| dead.at_ns);
    match found {
        Some(dead) if dead.exit_code != KILLED.unsigned_abs() || dead.oom_killed => {
            exit::told(&dead.id, dead.exit_code, at_ns, dead.oom_killed, &dead.failure)
        }
        _ => Exited {
            started_at_ns: 0,
            finished_at_ns: exit::known_or_now(at_ns),
            code: KILLED,
            reason: "ShimDied".to_owned(),
            message: format!("killed: {why}"),
        },
    }
}

pub async fn not_ready(daemon: &Arc<Daemon>, pod: &Arc<Pod>, reason: &str) -> Result<(), Error> {
    let mut changed = false;
    pod.transition(&daemon.records, |state| {
        changed = state.phase == PodPhase::Ready;
        if changed {
            state.phase = PodPhase::NotReady {
                reason: reason.to_owned(),
            };
        }
        changed
    })
    .await?;
    if changed {
        events::of_pod(daemon, pod, What::Stopped);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_numbers_of_events_is_noticed() {
        let events = |from: u64| -> Vec<wire::Event> {
            let event = |seq| wire::Event {
                seq,
                ..Default::default()
            };
            (from..from + 3).map(event).collect()
        };
        assert!(!missed(0, &events(1)) && !missed(7, &events(8)));
        assert!(!missed(7, &[]), "nothing happened");
        assert!(missed(0, &events(2)) && missed(7, &events(1024)));
        assert!(
            !missed(9, &events(8)),
            "told once more, since it was not acknowledged"
        );
    }

    #[test]
    fn a_container_that_died_with_its_shim_is_killed_with_a_reason() {
        let dead = DeadContainer {
            id: "a".into(),
            exit_code: 137,
            oom_killed: false,
            at_ns: 5,
            failure: String::new(),
        };
        for found in [None, Some(&dead)] {
            let exit = death(found, "the pod's shim ended unexpectedly");
            assert_eq!((exit.code, exit.reason.as_str()), (137, "ShimDied"));
            assert!(exit.message.contains("shim"));
            match found {
                Some(_) => assert_eq!(exit.finished_at_ns, 5, "when it ended, not when that was noticed"),
                None => assert!(exit.finished_at_ns > 5),
            }
        }
    }

    #[test]
    fn one_whose_end_the_shim_had_seen_keeps_its_own_code() {
        let dead = DeadContainer {
            id: "a".into(),
            exit_code: 3,
            oom_killed: false,
            at_ns: 5,
            failure: String::new(),
        };
        let exit = death(Some(&dead), "x");
        assert_eq!((exit.code, exit.finished_at_ns), (3, 5));
        let failed = DeadContainer {
            exit_code: 128,
            failure: "no such device".into(),
            ..dead.clone()
        };
        assert!(death(Some(&failed), "x").message.contains("no such device"));
        let oom = DeadContainer {
            id: "a".into(),
            exit_code: 137,
            oom_killed: true,
            at_ns: 5,
            failure: String::new(),
        };
        assert_eq!(death(Some(&oom), "x").reason, "OOMKilled");
    }
}
