//! StartContainer: lets the waiting init run its program.
//!
//! The shim has been at the making of that init since CreateContainer, and is most often done: a start is one small
//! request, which waits in the shim where it comes earlier, and tells why the container could not be made where that
//! failed. Such a container has ended, as one has whose program cannot be run, with nothing left of it; so it is for
//! whoever asks again, also when its end was heard of first.
//!
//! After a crash the shim tells what had happened: a start that still waited went with its connection, the others run.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::{Code as ShimCode, Error as ShimError, Shim, pod as wire};
use tracing::Instrument;

use super::{Container, exit, fault, stop};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::fail;
use crate::pod::Pod;
use crate::records::{ContainerPhase, ContainerState, Exited, Fault};

const VERB: &str = "StartContainer";

/// Starts a created container.
pub async fn start(daemon: &Arc<Daemon>, id: &str) -> Result<(), Error> {
    let container = daemon.registry.container(id)?;
    if container.hidden() {
        return Err(Error::NotFound {
            kind: "container",
            id: id.to_owned(),
        });
    }
    // The pod's gate comes before the container's turn, as everywhere.
    let pod = daemon.registry.pod(container.pod().as_str())?;
    let (_inside, shim) = pod.enter(VERB).await?;
    // Who deals with its end has its turn: what that end was is told all the same.
    let _turn = container
        .try_begin(VERB)
        .or_else(|busy| startable(&container).and(Err(busy)))?;
    startable(&container)?;
    fail::point("start_container.before_start").await?;
    // Before it is asked for: an end can then never seem earlier.
    let asked_at_ns = crate::time::now_ns();
    let started = match ask(&shim, container.id().as_str()).await {
        Ok(pid) => Started {
            at_ns: asked_at_ns,
            pid,
        },
        Err(source) => after_failure(daemon, &pod, &container, shim, source).await?,
    };
    fail::point("start_container.after_start").await?;
    note_started(daemon, &container, started).await?;
    fail::point("start_container.after_record").await?;
    not_failed_meanwhile(daemon, &container).await
}

/// That it waits for its start, or why it cannot be started.
fn startable(container: &Container) -> Result<(), Error> {
    if let Some(fault) = fault::standing(container) {
        return Err(not_started(container, &fault));
    }
    match container.phase() {
        ContainerPhase::Created => Ok(()),
        ContainerPhase::Exited(exited) => {
            let why = exit::why_not_started(&exited).map(str::to_owned);
            Err(why.map_or_else(
                || container.wrong_state("start it"),
                |why| Error::NotStarted { why },
            ))
        }
        _ => Err(container.wrong_state("start it")),
    }
}

/// Kills what was not to be started: a fault may have been announced while the shim was at it, and nothing else ends one that
/// is only announced. One that comes from now on is of a container that runs.
async fn not_failed_meanwhile(daemon: &Arc<Daemon>, container: &Container) -> Result<(), Error> {
    match fault::standing(container) {
        Some(fault) if !fault.kill && container.live() => {
            tracing::warn!(
                reason = fault.reason,
                "it was failed while it was started; killing it"
            );
            stop::kill(daemon, container).await?;
            Err(not_started(container, &fault))
        }
        _ => Ok(()),
    }
}

fn not_started(container: &Container, fault: &Fault) -> Error {
    let why = format!(
        "container {} was failed ({}): {}",
        container.id(),
        fault.reason,
        fault.message
    );
    Error::NotStarted { why }
}

/// That the program runs.
#[derive(Clone, Copy)]
struct Started {
    at_ns: i64,
    /// Of the container's init, on the host.
    pid: u32,
}

async fn ask(shim: &Shim, id: &str) -> Result<u32, ShimError> {
    tracing::debug!(id, "the shim is asked to start it");
    let pid = shim.start(id).await?;
    // Where a test has the answer get lost.
    let answer = fail::point("start_container.answer").await;
    answer.map(|()| pid).map_err(|_| ShimError::Timeout {
        method: "Start",
        after: Duration::ZERO,
    })
}

async fn note_started(daemon: &Daemon, container: &Container, started: Started) -> Result<(), Error> {
    let change = |state: &mut ContainerState| {
        match &mut state.phase {
            ContainerPhase::Created => {
                state.phase = ContainerPhase::Running {
                    started_at_ns: started.at_ns,
                };
            }
            // So short that its end was noted first, by a shim of an older build, which does not say when it began.
            ContainerPhase::Exited(exited) if exited.started_at_ns == 0 => {
                exited.started_at_ns = started.at_ns;
            }
            _ => return false,
        }
        state.made.pid = started.pid;
        true
    };
    let tell = || events::of_container(daemon, container, What::Started);
    container.transition_then(&daemon.records, change, tell).await
}

