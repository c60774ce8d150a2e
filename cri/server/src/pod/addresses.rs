//! Addresses that were reserved on an earlier boot: let go of once a boot and network, when slipwayd first sees that network.
//!
//! Once, since a clock that is set later moves the moment when this boot seems to have begun. A file in the state directory,
//! which a reboot empties, says what was done: a line `<boot id> <network>` each.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::config::BOOT_ID_FILE;
use crate::daemon::Daemon;
use crate::error::Error;

/// Has the second in which the machine was booted, by the clock as it is set now (proc(5), `btime`).
const STAT: &str = "/proc/stat";

/// Lets go of what `network`, the configured one, has reserved since an earlier boot, if that was not done yet.
pub async fn forget(daemon: &Arc<Daemon>, network: &str) -> Result<(), Error> {
    let done = daemon.paths.state.join("addresses");
    let line = format!("{} {network}", daemon.boot_id);
    let before = read(&done)?;
    if before.lines().any(|l| l == line) {
        return Ok(());
    }
    let daemon = daemon.clone();
    let gone = crate::blocking::run(move || {
        let boot = boot_began(&daemon.config.boot_id_file)?;
        let alive = alive(&daemon);
        let gone = daemon
            .cni
            .forget_before(boot, |id| alive.contains(id))
            .map_err(|source| Error::OldAddresses {
                source: Box::new(source),
            })?;
        let now = format!("{before}{line}\n");
        std::fs::write(&done, now).map_err(Error::io("write", &done))?;
        Ok(gone)
    })
    .await?;
    if !gone.is_empty() {
        let count = gone.len();
        tracing::info!(network, count, first = %gone[0], "let go of addresses that were reserved before this boot");
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, Error> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(Error::io("read", path)),
    }
}

/// The pods that there are, those whose records cannot be read, and those that a DEL is still due for: whose address goes with it.
fn alive(daemon: &Daemon) -> HashSet<String> {
    let pods = daemon.registry.pods();
    let unreadable = daemon.registry.unreadable();
    let unreadable = unreadable.iter().map(|(id, _)| id.to_owned());
    let releases = daemon
        .releases
        .all()
        .into_iter()
        .map(|release| release.pod.to_string());
    pods.iter()
        .map(|pod| pod.id().to_string())
        .chain(unreadable)
        .chain(releases)
        .collect()
}

/// When this boot began: by the kernel's word, or when the file that stands for its id was made.
fn boot_began(boot_id_file: &Path) -> Result<SystemTime, Error> {
    if boot_id_file != Path::new(BOOT_ID_FILE) {
        let made = std::fs::metadata(boot_id_file).and_then(|m| m.modified());
        return made.map_err(Error::io("read", boot_id_file));
    }
    let stat = std::fs::read_to_string(STAT).map_err(Error::io("read", STAT))?;
    let seconds = stat
        .lines()
        .find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok());
    let seconds = seconds.ok_or_else(|| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "it has no btime");
        Error::io("read", STAT)(source)
    })?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}
