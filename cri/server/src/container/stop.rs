//! StopContainer: the stop signal, the grace period, SIGKILL. Several at once are fine: each sends its own signals and
//! waits for the one end, so that a later one with less patience is not held up by an earlier one with more.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::{Error as ShimError, Shim, pod as wire};

use super::{Container, exit, fault};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::op::Held;
use crate::records::ContainerPhase;

const VERB: &str = "StopContainer";
const SIGKILL: u32 = 9;
/// How long the end of a killed process is waited for, each time.
const DEATH: Duration = Duration::from_secs(10);

/// Stops a container. One that has ended or is gone is fine.
pub async fn stop(daemon: &Arc<Daemon>, id: &str, grace: Duration) -> Result<(), Error> {
    let container = match daemon.registry.container(id) {
        Ok(container) if container.hidden() => return Ok(()),
        Ok(container) => container,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    if container.phase() == ContainerPhase::Created {
        // A start may be in progress: what comes after it is what gets stopped.
        drop(begin(daemon, &container, VERB).await?);
    }
    if container.live() {
        end(daemon, &container, grace).await?;
    }
    exit::settle(daemon, &container).await
}

/// Takes the container's turn to end it. A start that waits for the container to be made is not waited for: the making is
/// given up.
pub async fn begin(daemon: &Daemon, container: &Container, verb: &'static str) -> Result<Held, Error> {
    if let Ok(held) = container.try_begin(verb) {
        return Ok(held);
    }
    let pod = daemon.registry.pod(container.pod().as_str()).ok();
    if container.phase() == ContainerPhase::Created
        && let Some(shim) = pod.and_then(|pod| pod.shim())
        && let Ok(info) = shim.info().await
        && info
            .containers
            .iter()
            .any(|seen| seen.id == container.id().as_str() && seen.state() == wire::ContainerState::Creating)
    {
        // Not a signal, which would reach a program that has been started since: that one is not deleted.
        let given_up = shim.delete(container.id().as_str()).await;
        tracing::info!(container = %container.id(), ?given_up, "its creation is given up");
    }
    container.begin(verb).await
}

/// Ends a live container and waits until its end is noted.
pub async fn end(daemon: &Arc<Daemon>, container: &Container, grace: Duration) -> Result<(), Error> {
    let pod = daemon.registry.pod(container.pod().as_str())?;
    let Some(shim) = pod.shim() else {
        // Its shim died: whoever buries it notes the end.
        return wait(container).await;
    };
    // What is failed is not asked to end: its answer could look like success.
    let grace = match fault::standing(container) {
        Some(_) => Duration::ZERO,
        None => grace,
    };
    let running = matches!(container.phase(), ContainerPhase::Running { .. });
    if running && !grace.is_zero() {
        signal(&shim, container, stop_signal(container), false).await?;
        if container.ended_within(grace).await {
            return Ok(());
        }
        tracing::info!(container = %container.id(), grace = grace.as_secs(), "did not end in time; killing it");
    }
    signal(&shim, container, SIGKILL, false).await?;
    if container.ended_within(DEATH).await {
        return Ok(());
    }
    // Something in it holds on: everything in its cgroup, then.
    signal(&shim, container, SIGKILL, true).await?;
    wait(container).await
}

/// Kills everything in a live container, at once, and waits until its end is noted.
pub async fn kill(daemon: &Arc<Daemon>, container: &Container) -> Result<(), Error> {
    let pod = daemon.registry.pod(container.pod().as_str())?;
    // Without a shim, whoever buries it notes the end.
    if let Some(shim) = pod.shim() {
        signal(&shim, container, SIGKILL, true).await?;
    }
    wait(container).await
}

async fn wait(container: &Container) -> Result<(), Error> {
    if container.ended_within(DEATH).await {
        return Ok(());
    }
    Err(Error::Timeout {
        kind: "container",
        id: container.id().to_string(),
        what: "end after SIGKILL",
        timeout: DEATH,
    })
}

/// Signals; one that has ended meanwhile, or whose shim has, needs none.
async fn signal(shim: &Shim, container: &Container, number: u32, all: bool) -> Result<(), Error> {
    match shim.kill(container.id().as_str(), number, all).await {
        Ok(()) | Err(ShimError::Gone) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(source) => Err(Error::Shim {
            act: "signal the processes",
            id: container.id().to_string(),
            source,
        }),
    }
}

fn stop_signal(container: &Container) -> u32 {
    let name = container.state().made.stop_signal;
    slipway_spec::signal::parse(&name)
        .unwrap_or_else(slipway_spec::signal::Signal::term)
        .number
}
