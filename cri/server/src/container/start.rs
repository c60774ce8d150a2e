//! StartContainer: lets the waiting init run its program.
//!
//! The init was made by CreateContainer, so that a start is one small request and a crash between the two leaves
//! something the shim can tell about: CREATED or RUNNING, never in between.

use std::sync::Arc;

use super::exit;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;
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
    let started_at_ns = crate::time::now_ns();
    if let Err(source) = shim.start(container.id().as_str()).await {
        let error = Error::Shim {
            act: "start the program",
            id: container.id().to_string(),
            source,
        };
        failed_to_start(daemon, &container, &error).await;
        return Err(error);
    }
    fail::point("start_container.after_start").await?;
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
        .await?;
    fail::point("start_container.after_record").await?;
    Ok(())
}

/// A container whose program cannot be run has exited, with the reason.
async fn failed_to_start(daemon: &Arc<Daemon>, container: &Arc<super::Container>, error: &Error) {
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
