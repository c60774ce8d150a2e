//! Which metrics there may be: names, labels and kinds are cAdvisor's.

use slipway_cri_api::v1;
use v1::MetricType::{Counter, Gauge};

/// The labels of every metric; a metric's own come after them.
pub(super) const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

/// A metric: its name, what it says, and its own labels.
pub(super) struct Family {
    pub(super) name: &'static str,
    help: &'static str,
    pub(super) kind: v1::MetricType,
    pub(super) labels: &'static [&'static str],
}

const fn family(
    name: &'static str,
    kind: v1::MetricType,
    labels: &'static [&'static str],
    help: &'static str,
) -> Family {
    Family {
        name,
        help,
        kind,
        labels,
    }
}

const DEVICE: &[&str] = &["device"];
const INTERFACE: &[&str] = &["interface"];

/// All of them, sorted by name.
pub(super) const FAMILIES: &[Family] = &[
    family(
        "container_blkio_device_usage_total",
        Counter,
        &["device", "major", "minor", "operation"],
        "Bytes moved to and from a block device",
    ),
    family(
        "container_cpu_cfs_burst_periods_total",
        Counter,
        &[],
        "Periods in which more than the CPU quota was used",
    ),
    family(
        "container_cpu_cfs_burst_seconds_total",
        Counter,
        &[],
        "Seconds of CPU used beyond the quota",
    ),
    family(
        "container_cpu_cfs_periods_total",
        Counter,
        &[],
        "Periods in which a CPU quota was enforced",
    ),
    family(
        "container_cpu_cfs_throttled_periods_total",
        Counter,
        &[],
        "Periods in which the CPU quota was used up",
    ),
    family(
        "container_cpu_cfs_throttled_seconds_total",
        Counter,
        &[],
        "Seconds spent waiting for CPU quota",
    ),
    family(
        "container_cpu_system_seconds_total",
        Counter,
        &[],
        "CPU seconds used in the kernel",
    ),
    family(
        "container_cpu_usage_seconds_total",
        Counter,
        &["cpu"],
        "CPU seconds used",
    ),
    family(
        "container_cpu_user_seconds_total",
        Counter,
        &[],
        "CPU seconds used in user space",
    ),
    family(
        "container_creation_time_seconds",
        Gauge,
        &[],
        "When it was created, in seconds since 1970",
    ),
    family("container_file_descriptors", Gauge, &[], "Open file descriptors"),
    family(
        "container_fs_inodes_free",
        Gauge,
        DEVICE,
        "Free inodes of the file system of writable layers",
    ),
    family(
        "container_fs_inodes_total",
        Gauge,
        DEVICE,
        "Inodes of the file system of writable layers",
    ),
    family(
        "container_fs_io_cost_indebt_seconds_total",
        Counter,
        DEVICE,
        "Seconds in debt to a device, by its cost model",
    ),
    family(
        "container_fs_io_cost_indelay_seconds_total",
        Counter,
        DEVICE,
        "Seconds slowed down for debt to a device, by its cost model",
    ),
    family(
        "container_fs_io_cost_usage_seconds_total",
        Counter,
        DEVICE,
        "Seconds of a device's time, by its cost model",
    ),
    family(
        "container_fs_io_cost_wait_seconds_total",
        Counter,
        DEVICE,
        "Seconds waited for a device, by its cost model",
    ),
    family(
        "container_fs_io_current",
        Gauge,
        DEVICE,
        "Reads and writes of a device under way",
    ),
    family(
        "container_fs_io_time_seconds_total",
        Counter,
        DEVICE,
        "Seconds spent on reading and writing a device",
    ),
    family(
        "container_fs_limit_bytes",
        Gauge,
        DEVICE,
        "Size of the file system of writable layers",
    ),
    family(
        "container_fs_read_seconds_total",
        Counter,
        DEVICE,
        "Seconds spent on reading from a device",
    ),
    family(
        "container_fs_reads_bytes_total",
        Counter,
        DEVICE,
        "Bytes read from a device",
    ),
    family(
        "container_fs_reads_merged_total",
        Counter,
        DEVICE,
        "Reads from a device that were merged into others",
    ),
    family("container_fs_reads_total", Counter, DEVICE, "Reads from a device"),
    family(
        "container_fs_sector_reads_total",
        Counter,
        DEVICE,
        "Sectors of 512 bytes read from a device",
    ),
    family(
        "container_fs_sector_writes_total",
        Counter,
        DEVICE,
        "Sectors of 512 bytes written to a device",
    ),
    family(
        "container_fs_usage_bytes",
        Gauge,
        DEVICE,
        "Bytes that the container's writable layer takes",
    ),
    family(
        "container_fs_write_seconds_total",
        Counter,
        DEVICE,
        "Seconds spent on writing to a device",
    ),
    family(
        "container_fs_writes_bytes_total",
        Counter,
        DEVICE,
        "Bytes written to a device",
    ),
    family(
        "container_fs_writes_merged_total",
        Counter,
        DEVICE,
        "Writes to a device that were merged into others",
    ),
    family("container_fs_writes_total", Counter, DEVICE, "Writes to a device"),
    family(
        "container_last_seen",
        Gauge,
        &[],
        "When it was measured last, in seconds since 1970",
    ),
    family("container_memory_cache", Gauge, &[], "Bytes of page cache"),
    family(
        "container_memory_events_high_total",
        Counter,
        &[],
        "How often it was slowed down for its memory",
    ),
    family(
        "container_memory_events_max_total",
        Counter,
        &[],
        "How often its memory was about to exceed the limit",
    ),
    family(
        "container_memory_failcnt",
        Counter,
        &[],
        "How often a memory limit was hit",
    ),
    family(
        "container_memory_failures_total",
        Counter,
        &["failure_type", "scope"],
        "Page faults",
    ),
    family(
        "container_memory_file_dirty_bytes",
        Gauge,
        &[],
        "Bytes of page cache that are not on the disk yet",
    ),
    family(
        "container_memory_file_writeback_bytes",
        Gauge,
        &[],
        "Bytes of page cache on their way to the disk",
    ),
    family(
        "container_memory_kernel_usage",
        Gauge,
        &[],
        "Bytes of the kernel's own memory",
    ),
    family(
        "container_memory_mapped_file",
        Gauge,
        &[],
        "Bytes of mapped files",
    ),
    family(
        "container_memory_max_usage_bytes",
        Gauge,
        &[],
        "The most bytes of memory used so far",
    ),
    family(
        "container_memory_pgscan_total",
        Counter,
        &[],
        "Pages looked at to be taken back",
    ),
    family("container_memory_pgsteal_total", Counter, &[], "Pages taken back"),
    family("container_memory_rss", Gauge, &[], "Bytes of anonymous memory"),
    family("container_memory_swap", Gauge, &[], "Bytes of swap used"),
    family(
        "container_memory_total_active_file_bytes",
        Gauge,
        &[],
        "Bytes of page cache used lately",
    ),
    family(
        "container_memory_total_inactive_file_bytes",
        Gauge,
        &[],
        "Bytes of page cache not used lately",
    ),
    family(
        "container_memory_usage_bytes",
        Gauge,
        &[],
        "Bytes of memory used, page cache and all",
    ),
    family(
        "container_memory_working_set_bytes",
        Gauge,
        &[],
        "Bytes of memory used, without page cache not used lately",
    ),
    family(
        "container_memory_workingset_refault_anon_total",
        Counter,
        &[],
        "Anonymous pages needed again after they had been taken back",
    ),
    family(
        "container_memory_workingset_refault_file_total",
        Counter,
        &[],
        "Pages of files needed again after they had been taken back",
    ),
    family(
        "container_network_receive_bytes_total",
        Counter,
        INTERFACE,
        "Bytes received",
    ),
    family(
        "container_network_receive_errors_total",
        Counter,
        INTERFACE,
        "Errors while receiving",
    ),
    family(
        "container_network_receive_packets_dropped_total",
        Counter,
        INTERFACE,
        "Packets dropped while receiving",
    ),
    family(
        "container_network_receive_packets_total",
        Counter,
        INTERFACE,
        "Packets received",
    ),
    family(
        "container_network_transmit_bytes_total",
        Counter,
        INTERFACE,
        "Bytes sent",
    ),
    family(
        "container_network_transmit_errors_total",
        Counter,
        INTERFACE,
        "Errors while sending",
    ),
    family(
        "container_network_transmit_packets_dropped_total",
        Counter,
        INTERFACE,
        "Packets dropped while sending",
    ),
    family(
        "container_network_transmit_packets_total",
        Counter,
        INTERFACE,
        "Packets sent",
    ),
    family(
        "container_oom_events_total",
        Counter,
        &[],
        "Processes killed for want of memory",
    ),
    family(
        "container_pressure_cpu_stalled_seconds_total",
        Counter,
        &[],
        "Seconds in which nothing ran for want of CPU",
    ),
    family(
        "container_pressure_cpu_waiting_seconds_total",
        Counter,
        &[],
        "Seconds in which something waited for CPU",
    ),
    family(
        "container_pressure_io_stalled_seconds_total",
        Counter,
        &[],
        "Seconds in which nothing ran for waiting for I/O",
    ),
    family(
        "container_pressure_io_waiting_seconds_total",
        Counter,
        &[],
        "Seconds in which something waited for I/O",
    ),
    family(
        "container_pressure_memory_stalled_seconds_total",
        Counter,
        &[],
        "Seconds in which nothing ran for want of memory",
    ),
    family(
        "container_pressure_memory_waiting_seconds_total",
        Counter,
        &[],
        "Seconds in which something waited for memory",
    ),
    family("container_processes", Gauge, &[], "Processes"),
    family("container_sockets", Gauge, &[], "Open sockets"),
    family(
        "container_spec_cpu_period",
        Gauge,
        &[],
        "The period of the CPU quota in microseconds",
    ),
    family(
        "container_spec_cpu_quota",
        Gauge,
        &[],
        "The CPU quota in microseconds",
    ),
    family("container_spec_cpu_shares", Gauge, &[], "CPU shares"),
    family(
        "container_spec_memory_limit_bytes",
        Gauge,
        &[],
        "The memory limit; 0: none",
    ),
    family(
        "container_spec_memory_reservation_limit_bytes",
        Gauge,
        &[],
        "The memory reservation; 0: none",
    ),
    family(
        "container_spec_memory_swap_limit_bytes",
        Gauge,
        &[],
        "The limit on memory and swap; 0: none",
    ),
    family(
        "container_start_time_seconds",
        Gauge,
        &[],
        "When it started, in seconds since 1970",
    ),
    family("container_tasks_state", Gauge, &["state"], "Threads in a state"),
    family("container_threads", Gauge, &[], "Threads"),
    family(
        "container_threads_max",
        Gauge,
        &[],
        "The most threads it may have; 0: any number",
    ),
    family(
        "container_ulimits_soft",
        Gauge,
        &["ulimit"],
        "Soft limits of its first process",
    ),
];

/// What there may be; static.
pub fn descriptors() -> Vec<v1::MetricDescriptor> {
    let described = |family: &Family| v1::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: LABELS
            .iter()
            .chain(family.labels)
            .map(|label| (*label).to_owned())
            .collect(),
    };
    FAMILIES.iter().map(described).collect()
}
