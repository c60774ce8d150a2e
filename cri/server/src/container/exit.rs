//! What follows a container's end: it is noted (disk first), the shim is allowed to forget it, its rootfs is unmounted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use slipway_shim_client::Shim;
use slipway_shim_client::pod as wire;
use tracing::Instrument;

use super::Container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::pod::Pod;
use crate::records::{ContainerPhase, ContainerState, Exited};

/// What kubelet shows of a container whose program never ran; 128 as containerd and Docker.
const NOT_STARTED: (i32, &str) = (128, "StartError");

/// The end of a container whose program never ran, and why.
pub fn not_started(message: String, at_ns: i64) -> Exited {
    let (code, reason) = NOT_STARTED;
    Exited {
        started_at_ns: 0,
        finished_at_ns: known_or_now(at_ns),
        code,
        reason: reason.to_owned(),
        message,
    }
}

/// Why its program never ran, where that is how a container ended.
pub fn why_not_started(exited: &Exited) -> Option<&str> {
    let never = (exited.code, exited.reason.as_str()) == NOT_STARTED && exited.started_at_ns == 0;
    never.then_some(&exited.message)
}

/// How a container ended as its shim tells it, with why it could not be created if it could not.
pub fn told(id: &str, code: u32, at_ns: i64, oom_killed: bool, failure: &str) -> Exited {
    if failure.is_empty() {
        return ended(i32::try_from(code).unwrap_or(i32::MAX), at_ns, oom_killed);
    }
    // As StartContainer words it.
    not_started(format!("cannot start the program of {id}: {failure}"), at_ns)
}

