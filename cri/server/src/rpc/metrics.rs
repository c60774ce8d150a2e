//! ListMetricDescriptors and ListPodSandboxMetrics: under the names and labels that cAdvisor gave the kubelet, so that
//! what reads /metrics/cadvisor goes on reading it.
//!
//! Values are whole numbers, as the CRI has them: times are seconds, cut. What this kernel or cgroup version does not count
//! has a descriptor and no value.

use slipway_cri_api::v1;
use slipway_shim_client::pod as wire;

use crate::container::processes::Processes;
use crate::container::stats::{ContainerStats, PodStats};
use crate::container::update;
use crate::pod::stats::Interface;
use crate::records::ContainerPhase;
use v1::MetricType::{Counter, Gauge};

/// The labels of every metric; a metric's own come after them.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

/// A metric: its name, what it says, and its own labels.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: v1::MetricType,
    labels: &'static [&'static str],
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
const FAMILIES: &[Family] = &[
    family(
        "container_blkio_device_usage_total",
        Counter,
        &["device", "major", "minor", "operation"],
        "Bytes moved to and from a block device",
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
        "container_fs_limit_bytes",
        Gauge,
        DEVICE,
        "Size of the file system of writable layers",
    ),
    family(
        "container_fs_reads_bytes_total",
        Counter,
        DEVICE,
        "Bytes read from a device",
    ),
    family("container_fs_reads_total", Counter, DEVICE, "Reads from a device"),
    family(
        "container_fs_usage_bytes",
        Gauge,
        DEVICE,
        "Bytes that the container's writable layer takes",
    ),
    family(
        "container_fs_writes_bytes_total",
        Counter,
        DEVICE,
        "Bytes written to a device",
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

/// What is measured of a pod besides its statistics.
pub struct Measured {
    pub stats: PodStats,
    pub interfaces: Vec<Interface>,
    /// By container, in the order of the statistics.
    pub processes: Vec<Option<Processes>>,
    /// Of writable layers.
    pub file_system: Option<FileSystem>,
    /// The pod's cgroup.
    pub cgroup: String,
}

/// A file system as statvfs tells it.
#[derive(Debug, Clone)]
pub struct FileSystem {
    pub device: String,
    pub bytes: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// One pod's metrics.
pub fn of_pod(measured: &Measured) -> v1::PodSandboxMetrics {
    let pod = &measured.stats.pod;
    let metadata = &pod.record().config.metadata;
    let labels = |id: &str, name: &str, image: &str, container: &str| {
        [id, name, image, container, &metadata.name, &metadata.namespace].map(str::to_owned)
    };
    // As cAdvisor: the pod's cgroup has no name; what is known of the sandbox alone, the network, has the sandbox's.
    let mut of_cgroup = Metrics::new(labels(&measured.cgroup, "", "", ""));
    if let Some(cgroup) = &measured.stats.cgroup {
        of_cgroup.cgroup(cgroup);
    }
    let mut of_sandbox = Metrics::new(labels(&measured.cgroup, pod.id().as_str(), "", ""));
    of_sandbox.network(&measured.interfaces);
    let containers = measured.stats.containers.iter().zip(&measured.processes);
    let containers = containers.filter(|(stats, _)| stats.cgroup.is_some());
    v1::PodSandboxMetrics {
        pod_sandbox_id: pod.id().to_string(),
        metrics: of_cgroup.list.into_iter().chain(of_sandbox.list).collect(),
        container_metrics: containers
            .map(|(stats, processes)| {
                let id = stats.container.id().as_str();
                let record = &stats.container.record().config;
                let path = format!("{}/{id}", measured.cgroup.trim_end_matches('/'));
                let image = stats.container.state().made.image_name;
                let mut metrics = Metrics::new(labels(&path, id, &image, &record.metadata.name));
                metrics.container(stats, processes.as_ref(), measured.file_system.as_ref());
                v1::ContainerMetrics {
                    container_id: id.to_owned(),
                    metrics: metrics.list,
                }
            })
            .collect(),
    }
}

/// The metrics of one thing as they come together.
struct Metrics {
    labels: [String; 6],
    list: Vec<v1::Metric>,
}

const NS: u64 = 1_000_000_000;

impl Metrics {
    fn new(labels: [String; 6]) -> Metrics {
        Metrics {
            labels,
            list: Vec::new(),
        }
    }

    /// Measured on demand, so without a time: whoever reads it has it now.
    fn add(&mut self, name: &str, labels: &[&str], value: u64) {
        let Ok(at) = FAMILIES.binary_search_by_key(&name, |family| family.name) else {
            debug_assert!(false, "{name} has no descriptor");
            return;
        };
        debug_assert_eq!(FAMILIES[at].labels.len(), labels.len(), "{name}");
        let own = labels.iter().map(|label| (*label).to_owned());
        self.list.push(v1::Metric {
            name: name.to_owned(),
            timestamp: 0,
            metric_type: FAMILIES[at].kind as i32,
            label_values: self.labels.iter().cloned().chain(own).collect(),
            value: Some(v1::UInt64Value { value }),
        });
    }

    fn container(&mut self, stats: &ContainerStats, processes: Option<&Processes>, fs: Option<&FileSystem>) {
        if let Some(cgroup) = &stats.cgroup {
            self.cgroup(cgroup);
        }
        if let Some(processes) = processes {
            self.add("container_file_descriptors", &[], processes.descriptors);
            self.add("container_sockets", &[], processes.sockets);
            if let Some(limit) = processes.open_files_limit {
                self.add("container_ulimits_soft", &["max_open_files"], limit);
            }
        }
        if let Some(fs) = fs {
            let device = [fs.device.as_str()];
            self.add("container_fs_inodes_free", &device, fs.inodes_free);
            self.add("container_fs_inodes_total", &device, fs.inodes);
            self.add("container_fs_limit_bytes", &device, fs.bytes);
            if let Some(layer) = &stats.layer {
                self.add("container_fs_usage_bytes", &device, layer.usage.bytes);
            }
        }
        let limits = update::in_force(&stats.container).limits;
        let positive = |value: i64| u64::try_from(value).unwrap_or(0);
        self.add("container_spec_cpu_period", &[], positive(limits.cpu_period));
        if limits.cpu_quota > 0 {
            self.add("container_spec_cpu_quota", &[], positive(limits.cpu_quota));
        }
        self.add("container_spec_cpu_shares", &[], positive(limits.cpu_shares));
        self.add(
            "container_spec_memory_limit_bytes",
            &[],
            positive(limits.memory_limit),
        );
        self.add(
            "container_spec_memory_reservation_limit_bytes",
            &[],
            positive(limits.memory_reservation),
        );
        self.add(
            "container_spec_memory_swap_limit_bytes",
            &[],
            positive(limits.memory_swap_limit),
        );
        if let ContainerPhase::Running { started_at_ns } = stats.container.phase() {
            self.add("container_start_time_seconds", &[], positive(started_at_ns) / NS);
        }
    }

    fn cgroup(&mut self, c: &wire::CgroupStats) {
        self.add(
            "container_last_seen",
            &[],
            u64::try_from(c.time_ns).unwrap_or(0) / NS,
        );
        self.add("container_cpu_user_seconds_total", &[], c.cpu_user_ns / NS);
        self.add("container_cpu_system_seconds_total", &[], c.cpu_system_ns / NS);
        self.add(
            "container_cpu_usage_seconds_total",
            &["total"],
            c.cpu_usage_ns / NS,
        );
        if c.cpu_periods > 0 {
            self.add("container_cpu_cfs_periods_total", &[], c.cpu_periods);
            self.add(
                "container_cpu_cfs_throttled_periods_total",
                &[],
                c.cpu_throttled_periods,
            );
            self.add(
                "container_cpu_cfs_throttled_seconds_total",
                &[],
                c.cpu_throttled_ns / NS,
            );
        }
        self.add("container_memory_cache", &[], c.memory_cache);
        self.add("container_memory_rss", &[], c.memory_rss);
        self.add("container_memory_kernel_usage", &[], c.memory_kernel);
        self.add("container_memory_mapped_file", &[], c.memory_mapped_file);
        self.add(
            "container_memory_total_active_file_bytes",
            &[],
            c.memory_active_file,
        );
        self.add("container_memory_swap", &[], c.swap_usage);
        self.add("container_memory_failcnt", &[], c.memory_failcnt);
        self.add("container_memory_usage_bytes", &[], c.memory_usage);
        self.add("container_memory_max_usage_bytes", &[], c.memory_peak);
        self.add("container_memory_working_set_bytes", &[], c.memory_working_set);
        let inactive = c.memory_usage.saturating_sub(c.memory_working_set);
        self.add("container_memory_total_inactive_file_bytes", &[], inactive);
        for scope in ["container", "hierarchy"] {
            self.add(
                "container_memory_failures_total",
                &["pgfault", scope],
                c.memory_page_faults,
            );
            self.add(
                "container_memory_failures_total",
                &["pgmajfault", scope],
                c.memory_major_page_faults,
            );
        }
        self.add("container_oom_events_total", &[], c.oom_kills);
        self.add(
            "container_processes",
            &[],
            if c.processes > 0 { c.processes } else { c.pids },
        );
        self.add(
            "container_threads",
            &[],
            if c.threads > 0 { c.threads } else { c.pids },
        );
        self.add("container_threads_max", &[], c.pids_limit);
        self.block_devices(&c.io);
        let psi = [("cpu", &c.cpu_psi), ("memory", &c.memory_psi), ("io", &c.io_psi)];
        for (what, pressure) in psi {
            let Some(pressure) = pressure else { continue };
            let seconds = |data: &Option<wire::PsiData>| data.as_ref().map_or(0, |d| d.total_us / 1_000_000);
            self.add(
                &format!("container_pressure_{what}_waiting_seconds_total"),
                &[],
                seconds(&pressure.some),
            );
            self.add(
                &format!("container_pressure_{what}_stalled_seconds_total"),
                &[],
                seconds(&pressure.full),
            );
        }
    }

    fn block_devices(&mut self, devices: &[wire::BlkIo]) {
        for io in devices {
            let (major, minor) = (io.major.to_string(), io.minor.to_string());
            let device = device_name(io.major, io.minor);
            for (operation, bytes) in [("Read", io.read_bytes), ("Write", io.write_bytes)] {
                let labels = [device.as_str(), &major, &minor, operation];
                self.add("container_blkio_device_usage_total", &labels, bytes);
            }
            let device = [device.as_str()];
            self.add("container_fs_reads_bytes_total", &device, io.read_bytes);
            self.add("container_fs_reads_total", &device, io.read_ios);
            self.add("container_fs_writes_bytes_total", &device, io.write_bytes);
            self.add("container_fs_writes_total", &device, io.write_ios);
        }
    }

    fn network(&mut self, interfaces: &[Interface]) {
        for i in interfaces {
            let name = [i.name.as_str()];
            self.add("container_network_receive_bytes_total", &name, i.rx_bytes);
            self.add("container_network_receive_packets_total", &name, i.rx_packets);
            self.add(
                "container_network_receive_packets_dropped_total",
                &name,
                i.rx_dropped,
            );
            self.add("container_network_receive_errors_total", &name, i.rx_errors);
            self.add("container_network_transmit_bytes_total", &name, i.tx_bytes);
            self.add("container_network_transmit_packets_total", &name, i.tx_packets);
            self.add(
                "container_network_transmit_packets_dropped_total",
                &name,
                i.tx_dropped,
            );
            self.add("container_network_transmit_errors_total", &name, i.tx_errors);
        }
    }
}

/// `/dev/vda` where the kernel knows the numbers, else nothing, as cAdvisor.
pub fn device_name(major: u64, minor: u64) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link
        .ok()
        .and_then(|to| Some(to.file_name()?.to_string_lossy().into_owned()));
    name.map(|name| format!("/dev/{name}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_sorted_once_each_and_have_help() {
        assert!(FAMILIES.windows(2).all(|pair| pair[0].name < pair[1].name));
        for d in descriptors() {
            assert!(d.name.starts_with("container_") && !d.help.is_empty());
            assert_eq!(d.label_keys[..6], LABELS.map(str::to_owned));
        }
    }

    #[test]
    fn every_metric_of_a_cgroup_has_the_labels_of_its_descriptor() {
        let psi = wire::Psi {
            full: None,
            some: Some(wire::PsiData {
                total_us: 5_000_000,
                ..Default::default()
            }),
        };
        let cgroup = wire::CgroupStats {
            cpu_usage_ns: 3 * NS,
            cpu_periods: 1,
            io: vec![wire::BlkIo::default()],
            cpu_psi: Some(psi),
            ..Default::default()
        };
        let mut metrics = Metrics::new(Default::default());
        metrics.cgroup(&cgroup);
        metrics.network(&[Interface::default()]);
        let descriptors = descriptors();
        for metric in &metrics.list {
            let descriptor = descriptors.iter().find(|d| d.name == metric.name).unwrap();
            assert_eq!(
                descriptor.label_keys.len(),
                metric.label_values.len(),
                "{}",
                metric.name
            );
        }
        let value = |name: &str| {
            metrics
                .list
                .iter()
                .find(|m| m.name == name)
                .unwrap()
                .value
                .unwrap()
                .value
        };
        assert_eq!(value("container_cpu_usage_seconds_total"), 3);
        assert_eq!(value("container_pressure_cpu_waiting_seconds_total"), 5);
    }
}
