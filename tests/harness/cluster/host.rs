//! What clusters change of the machine itself: settings that kubelet and we write, folders at fixed places, the chains of the
//! firewall that the `portmap` plugin shares out. The first cluster notes how all of it was, the last puts it back.
//!
//! ```text
//! /run/slipway-clusters.json   flock while read and written; the clusters that are up, and how the machine was before the
//!                              first of them, each network namespace's part for itself; gone with the last
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::FILE;
use crate::cmd::{self, sh};

const LEDGER: &str = "/run/slipway-clusters.json";

/// Written by kubelet at its start.
const SETTINGS: [&str; 6] = [
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// Written by us and by the `bridge` plugin; each network namespace has its own.
const SETTINGS_OF_A_NETWORK: [&str; 1] = ["net/ipv4/ip_forward"];

/// kubelet's folders that are where they are whatever its root is, the inner ones first.
const FOLDERS: [&str; 3] = [
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet",
    "/var/log/containers",
];

/// Chains of the table `nat` that `portmap` makes once and never removes.
const CHAINS: [&str; 3] = ["CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK"];

/// Settings by their path below /proc/sys.
type Settings = BTreeMap<String, String>;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Ledger {
    /// The directory of each cluster that is up, and the network namespace that its first node is in.
    clusters: BTreeMap<PathBuf, String>,
    settings: Settings,
    /// Those of [`FOLDERS`] that were not there.
    no_folders: Vec<PathBuf>,
    networks: BTreeMap<String, Network>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Network {
    settings: Settings,
    /// Those of [`CHAINS`] that were not there.
    no_chains: Vec<String>,
}

/// Notes how the machine is, unless another cluster did, before the cluster in `dir` changes anything.
///
/// # Errors
/// The note could not be written: nothing was changed.
pub fn enter(dir: &Path) -> Result<()> {
    let (mut file, mut ledger) = open(true)?.context("the ledger was not made")?;
    if ledger.clusters.is_empty() {
        ledger.settings = read_settings(&SETTINGS);
        ledger.no_folders = FOLDERS
            .iter()
            .map(PathBuf::from)
            .filter(|f| !f.exists())
            .collect();
    }
    let network = network()?;
    if !ledger.networks.contains_key(&network) {
        let there = chains()?;
        let found = Network {
            settings: read_settings(&SETTINGS_OF_A_NETWORK),
            no_chains: CHAINS
                .iter()
                .filter(|c| !there.contains(&format!(":{c} ")))
                .map(|c| (*c).to_owned())
                .collect(),
        };
        ledger.networks.insert(network.clone(), found);
    }
    ledger.clusters.insert(dir.to_owned(), network);
    write(&mut file, &ledger)
}

/// Puts back what no other cluster needs, once nothing of the cluster in `dir` runs any more; what it could not. Silent about
/// a cluster that is not in the ledger.
///
/// # Errors
/// The ledger cannot be read or written.
pub fn leave(dir: &Path) -> Result<Vec<String>> {
    let Some((mut file, mut ledger)) = open(false)? else {
        return Ok(Vec::new());
    };
    let mut wrong = Vec::new();
    if let Some(network) = ledger.clusters.remove(dir)
        && !ledger.clusters.values().any(|n| *n == network)
        && let Some(found) = ledger.networks.remove(&network)
        // From anywhere else it would be another network's.
        && network == self::network()?
    {
        write_settings(&found.settings, &mut wrong);
        if let Err(e) = remove_chains(&found.no_chains) {
            wrong.push(format!("{e:#}"));
        }
    }
    if ledger.clusters.is_empty() {
        write_settings(&ledger.settings, &mut wrong);
        remove_folders(&ledger.no_folders, &mut wrong);
        std::fs::remove_file(LEDGER).with_context(|| format!("removing {LEDGER}"))?;
    } else {
        write(&mut file, &ledger)?;
    }
    Ok(wrong)
}

/// The ledger, locked, without the clusters whose directories are gone; `None`: there is none, and none is to be made.
fn open(make: bool) -> Result<Option<(File, Ledger)>> {
    let what = || format!("opening {LEDGER}");
    loop {
        let opened = File::options()
            .read(true)
            .write(true)
            .create(make)
            .truncate(false)
            .open(LEDGER);
        let mut file = match opened {
            Err(e) if !make && e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.with_context(what)?,
        };
        file.lock().with_context(what)?;
        // Whoever had the lock before may have been the last, and removed it.
        let same = std::fs::metadata(LEDGER).is_ok_and(|m| {
            file.metadata()
                .is_ok_and(|f| (f.dev(), f.ino()) == (m.dev(), m.ino()))
        });
        if !same {
            continue;
        }
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(what)?;
        let mut ledger: Ledger = if text.is_empty() {
            Ledger::default()
        } else {
            serde_json::from_str(&text).with_context(what)?
        };
        ledger.clusters.retain(|dir, _| dir.join(FILE).exists());
        let live: Vec<&String> = ledger.clusters.values().collect();
        ledger.networks.retain(|network, _| live.contains(&network));
        return Ok(Some((file, ledger)));
    }
}

fn write(file: &mut File, ledger: &Ledger) -> Result<()> {
    let text = serde_json::to_vec_pretty(ledger)?;
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(&text))
        .with_context(|| format!("writing {LEDGER}"))
}

/// The network namespace that this process is in.
fn network() -> Result<String> {
    let link = std::fs::read_link("/proc/thread-self/ns/net").context("reading /proc/thread-self/ns/net")?;
    Ok(link.display().to_string())
}

fn read_settings(names: &[&str]) -> Settings {
    let read = |name: &&str| {
        let text = std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
        Some(((*name).to_owned(), text.trim().to_owned()))
    };
    names.iter().filter_map(read).collect()
}

fn write_settings(settings: &Settings, wrong: &mut Vec<String>) {
    for (name, value) in settings {
        let path = Path::new("/proc/sys").join(name);
        if std::fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
            continue;
        }
        if let Err(e) = std::fs::write(&path, value) {
            wrong.push(format!("writing {value} to {}: {e}", path.display()));
        }
    }
}

