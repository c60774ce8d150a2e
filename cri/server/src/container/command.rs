//! What every command run in a container has: an id of its own, pipes its user may open, and an end when whoever asked for
//! it goes away.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::Uid;
use rustix::pipe::PipeFlags;
use slipway_shim_client::Shim;

use super::Container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::model::UserNamespace;
use crate::records::ContainerPhase;

/// A container that runs, and the shim that runs it.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::State`] when it does not run, naming the verb.
pub fn running(
    daemon: &Daemon,
    id: &str,
    verb: &'static str,
) -> Result<(Arc<Container>, Shim, Owner), Error> {
    let container = daemon.registry.container(id)?;
    if !matches!(container.phase(), ContainerPhase::Running { .. }) {
        return Err(container.wrong_state(verb));
    }
    let pod = daemon.registry.pod(container.pod().as_str())?;
    let shim = pod.live_shim(verb)?;
    let uid = container.state().made.uid;
    let owner = Owner::of(uid, pod.record().config.namespaces.user.as_ref());
    Ok((container, shim, owner))
}

/// The user a command runs as, as the host sees it: a program that is not root could not open /dev/stdout otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner(u32);

impl Owner {
    fn of(uid: u32, namespace: Option<&UserNamespace>) -> Owner {
        let Some(namespace) = namespace else {
            return Owner(uid);
        };
        let host = namespace.uids.iter().find_map(|map| {
            let inside = uid.checked_sub(map.container)?;
            (inside < map.length).then(|| map.host.checked_add(inside))?
        });
        Owner(host.unwrap_or(uid))
    }

    /// A pipe: the end that is read, the end that is written.
    ///
    /// # Errors
    /// When the kernel has none to give.
    pub fn pipe(self) -> Result<(OwnedFd, OwnedFd), Error> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .map_err(Error::io("make", "a pipe"))?;
        if self.0 != 0 {
            // Without it most programs run all the same.
            let _ = rustix::fs::fchown(&writer, Some(Uid::from_raw(self.0)), None);
        }
        Ok((reader, writer))
    }
}

/// Ends a command, with what it started, when whoever asked for it goes away.
pub struct Killer {
    shim: Shim,
    container: String,
    exec: String,
    armed: bool,
}

impl Killer {
    pub fn new(shim: &Shim, container: &Container, exec: &str) -> Killer {
        Killer {
            shim: shim.clone(),
            container: container.id().to_string(),
            exec: exec.to_owned(),
            armed: true,
        }
    }

    /// The command has ended.
    pub fn disarm(&mut self) {
        self.armed = false;
    }

    /// Kills it now.
    pub async fn kill(&mut self) {
        self.armed = false;
        kill(&self.shim, &self.container, &self.exec).await;
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let (shim, container, exec) = (self.shim.clone(), self.container.clone(), self.exec.clone());
        // Without a runtime slipwayd is ending, and the shim does it when our connection ends.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { kill(&shim, &container, &exec).await });
        }
    }
}

async fn kill(shim: &Shim, container: &str, exec: &str) {
    if let Err(error) = shim.kill_exec_tree(container, exec).await
        && !error.is_not_found()
    {
        tracing::warn!(container, exec, %error, "the command of a caller that went away was not killed");
    }
}

/// Unique among the commands of a container, also after a restart.
pub fn next_id(kind: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "{kind}-{:x}-{}",
        crate::time::now_ns(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_spec::IdMap;

    #[test]
    fn a_pipe_belongs_to_the_user_as_the_host_sees_it() {
        let map = IdMap {
            container: 0,
            host: 100_000,
            length: 65_536,
        };
        let namespace = UserNamespace {
            uids: vec![map],
            gids: vec![map],
        };
        assert_eq!(Owner::of(1000, None), Owner(1000));
        assert_eq!(Owner::of(1000, Some(&namespace)), Owner(101_000));
        assert_eq!(Owner::of(0, Some(&namespace)), Owner(100_000));
    }
}
