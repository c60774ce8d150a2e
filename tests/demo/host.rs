//! What the host looks like from outside: the things a runtime makes, listed so that two moments can be compared.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use harness::cmd;

/// Mounts, namespaces, links, firewall rules, cgroups: one moment of the host.
pub struct Picture(BTreeSet<String>);

impl Picture {
    /// Looks around.
    pub fn take() -> Picture {
        let mut seen = BTreeSet::new();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        seen.extend(
            mounts
                .lines()
                .filter_map(|l| l.split(' ').nth(4))
                .map(|m| format!("mount {m}")),
        );
        seen.extend(
            names("/run/netns")
                .into_iter()
                .map(|n| format!("network namespace {n}")),
        );
        seen.extend(
            names("/sys/class/net")
                .into_iter()
                .map(|n| format!("network link {n}")),
        );
        for tool in ["iptables-save", "ip6tables-save"] {
            let rules = cmd::run(&mut cmd::command(tool, [] as [&str; 0]), Duration::from_secs(10));
            let rules = rules.map(|o| o.stdout).unwrap_or_default();
            seen.extend(
                rules
                    .lines()
                    .filter(|l| l.starts_with("-A") || l.starts_with(":CNI"))
                    .map(|l| {
                        // A chain's counters are no part of what it is.
                        format!("{tool} {}", l.split(" [").next().unwrap_or(l))
                    }),
            );
        }
        for hierarchy in names("/sys/fs/cgroup") {
            let top = Path::new("/sys/fs/cgroup").join(&hierarchy);
            if top.is_dir() && top.join("cgroup.procs").exists() {
                seen.extend(
                    names(&top)
                        .into_iter()
                        .filter(|n| top.join(n).is_dir())
                        .map(|n| format!("cgroup {hierarchy}/{n}")),
                );
            }
        }
        Picture(seen)
    }

    /// What is there now and was not then.
    pub fn new_since(&self, then: &Picture) -> Vec<String> {
        self.0.difference(&then.0).cloned().collect()
    }
}

fn names(dir: impl AsRef<Path>) -> Vec<String> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}
