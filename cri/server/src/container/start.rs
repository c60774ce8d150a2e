//! StartContainer: lets the waiting init run its program.
//!
//! The init was made by CreateContainer, so that a start is one small request and a crash between the two leaves
//! something the shim can tell about: CREATED or RUNNING, never in between.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::{Code as ShimCode, Error as ShimError, Shim};
use tracing::Instrument;

use super::{Container, exit};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::fail;
use crate::pod::Pod;
use crate::records::{ContainerPhase, Exited};

const VERB: &str = "StartContainer";
/// What kubelet shows for a program that could not be run; 128 as containerd and Docker.
const NOT_STARTED: i32 = 128;

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
    let _turn = container.try_begin(VERB)?;
    if container.phase() != ContainerPhase::Created {
        return Err(container.wrong_state("start it"));
    }
    fail::point("start_container.before_start").await?;
    // Before it is asked for: an end can then never seem earlier.
    let asked_at_ns = crate::time::now_ns();
    let started_at_ns = match ask(&shim, container.id().as_str()).await {
        Ok(()) => asked_at_ns,
        Err(source) => after_failure(daemon, &pod, &container, shim, source).await?,
    };
    fail::point("start_container.after_start").await?;
    note_started(daemon, &container, started_at_ns).await?;
    events::of_container(daemon, &container, What::Started);
    fail::point("start_container.after_record").await?;
    Ok(())
}

async fn ask(shim: &Shim, id: &str) -> Result<(), ShimError> {
    shim.start(id).await?;
    // Where a test has the answer get lost.
    fail::point("start_container.answer")
        .await
        .map_err(|_| ShimError::Timeout {
            method: "Start",
            after: Duration::ZERO,
        })
}

async fn note_started(daemon: &Daemon, container: &Container, started_at_ns: i64) -> Result<(), Error> {
    container
        .transition(&daemon.records, |state| match &mut state.phase {
            ContainerPhase::Created => {
                state.phase = ContainerPhase::Running { started_at_ns };
                true
            }
            // So short that its end was noted first.
            ContainerPhase::Exited(exited) if exited.started_at_ns == 0 => {
                exited.started_at_ns = started_at_ns;
                true
            }
            _ => false,
        })
        .await
}

/// What a failed request means: the program cannot be run, which is the container's end; or the answer is missing, and
/// the program may run all the same. Then the shim is asked what is true, now or as soon as it answers again.
async fn after_failure(
    daemon: &Arc<Daemon>,
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    shim: Shim,
    source: ShimError,
) -> Result<i64, Error> {
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
        Ok(Truth::Started(at_ns)) => {
            tracing::warn!(
                error = error.chain(),
                "the program runs although its start was not answered"
            );
            Ok(at_ns)
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
    Started(i64),
    /// It waits still.
    NotStarted,
}

async fn truth(shim: &Shim, container: &Container) -> Result<Truth, ShimError> {
    let info = shim.info().await?;
    let seen = info
        .containers
        .iter()
        .find(|seen| seen.id == container.id().as_str());
    Ok(match seen {
        Some(seen) if seen.started_at_ns > 0 => Truth::Started(seen.started_at_ns),
        _ => Truth::NotStarted,
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
                Ok(Truth::Started(at_ns)) => match note_started(&daemon, &container, at_ns).await {
                    Ok(()) => return,
                    Err(error) => tracing::warn!(error = error.chain(), "a late start could not be recorded"),
                },
                Ok(Truth::NotStarted) if waiting < WINDOW => waiting += slept,
                Ok(Truth::NotStarted) | Err(ShimError::Gone) => return,
                Err(_) => {}
            }
        }
    };
    tasks.spawn(asking.instrument(span));
}

/// A container whose program cannot be run has exited, with the reason.
async fn failed_to_start(daemon: &Arc<Daemon>, container: &Arc<Container>, error: &Error) {
    let exit = Exited {
        started_at_ns: 0,
        finished_at_ns: crate::time::now_ns(),
        code: NOT_STARTED,
        reason: "StartError".to_owned(),
        message: error.chain(),
    };
    if let Err(error) = exit::note(daemon, container, exit).await {
        tracing::error!(container = %container.id(), error = error.chain(), "a failed start could not be recorded");
    }
    exit::settle_later(daemon, container.clone());
}