/// What `iptables-save` says of the table `nat`.
fn chains() -> Result<String> {
    let mut save = cmd::command("iptables-save", ["-t", "nat"]);
    let o = cmd::run(&mut save, std::time::Duration::from_secs(10))?;
    Ok(o.ok().context("iptables-save -t nat")?.stdout)
}

/// Removes those chains with the rules that lead into them, all at once, unless somebody's ports are in them.
fn remove_chains(names: &[String]) -> Result<()> {
    let there = chains()?;
    let names: Vec<&String> = names
        .iter()
        .filter(|n| there.contains(&format!(":{n} ")))
        .collect();
    if names.is_empty() || there.contains("-A CNI-HOSTPORT-DNAT ") {
        return Ok(());
    }
    let leads = |rule: &str| names.iter().any(|n| rule.ends_with(&format!("-j {n}")));
    let mut change = "*nat\n".to_owned();
    for rule in there.lines().filter(|l| leads(l)) {
        change.push_str(&rule.replacen("-A ", "-D ", 1));
        change.push('\n');
    }
    // Their own rules are the same whoever has ports; those of the pods are in the first, which has to be empty.
    for name in names.iter().filter(|n| !n.ends_with("-DNAT")) {
        change.push_str(&format!("-F {name}\n"));
    }
    for name in &names {
        change.push_str(&format!("-X {name}\n"));
    }
    change.push_str("COMMIT\n");
    sh(&format!("iptables-restore -w -n <<'END'\n{change}END")).context("removing the chains of portmap")?;
    Ok(())
}

fn remove_folders(folders: &[PathBuf], wrong: &mut Vec<String>) {
    for folder in FOLDERS.map(Path::new) {
        if !folders.iter().any(|f| f == folder) || mounted_by_somebody(folder) {
            continue;
        }
        match std::fs::remove_dir(folder) {
            Err(e)
                if !matches!(
                    e.kind(),
                    // Somebody else's by now.
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                wrong.push(format!("removing {}: {e}", folder.display()));
            }
            _ => {}
        }
    }
}

/// Whether a process, in whatever mount namespace, has a mount there: removing the folder would take it from it.
fn mounted_by_somebody(folder: &Path) -> bool {
    let at = format!(" {} ", folder.display());
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| std::fs::read_to_string(e.path().join("mountinfo")).ok())
        .any(|info| info.contains(&at))
}
