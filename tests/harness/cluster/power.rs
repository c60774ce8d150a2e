//! A node that loses its power, as far as one can on a machine that keeps its own: everything that runs on the node ends
//! at once, and what a boot starts without (state, mounts, cgroups, the pods' links and firewall rules) is gone. What lies on the disk stays.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::Cluster;
use crate::{cmd, leftovers};

impl Cluster {
    /// Cuts node `n`'s power: kubelet, runtime, shims and containers are killed and nothing is told. What
    /// [`Cluster::start_runtime`] and [`Cluster::start_kubelet`] start then is on another boot.
    ///
    /// # Errors
    /// Node 1, which is the machine itself; a process that does not end, a thing that cannot be removed.
    pub fn cut_power(&self, n: usize) -> Result<()> {
        let Some(netns) = self.net().netns(n) else {
            bail!("node{n} is the machine itself");
        };
        let (kubelet, runtime) = (format!("kubelet{n}"), self.runtime(n));
        for name in [&runtime, &kubelet] {
            self.processes().signal(name, Signal::KILL);
        }
        let state = self.node_dir(n).join("state");
        let shims = leftovers::processes_naming(&state);
        kill(shims.into_iter().map(|(pid, _)| pid));
        let began = Instant::now();
        loop {
            let left = self.inhabitants(n)?;
            if left.is_empty() {
                break;
            }
            if began.elapsed() > Duration::from_secs(20) {
                bail!("processes of node{n} survive SIGKILL: {left:?}");
            }
            kill(left);
            std::thread::sleep(Duration::from_millis(20));
        }
        for name in [&runtime, &kubelet] {
            self.processes().end(name, Duration::from_secs(5))?;
        }
        let mut mounts = leftovers::mounts_under(&self.node_dir(n));
        mounts.reverse();
        for m in mounts {
            cmd::sh(&format!("umount -l '{m}'"))?;
        }
        std::fs::remove_dir_all(&state).with_context(|| format!("removing {}", state.display()))?;
        std::fs::create_dir_all(&state)?;
        for top in self.node_cgroups(n)? {
            cmd::sh(&format!(
                "find '{}' -mindepth 1 -depth -type d -exec rmdir {{}} +",
                top.display()
            ))?;
        }
        cmd::sh(&format!(
            "nsenter --net=/run/netns/{netns} sh -ec 'iptables -w -t nat -F; iptables -w -t nat -X; ip link del {} || true'",
            self.net().bridge(n)
        ))?;
        let boot = format!("{netns} {:?}\n", std::time::SystemTime::now());
        std::fs::write(self.boot_id(n), boot)?;
        Ok(())
    }

    /// Where node `n`'s boot is told to its runtime once it is not the machine's.
    pub(super) fn boot_id(&self, n: usize) -> PathBuf {
        self.node_dir(n).join("boot_id")
    }

    fn node_cgroups(&self, n: usize) -> Result<Vec<PathBuf>> {
        let of_node = |top: PathBuf| top.join(&self.net().name).join(format!("node{n}"));
        Ok(self.cgroup_tops()?.into_iter().map(of_node).collect())
    }

    /// The processes in node `n`'s cgroups.
    fn inhabitants(&self, n: usize) -> Result<BTreeSet<u32>> {
        let mut found = BTreeSet::new();
        for top in self.node_cgroups(n)? {
            collect(&top, &mut found);
        }
        Ok(found)
    }
}

fn collect(dir: &Path, found: &mut BTreeSet<u32>) {
    let pids = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    found.extend(pids.lines().filter_map(|pid| pid.parse::<u32>().ok()));
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if e.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&e.path(), found);
        }
    }
}

fn kill(pids: impl IntoIterator<Item = u32>) {
    for pid in pids
        .into_iter()
        .filter_map(|pid| Pid::from_raw(pid.cast_signed()))
    {
        let _ = kill_process(pid, Signal::KILL);
    }
}