/// An ordinary end, in the words that kubelet knows.
pub fn ended(code: i32, at_ns: i64, oom_killed: bool) -> Exited {
    let reason = match (oom_killed, code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    Exited {
        started_at_ns: 0,
        finished_at_ns: known_or_now(at_ns),
        code,
        reason: reason.to_owned(),
        message: String::new(),
    }
}

/// A time that the shim told, or now when it could not.
pub fn known_or_now(at_ns: i64) -> i64 {
    if at_ns > 0 { at_ns } else { crate::time::now_ns() }
}

/// Notes an end; one that is noted already stays as it is. That of a container that is still being created is kept for
/// CreateContainer, in memory: after a crash there is nothing to keep it for.
pub async fn note(daemon: &Daemon, container: &Container, exit: Exited) -> Result<(), Error> {
    let unheard_start = AtomicBool::new(false);
    let change = |state: &mut ContainerState| {
        if state.phase == ContainerPhase::Creating {
            container.set_early_exit(exit);
            return false;
        }
        let exit = match &state.fault {
            Some(fault) => fault.told(exit),
            None => exit,
        };
        match state.phase.after_exit(exit) {
            Some(phase) => {
                let before = std::mem::replace(&mut state.phase, phase);
                // So short that StartContainer has not noted its start yet.
                let began = matches!(&state.phase, ContainerPhase::Exited(exit) if exit.started_at_ns > 0);
                unheard_start.store(began && before == ContainerPhase::Created, Ordering::Relaxed);
                true
            }
            None => false,
        }
    };
    let tell = || {
        if unheard_start.load(Ordering::Relaxed) {
            events::of_container(daemon, container, What::Started);
        }
        events::of_container(daemon, container, What::Stopped);
    };
    container.transition_then(&daemon.records, change, tell).await
}

/// Notes the ends of all containers of a pod that its shim has seen end.
pub async fn collect(daemon: &Daemon, pod: &Pod, shim: &Shim) -> Result<(), Error> {
    let info = shim
        .info()
        .await
        .map_err(Error::shim("ask for the state", pod.id()))?;
    for seen in &info.containers {
        if seen.state() != wire::ContainerState::Stopped {
            continue;
        }
        if let Ok(container) = daemon.registry.container(&seen.id) {
            note(daemon, &container, seen_exit(seen)).await?;
        }
    }
    Ok(())
}

/// The end of a container as the shim keeps it.
pub fn seen_exit(seen: &wire::Container) -> Exited {
    Exited {
        started_at_ns: seen.started_at_ns,
        ..told(
            &seen.id,
            seen.exit_code,
            seen.exited_at_ns,
            seen.oom_killed,
            &seen.failure,
        )
    }
}

/// The end of a container as an event of its shim tells it. An event is told some time after the end: nothing of the
/// container runs then, and all it said is written. Only that time is known of a shim of an older build.
pub fn told_exit(id: &str, event_ns: i64, exit: &wire::Exit) -> Exited {
    let at_ns = match exit.exited_at_ns {
        0 => event_ns,
        at_ns => at_ns,
    };
    Exited {
        started_at_ns: exit.started_at_ns,
        ..told(id, exit.exit_code, at_ns, exit.oom_killed, &exit.failure)
    }
}

/// Settles in the background: whoever told of the exit goes on.
pub fn settle_later(daemon: &Arc<Daemon>, container: Arc<Container>) {
    let daemon = daemon.clone();
    let span = tracing::info_span!(parent: None, "settle", container = %container.id());
    let tasks = daemon.background.clone();
    tasks.spawn(
        async move {
            if let Err(error) = settle(&daemon, &container).await {
                tracing::warn!(
                    error = error.chain(),
                    "what an exited container held is not all released yet"
                );
            }
        }
        .instrument(span),
    );
}

/// Settles every ended container of a pod.
pub async fn settle_all(daemon: &Arc<Daemon>, pod: &Pod) -> Result<(), Error> {
    for container in daemon.registry.containers_of(pod.id()) {
        settle(daemon, &container).await?;
    }
    Ok(())
}

/// Acknowledges a noted end to the shim and unmounts the rootfs. Idempotent; nothing to do for one that lives.
pub async fn settle(daemon: &Arc<Daemon>, container: &Container) -> Result<(), Error> {
    if !matches!(container.phase(), ContainerPhase::Exited(_)) {
        return Ok(());
    }
    let _turn = container.begin("settling its exit").await?;
    settle_held(daemon, container).await
}

/// The same for whoever has the turn already.
pub async fn settle_held(daemon: &Arc<Daemon>, container: &Container) -> Result<(), Error> {
    if container.settled() {
        return Ok(());
    }
    forget(daemon, container).await?;
    tracing::debug!("the shim has forgotten it");
    let bundle = daemon.bundle(container.id());
    crate::blocking::run(move || bundle.unmount()).await?;
    tracing::debug!("its rootfs is unmounted");
    container.set_settled();
    Ok(())
}

/// Has the shim forget an ended container, its cgroup with it. Not there, or no shim: fine.
async fn forget(daemon: &Daemon, container: &Container) -> Result<(), Error> {
    let shim = daemon
        .registry
        .pod(container.pod().as_str())
        .ok()
        .and_then(|pod| pod.shim());
    let Some(shim) = shim else { return Ok(()) };
    match shim.delete(container.id().as_str()).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() || matches!(error, slipway_shim_client::Error::Gone) => Ok(()),
        Err(source) => Err(Error::Shim {
            act: "delete the task",
            id: container.id().to_string(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_creation_that_failed_is_told_from_an_end() {
        let failed = told("c", 128, 7, false, "create container c: no such device");
        assert_eq!((failed.code, failed.reason.as_str()), (128, "StartError"));
        assert_eq!(failed.finished_at_ns, 7);
        let why = why_not_started(&failed);
        assert!(
            why.is_some_and(|why| why.ends_with("c: no such device")),
            "{why:?}"
        );
        let ended = told("c", 128, 7, false, "");
        assert_eq!((why_not_started(&ended), ended.reason.as_str()), (None, "Error"));
    }

    #[test]
    fn an_end_has_its_own_time_and_that_of_its_telling_where_an_older_shim_says_no_other() {
        let mut exit = wire::Exit {
            exited_at_ns: 5,
            started_at_ns: 3,
            ..Default::default()
        };
        let told = told_exit("c", 9, &exit);
        assert_eq!((told.started_at_ns, told.finished_at_ns), (3, 5));
        (exit.exited_at_ns, exit.started_at_ns) = (0, 0);
        let told = told_exit("c", 9, &exit);
        assert_eq!((told.started_at_ns, told.finished_at_ns), (0, 9));
    }

    #[test]
    fn reasons_are_those_kubelet_knows() {
        assert_eq!(ended(0, 1, false).reason, "Completed");
        assert_eq!(ended(3, 1, false).reason, "Error");
        assert_eq!(ended(137, 1, true).reason, "OOMKilled");
        assert!(
            ended(0, 0, false).finished_at_ns > 0,
            "a time that is not known is now"
        );
    }
}
