//! What the host can do, as far as a container's specification depends on it. Parses the text of
//! /proc and /sys files that the caller reads: nothing here opens anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::capability;
use crate::input::CapabilitySet;

/// What the host (and this process on it) can do.
///
/// `Default` is a host that allows everything and has neither AppArmor nor a known kernel: for
/// tests. Real ones come from [`HostFacts::gather`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostFacts {
    /// Capabilities this process can give away (its permitted and bounding sets' common part).
    pub capabilities: CapabilitySet,
    /// Layout of /sys/fs/cgroup.
    pub cgroup: CgroupVersion,
    /// Controllers that are there (v1: hierarchies; v2: the root's cgroup.controllers).
    pub controllers: BTreeSet<String>,
    /// AppArmor is on.
    pub apparmor: bool,
    /// Name of the runtime's own AppArmor profile, once somebody has loaded it.
    pub apparmor_default: Option<String>,
    /// SELinux is on.
    pub selinux: bool,
    /// The kernel filters system calls.
    pub seccomp: bool,
    /// oom_score_adj of this process: without CAP_SYS_RESOURCE nothing below it can be set.
    pub oom_score_adj: i32,
    /// Hard limits of this process by `RLIMIT_…` name: without CAP_SYS_RESOURCE nothing above them
    /// can be set. Missing: not known.
    pub rlimits: BTreeMap<String, u64>,
    /// Kernel version.
    pub kernel: (u32, u32),
    /// Number of possible CPUs.
    pub cpus: u32,
    /// CPUs tell their thermal throttling in /sys (a side channel that gets masked).
    pub thermal_throttle: bool,
}

/// Layout of /sys/fs/cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CgroupVersion {
    /// One hierarchy per controller (legacy or hybrid).
    V1,
    /// One hierarchy for all.
    #[default]
    V2,
}

impl Default for HostFacts {
    fn default() -> Self {
        HostFacts {
            capabilities: capability::ALL.iter().map(|c| (*c).to_owned()).collect(),
            cgroup: CgroupVersion::V2,
            controllers: BTreeSet::new(),
            apparmor: false,
            apparmor_default: None,
            selinux: false,
            seccomp: true,
            oom_score_adj: 0,
            rlimits: BTreeMap::new(),
            kernel: (6, 1),
            cpus: 1,
            thermal_throttle: false,
        }
    }
}

impl HostFacts {
    /// Gathers the facts through `read`, which is `|path| std::fs::read(path)` in real life.
    ///
    /// # Errors
    /// When /proc/self/status or /proc/self/mountinfo cannot be read; every other file is optional.
    pub fn gather(read: impl Fn(&Path) -> io::Result<Vec<u8>>) -> io::Result<HostFacts> {
        let must = |p: &str| read(Path::new(p)).map(|b| String::from_utf8_lossy(&b).into_owned());
        let may = |p: &str| must(p).unwrap_or_default();

        let status = must("/proc/self/status")?;
        let mountinfo = must("/proc/self/mountinfo")?;
        let cgroup = cgroup_version(&mountinfo);
        let controllers = match cgroup {
            CgroupVersion::V1 => v1_controllers(&mountinfo),
            CgroupVersion::V2 => may("/sys/fs/cgroup/cgroup.controllers")
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
        };
        Ok(HostFacts {
            capabilities: capability::from_mask(
                status_mask(&status, "CapPrm:") & status_mask(&status, "CapBnd:"),
            ),
            cgroup,
            controllers,
            apparmor: may("/sys/module/apparmor/parameters/enabled").starts_with('Y'),
            apparmor_default: None,
            selinux: !may("/sys/fs/selinux/enforce").is_empty(),
            seccomp: status.lines().any(|l| l.starts_with("Seccomp:")),
            oom_score_adj: may("/proc/self/oom_score_adj").trim().parse().unwrap_or(0),
            rlimits: hard_limits(&may("/proc/self/limits")),
            kernel: kernel_version(&may("/proc/sys/kernel/osrelease")),
            cpus: possible_cpus(&may("/sys/devices/system/cpu/possible")),
            thermal_throttle: !may("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count")
                .is_empty(),
        })
    }

    /// Whether this process holds a capability (`CAP_…`).
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.contains(capability)
    }
}

fn status_mask(status: &str, key: &str) -> u64 {
    status
        .lines()
        .find_map(|l| l.strip_prefix(key))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0)
}

/// Splits a mountinfo line into (mount point, file system type, super options).
fn mount_fields(line: &str) -> Option<(&str, &str, &str)> {
    let (left, right) = line.split_once(" - ")?;
    let point = left.split(' ').nth(4)?;
    let mut right = right.split(' ');
    Some((point, right.next()?, right.nth(1).unwrap_or("")))
}