/// What a failed request means: the container could not be made or its program cannot be run, which is its end; or the
/// answer is missing, and the program may run all the same. Then the shim is asked what is true, now or as soon as it
/// answers again.
async fn after_failure(
    daemon: &Arc<Daemon>,
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    shim: Shim,
    source: ShimError,
) -> Result<Started, Error> {
    let unknown = unknown(&source);
    let gone = matches!(source, ShimError::Gone);
    let error = Error::Shim {
        act: "start the program",
        id: container.id().to_string(),
        source,
    };
    if gone {
        // Whoever buries the shim notes how its containers ended.
        return Err(error);
    }
    if !unknown {
        failed_to_start(daemon, container, &error).await;
        return Err(error);
    }
    match truth(&shim, container).await {
        Ok(Truth::Started(started)) => {
            tracing::warn!(
                error = error.chain(),
                "the program runs although its start was not answered"
            );
            Ok(started)
        }
        Ok(Truth::Ended(exit)) => {
            note_end(daemon, container, exit).await;
            Err(error)
        }
        Ok(Truth::Ending) => {
            // Told as created meanwhile, it would be made anew by a kubelet that looks.
            container.ended_within(ENDING).await;
            Err(error)
        }
        asked => {
            // Also one that waits still may be about to be started: the shim may have read the request just now.
            let asked = asked.err().map(|error| error.to_string());
            tracing::warn!(asked, "it is not known yet whether the program runs; asking on");
            find_out_later(daemon, pod.clone(), container.clone(), shim);
            Err(error)
        }
    }
}

/// How long a container that is ending is waited for: as long as its shim waits for its processes and streams.
const ENDING: Duration = Duration::from_secs(15);

/// Whether an error says nothing about what happened.
fn unknown(error: &ShimError) -> bool {
    match error {
        ShimError::Timeout { .. } | ShimError::Decode { .. } | ShimError::Io { .. } => true,
        // Not just created: perhaps started by a request whose answer was lost.
        ShimError::Status { code, .. } => {
            *code == ShimCode::FailedPrecondition as i32 || *code == ShimCode::Unavailable as i32
        }
        _ => false,
    }
}

/// What the shim says about a start.
enum Truth {
    /// It has begun, and perhaps ended: since when.
    Started(Started),
    /// It waits still.
    NotStarted,
    /// It has ended without having begun.
    Ended(Exited),
    /// It is ending, or gone, without having begun: whoever has ended it meanwhile sees to that.
    Ending,
}

async fn truth(shim: &Shim, container: &Container) -> Result<Truth, ShimError> {
    let info = shim.info().await?;
    let seen = info
        .containers
        .iter()
        .find(|seen| seen.id == container.id().as_str());
    Ok(match seen {
        Some(seen) if seen.started_at_ns > 0 => Truth::Started(Started {
            at_ns: seen.started_at_ns,
            pid: seen.pid,
        }),
        Some(seen) => match seen.state() {
            wire::ContainerState::Stopped => Truth::Ended(exit::seen_exit(seen)),
            wire::ContainerState::Running => Truth::Ending,
            _ => Truth::NotStarted,
        },
        None => Truth::Ending,
    })
}

/// Asks until the shim answers or is gone. An end is told by the pod's watcher, which needs no help.
fn find_out_later(daemon: &Arc<Daemon>, pod: Arc<Pod>, container: Arc<Container>, shim: Shim) {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(60);
    /// Longer than a shim takes over a start.
    const WINDOW: Duration = Duration::from_secs(60);
    let daemon = daemon.clone();
    let span = tracing::info_span!(parent: None, "start", pod = %pod.id(), container = %container.id());
    let tasks = daemon.background.clone();
    let asking = async move {
        let (mut pause, mut waiting) = (FIRST, Duration::ZERO);
        while container.phase() == ContainerPhase::Created {
            tokio::time::sleep(pause).await;
            let slept = pause;
            pause = (pause * 2).min(LONGEST);
            match truth(&shim, &container).await {
                Ok(Truth::Started(started)) => match note_started(&daemon, &container, started).await {
                    Ok(()) => {
                        if let Err(error) = not_failed_meanwhile(&daemon, &container).await {
                            tracing::warn!(error = error.chain(), "it runs, and was not to be started");
                        }
                        return;
                    }
                    Err(error) => tracing::warn!(error = error.chain(), "a late start could not be recorded"),
                },
                Ok(Truth::NotStarted) if waiting < WINDOW => waiting += slept,
                Ok(Truth::NotStarted | Truth::Ended(_) | Truth::Ending) | Err(ShimError::Gone) => return,
                Err(_) => {}
            }
        }
    };
    tasks.spawn(asking.instrument(span));
}

/// A container that could not be made, or whose program cannot be run, has exited, with the reason.
async fn failed_to_start(daemon: &Arc<Daemon>, container: &Arc<Container>, error: &Error) {
    let exit = exit::not_started(error.chain(), crate::time::now_ns());
    note_end(daemon, container, exit).await;
}

/// Notes the end of a container that has not begun. Its turn is with whoever has asked for the start.
async fn note_end(daemon: &Arc<Daemon>, container: &Arc<Container>, exit: Exited) {
    if let Err(error) = exit::note(daemon, container, exit).await {
        tracing::error!(container = %container.id(), error = error.chain(), "a failed start could not be recorded");
    }
    // What could not be made is gone already; an init may take a moment yet to die.
    if exit::settle_held(daemon, container).await.is_err() {
        exit::settle_later(daemon, container.clone());
    }
}
