//! What the plugin `host-local` has reserved: a file an address, in a folder a network (its README, "Files").
//!
//! It syncs nothing. After a power cut a file may be there without the words in it, and then no DEL finds it: that address is
//! lost, and `host-local` has no GC that would find it. But an attachment never outlives a boot, whosever it was: what was
//! reserved before this one is nobody's.

use std::fs;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use serde_json::Value;

use crate::attachment::PluginConfig;

/// Where it keeps its folders when the configuration does not say.
const DATA_DIR: &str = "/var/lib/cni/networks";
/// It holds its lock while it looks for an address: milliseconds.
const LOCK: Duration = Duration::from_secs(5);

/// The folders of a network's reservations: none where others give out the addresses.
pub(crate) fn folders(network: &str, plugins: &[PluginConfig]) -> Vec<PathBuf> {
    let of = |plugin: &PluginConfig| {
        // `delegate`: the configuration of the plugin that flannel's becomes, whose addresses are `host-local`'s if it does
        // not say otherwise.
        let delegate = plugin.config.get("delegate");
        let ipam = plugin
            .config
            .get("ipam")
            .or_else(|| delegate.and_then(|d| d.get("ipam")));
        let word = |key| ipam.and_then(|i| i.get(key)).and_then(Value::as_str);
        let default = delegate.map(|_| "host-local");
        (word("type").or(default) == Some("host-local"))
            .then(|| Path::new(word("dataDir").unwrap_or(DATA_DIR)).join(network))
    };
    let mut folders: Vec<PathBuf> = plugins.iter().filter_map(of).collect();
    folders.dedup();
    folders
}

/// Removes from `folder` the reservations that are older than `boot`. One from the future stays: a clock that was set back
/// since may have made it on this boot, and an address given twice is worse than one lost. One that names a container id which is `known` stays. The addresses that were removed. Blocks.
///
/// # Errors
/// With the file that could not be read or removed; [`io::ErrorKind::TimedOut`] when the folder's lock is held.
pub(crate) fn forget(
    folder: &Path,
    boot: SystemTime,
    known: impl Fn(&str) -> bool,
) -> Result<Vec<IpAddr>, (PathBuf, io::Error)> {
    let lock = folder.join("lock");
    let held = match fs::File::open(&lock) {
        Ok(file) => file,
        // It makes that first: nothing was ever reserved here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err((lock, error)),
    };
    take(&held).map_err(|error| (lock, error))?;
    let mut gone = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| (folder.to_owned(), error))? {
        let path = entry.map_err(|error| (folder.to_owned(), error))?.path();
        let Some(address) = path.file_name().and_then(|n| n.to_str()?.parse::<IpAddr>().ok()) else {
            continue;
        };
        let stale = stale(&path, boot, &known).and_then(|stale| {
            if stale {
                fs::remove_file(&path)?;
            }
            Ok(stale)
        });
        match stale {
            Ok(true) => gone.push(address),
            Ok(false) => {}
            Err(error) => return Err((path, error)),
        }
    }
    Ok(gone)
}

fn stale(path: &Path, boot: SystemTime, known: &impl Fn(&str) -> bool) -> io::Result<bool> {
    let metadata = fs::symlink_metadata(path)?;
    let made = metadata.modified()?;
    if !metadata.is_file() || made >= boot {
        return Ok(false);
    }
    // The container id, a line break, the interface.
    let mut words = String::new();
    let read = fs::File::open(path)?.take(1024).read_to_string(&mut words);
    Ok(read.is_err() || !known(words.lines().next().unwrap_or_default().trim()))
}

fn take(lock: &fs::File) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < LOCK => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(io::ErrorKind::TimedOut.into()),
            done => return done.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(text: &str) -> PluginConfig {
        serde_json::from_str::<Value>(text)
            .map(|v| PluginConfig {
                kind: "x".into(),
                config: v.as_object().unwrap().clone(),
            })
            .unwrap()
    }

    #[test]
    fn the_folders_are_those_of_host_local_alone() {
        let of = |texts: &[&str]| {
            let plugins: Vec<_> = texts.iter().map(|t| plugin(t)).collect();
            folders("net", &plugins)
        };
        let default = PathBuf::from("/var/lib/cni/networks/net");
        let plain = of(&[r#"{"ipam":{"type":"host-local"}}"#, "{}"]);
        assert_eq!(plain, std::slice::from_ref(&default));
        assert_eq!(
            of(&[r#"{"ipam":{"type":"host-local","dataDir":"/run/ipam"}}"#]),
            [PathBuf::from("/run/ipam/net")]
        );
        assert_eq!(of(&[r#"{"delegate":{"isDefaultGateway":true}}"#]), [default]);
        assert!(
            of(&[
                r#"{"ipam":{"type":"dhcp"}}"#,
                r#"{"delegate":{"ipam":{"type":"other"}}}"#
            ])
            .is_empty()
        );
    }

    #[test]
    fn what_is_older_than_the_boot_goes_whole_or_torn_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let boot = SystemTime::now() - Duration::from_secs(100);
        assert!(forget(dir.path(), boot, |_| false).unwrap().is_empty());
        fs::write(dir.path().join("lock"), "").unwrap();
        let file = |name: &str, text: &str, age: i64| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            let age_of = Duration::from_secs(age.unsigned_abs());
            let at = if age < 0 {
                SystemTime::now() + age_of
            } else {
                SystemTime::now() - age_of
            };
            fs::File::open(&path).unwrap().set_modified(at).unwrap();
        };
        file("10.0.0.2", "", 200);
        file("10.0.0.3", "dead\r\neth0", 200);
        file("10.0.0.4", "alive\r\neth0", 200);
        file("10.0.0.5", "somebodys\r\neth0", 50);
        file("10.0.0.6", "", 50);
        file("10.0.0.7", "dead\r\neth0", -1000);
        file("fd00::2", "dead\r\neth0", 200);
        file("last_reserved_ip.0", "10.0.0.7", 200);
        let mut gone: Vec<String> = forget(dir.path(), boot, |id| id == "alive")
            .unwrap()
            .iter()
            .map(IpAddr::to_string)
            .collect();
        gone.sort();
        assert_eq!(gone, ["10.0.0.2", "10.0.0.3", "fd00::2"]);
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(
            left,
            [
                "10.0.0.4",
                "10.0.0.5",
                "10.0.0.6",
                "10.0.0.7",
                "last_reserved_ip.0",
                "lock"
            ]
        );
    }

    #[test]
    fn a_lock_that_is_held_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("lock"), "").unwrap();
        fs::write(dir.path().join("10.0.0.2"), "").unwrap();
        let held = fs::File::open(dir.path().join("lock")).unwrap();
        rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        let boot = SystemTime::now() + Duration::from_secs(60);
        let path = dir.path().to_owned();
        let other = std::thread::spawn(move || forget(&path, boot, |_| false).unwrap().len());
        std::thread::sleep(Duration::from_millis(100));
        assert!(dir.path().join("10.0.0.2").exists());
        drop(held);
        assert_eq!(other.join().unwrap(), 1);
    }
}