fn cgroup_version(mountinfo: &str) -> CgroupVersion {
    let unified = mountinfo
        .lines()
        .filter_map(mount_fields)
        .any(|(at, kind, _)| at == "/sys/fs/cgroup" && kind == "cgroup2");
    if unified {
        CgroupVersion::V2
    } else {
        CgroupVersion::V1
    }
}

fn v1_controllers(mountinfo: &str) -> BTreeSet<String> {
    const NOT_CONTROLLERS: [&str; 6] = [
        "rw",
        "ro",
        "xattr",
        "clone_children",
        "noprefix",
        "cpuset_v2_mode",
    ];
    mountinfo
        .lines()
        .filter_map(mount_fields)
        .filter(|(_, kind, _)| *kind == "cgroup")
        .flat_map(|(_, _, options)| options.split(','))
        .filter(|o| !o.contains('=') && !NOT_CONTROLLERS.contains(o) && !o.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Rows of /proc/self/limits, by the OCI name.
fn hard_limits(limits: &str) -> BTreeMap<String, u64> {
    const ROWS: [(&str, &str); 16] = [
        ("Max cpu time", "RLIMIT_CPU"),
        ("Max file size", "RLIMIT_FSIZE"),
        ("Max data size", "RLIMIT_DATA"),
        ("Max stack size", "RLIMIT_STACK"),
        ("Max core file size", "RLIMIT_CORE"),
        ("Max resident set", "RLIMIT_RSS"),
        ("Max processes", "RLIMIT_NPROC"),
        ("Max open files", "RLIMIT_NOFILE"),
        ("Max locked memory", "RLIMIT_MEMLOCK"),
        ("Max address space", "RLIMIT_AS"),
        ("Max file locks", "RLIMIT_LOCKS"),
        ("Max pending signals", "RLIMIT_SIGPENDING"),
        ("Max msgqueue size", "RLIMIT_MSGQUEUE"),
        ("Max nice priority", "RLIMIT_NICE"),
        ("Max realtime priority", "RLIMIT_RTPRIO"),
        ("Max realtime timeout", "RLIMIT_RTTIME"),
    ];
    let mut found = BTreeMap::new();
    for line in limits.lines() {
        let Some((row, name)) = ROWS.iter().find(|(row, _)| line.starts_with(row)) else {
            continue;
        };
        let hard = line[row.len()..].split_whitespace().nth(1);
        let hard = hard.and_then(|v| {
            if v == "unlimited" {
                Some(u64::MAX)
            } else {
                v.parse().ok()
            }
        });
        if let Some(hard) = hard {
            found.insert((*name).to_owned(), hard);
        }
    }
    found
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// "0-63" means 64.
fn possible_cpus(list: &str) -> u32 {
    let last = list.trim().rsplit([',', '-']).next().unwrap_or("");
    last.parse::<u32>().map_or(1, |n| n.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_this_machine_can_be_gathered() {
        let facts = HostFacts::gather(|p| std::fs::read(p)).unwrap();
        assert!(facts.kernel > (4, 0));
        assert!(facts.cpus >= 1);
        assert!(facts.rlimits.contains_key("RLIMIT_NOFILE"));
    }

    #[test]
    fn hybrid_layout_is_v1_and_its_hierarchies_are_the_controllers() {
        let info = "30 25 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755\n\
                    31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:2 - cgroup cgroup rw,cpu,cpuacct\n\
                    33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        assert_eq!(cgroup_version(info), CgroupVersion::V1);
        let names: Vec<_> = v1_controllers(info).into_iter().collect();
        assert_eq!(names, ["cpu", "cpuacct"]);
    }

    #[test]
    fn unified_layout_is_v2() {
        let info = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(cgroup_version(info), CgroupVersion::V2);
    }

    #[test]
    fn limits_are_read_by_row_and_unlimited_is_the_maximum() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 524288               files     \n\
                    Max locked memory         unlimited            unlimited            bytes     \n";
        let limits = hard_limits(text);
        assert_eq!(limits["RLIMIT_NOFILE"], 524_288);
        assert_eq!(limits["RLIMIT_MEMLOCK"], u64::MAX);
    }

    #[test]
    fn versions_and_cpu_lists_are_parsed() {
        assert_eq!(kernel_version("6.18.3-amd64\n"), (6, 18));
        assert_eq!(possible_cpus("0-63\n"), 64);
        assert_eq!(possible_cpus("0\n"), 1);
        assert_eq!(possible_cpus(""), 1);
    }
}
