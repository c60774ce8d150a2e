//! Cgroups, which are ours: made, limited, measured, watched, killed and removed here, never by libcontainer.
//!
//! A container's cgroup is one directory in every hierarchy there is:
//! ```text
//! v2       /sys/fs/cgroup/<path>
//! v1       /sys/fs/cgroup/{cpu,memory,pids,…}/<path>     (and unified/<path>, systemd/<path> on a hybrid machine)
//! ```
//! One rule for limits: a zero limit whose controller is missing is dropped (kubelet always sends such), any other is an
//! error that names the key. Refuses to know pods and containers; where paths begin is injectable ([`Layout::at`]).

mod bpf;
mod common;
mod dbus;
mod device;
mod group;
mod layout;
mod oom;
mod resources;
mod stats;
mod systemd;
mod v1;
mod v2;
mod view;
mod write;

use std::io;
use std::path::PathBuf;

pub use group::{Cgroup, Join};
pub use layout::{CgroupPath, Layout};
pub use oom::OomWatch;
pub use resources::{
    BlockIo, Cpu, DeviceRule, HugepageLimit, InterfacePriority, Memory, Network, Pids, Rdma, Resources,
    ThrottleDevice, WeightDevice,
};
pub use view::{Facade, View, is_covered};

/// Why something about a cgroup failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path cannot be one.
    #[error("{path} is no cgroup path: {reason}")]
    Path {
        /// As given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// systemd manages v2 only.
    #[error("the systemd cgroup driver needs cgroup v2, and this machine has v1: use the cgroupfs driver")]
    SystemdOnV1,
    /// A limit that this machine cannot enforce.
    #[error("resource {key} cannot be set: {reason}")]
    Unsupported {
        /// OCI's name of the limit.
        key: String,
        /// Why not.
        reason: String,
    },
    /// The kernel did not take a value.
    #[error("set resource {key}: write {value:?} to {}", file.display())]
    Write {
        /// OCI's name of the limit.
        key: String,
        /// The cgroup's file.
        file: PathBuf,
        /// What was written.
        value: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Processes are left.
    #[error("cgroup {} still has processes {pids:?}", path.display())]
    NotEmpty {
        /// Below each hierarchy.
        path: PathBuf,
        /// At most a few of them.
        pids: Vec<u32>,
    },
    /// systemd refused or cannot be reached.
    #[error("systemd: {act}: {reason}")]
    Systemd {
        /// What was asked of it.
        act: String,
        /// What came back.
        reason: String,
    },
    /// A step failed.
    #[error("{act}")]
    Io {
        /// What was attempted.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    /// A cgroup that was to be used is not there (any more).
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, CgroupError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A `Result` of this module.
pub type Result<T> = std::result::Result<T, CgroupError>;

/// Use of a cgroup, descendants included. A controller that is missing leaves zeros.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// CPU time in nanoseconds.
    pub cpu_usage_ns: u64,
    /// In user mode.
    pub cpu_user_ns: u64,
    /// In the kernel.
    pub cpu_system_ns: u64,
    /// Enforcement periods that passed.
    pub cpu_periods: u64,
    /// Of these, throttled ones.
    pub cpu_throttled_periods: u64,
    /// For how long.
    pub cpu_throttled_ns: u64,
    /// Bytes, page cache included.
    pub memory_usage: u64,
    /// Usage less inactive file pages.
    pub memory_working_set: u64,
    /// Anonymous memory.
    pub memory_rss: u64,
    /// 0: unlimited.
    pub memory_limit: u64,
    /// Page cache.
    pub memory_cache: u64,
    /// Of it, mapped.
    pub memory_mapped_file: u64,
    /// Highest usage.
    pub memory_peak: u64,
    /// How often the limit was hit.
    pub memory_failcnt: u64,
    /// Faults.
    pub memory_page_faults: u64,
    /// Of them, major ones.
    pub memory_major_page_faults: u64,
    /// Bytes of swap.
    pub swap_usage: u64,
    /// Bytes; 0: none where it is limited, else unlimited.
    pub swap_limit: u64,
    /// Whether there is a limit of swap.
    pub swap_limited: bool,
    /// Bytes of the kernel's own memory.
    pub memory_kernel: u64,
    /// Bytes of page cache used lately.
    pub memory_active_file: u64,
    /// Processes the OOM killer killed in here.
    pub oom_kills: u64,
    /// What only some kernels count, or one version of cgroups.
    pub more: More,
    /// Tasks (threads).
    pub pids: u64,
    /// 0: unlimited.
    pub pids_limit: u64,
    /// Processes.
    pub processes: u64,
    /// Threads.
    pub threads: u64,
    /// Pressure on the CPU.
    pub cpu_psi: Option<Psi>,
    /// Pressure on memory.
    pub memory_psi: Option<Psi>,
    /// Pressure on IO.
    pub io_psi: Option<Psi>,
    /// By device.
    pub io: Vec<BlkIoStats>,
}

/// What this kernel may not count: `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct More {
    /// Enforcement periods in which more than the quota was used.
    pub cpu_burst_periods: Option<u64>,
    /// For how long.
    pub cpu_burst_ns: Option<u64>,
    /// How often `memory.high` slowed it down; v2.
    pub memory_high_events: Option<u64>,
    /// How often `memory.max` was about to be exceeded; v2.
    pub memory_max_events: Option<u64>,
    /// Bytes of page cache that are not on the disk yet.
    pub memory_dirty: Option<u64>,
    /// Bytes of page cache on their way there.
    pub memory_writeback: Option<u64>,
    /// Pages looked at to be taken back; v2.
    pub memory_pages_scanned: Option<u64>,
    /// Pages taken back; v2.
    pub memory_pages_stolen: Option<u64>,
    /// Pages of files that were needed again after they had been taken back.
    pub memory_refaults_file: Option<u64>,
    /// The same of anonymous pages.
    pub memory_refaults_anon: Option<u64>,
}

/// Pressure stall information.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Psi {
    /// Some tasks waited.
    pub some: PsiData,
    /// All tasks waited.
    pub full: PsiData,
}

/// One line of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PsiData {
    /// Microseconds.
    pub total_us: u64,
    /// Percent.
    pub avg10: f64,
    /// Percent.
    pub avg60: f64,
    /// Percent.
    pub avg300: f64,
}

/// IO on one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlkIoStats {
    /// Device number.
    pub major: u64,
    /// Device number.
    pub minor: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub read_ios: u64,
    /// Writes.
    pub write_ios: u64,
    /// Bytes discarded.
    pub discard_bytes: Option<u64>,
    /// Bytes moved while somebody waited for them; v1.
    pub sync_bytes: Option<u64>,
    /// Bytes moved while nobody did; v1.
    pub async_bytes: Option<u64>,
    /// What the IO scheduler counts; v1 with one that does.
    pub scheduler: Option<SchedulerIo>,
    /// What the device's cost model counts; v2 where there is one.
    pub cost: Option<CostIo>,
}

/// What an IO scheduler that looks after cgroups counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerIo {
    /// Reads merged into others.
    pub read_merged: u64,
    /// Writes merged into others.
    pub write_merged: u64,
    /// Nanoseconds of reading.
    pub read_ns: u64,
    /// Nanoseconds of writing.
    pub write_ns: u64,
    /// Under way.
    pub queued: u64,
}

/// Microseconds of a device's time, as the kernel's cost model (io.cost.model) reckons.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CostIo {
    /// Used.
    pub usage_us: u64,
    /// Waited for.
    pub wait_us: u64,
    /// In debt.
    pub indebt_us: u64,
    /// Slowed down for it.
    pub indelay_us: u64,
}
