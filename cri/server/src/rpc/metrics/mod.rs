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
use crate::pod::Pod;
use crate::pod::stats::Interface;
use crate::records::ContainerPhase;

mod families;

use families::FAMILIES;
pub use families::descriptors;

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
        of_cgroup.pod(pod);
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
const US: u64 = 1_000_000;

/// What is negative is not there.
fn positive(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

impl Metrics {
    fn new(labels: [String; 6]) -> Metrics {
        Metrics {
            labels,
            list: Vec::new(),
        }
    }

    /// One that this kernel may not count.
    fn add_known(&mut self, name: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.add(name, &[], value);
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
            if let Some(tasks) = processes.tasks {
                for (state, count) in [
                    ("running", tasks.running),
                    ("sleeping", tasks.sleeping),
                    ("stopped", tasks.stopped),
                    ("uninterruptible", tasks.uninterruptible),
                ] {
                    self.add("container_tasks_state", &[state], count);
                }
            }
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
        self.limits(&update::in_force(&stats.container).limits);
        let created = stats.container.record().created_at_ns;
        self.add("container_creation_time_seconds", &[], positive(created) / NS);
        if let ContainerPhase::Running { started_at_ns } = stats.container.phase() {
            self.add("container_start_time_seconds", &[], positive(started_at_ns) / NS);
        }
    }

    fn pod(&mut self, pod: &Pod) {
        let created = positive(pod.record().created_at_ns) / NS;
        self.add("container_creation_time_seconds", &[], created);
        self.add("container_start_time_seconds", &[], created);
        let told = pod.state().resources.map(|(_, resources)| resources);
        if let Some(resources) = told.or_else(|| pod.record().config.resources.clone()) {
            self.limits(&resources.limits);
        }
    }

    fn limits(&mut self, limits: &slipway_spec::Resources) {
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
            self.add_known("container_cpu_cfs_burst_periods_total", c.cpu_burst_periods);
            let burst = c.cpu_burst_ns.map(|ns| ns / NS);
            self.add_known("container_cpu_cfs_burst_seconds_total", burst);
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
        for (name, value) in [
            ("container_memory_events_high_total", c.memory_high_events),
            ("container_memory_events_max_total", c.memory_max_events),
            ("container_memory_file_dirty_bytes", c.memory_dirty),
            ("container_memory_file_writeback_bytes", c.memory_writeback),
            ("container_memory_pgscan_total", c.memory_pages_scanned),
            ("container_memory_pgsteal_total", c.memory_pages_stolen),
            (
                "container_memory_workingset_refault_anon_total",
                c.memory_refaults_anon,
            ),
            (
                "container_memory_workingset_refault_file_total",
                c.memory_refaults_file,
            ),
        ] {
            self.add_known(name, value);
        }
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
            let seconds = |data: &Option<wire::PsiData>| data.as_ref().map_or(0, |d| d.total_us / US);
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
            // v1 alone knows who waited, and has a sum.
            let total = io
                .sync_bytes
                .zip(io.async_bytes)
                .map(|(sync, other)| sync + other);
            for (operation, bytes) in [
                ("Read", Some(io.read_bytes)),
                ("Write", Some(io.write_bytes)),
                ("Discard", io.discard_bytes),
                ("Sync", io.sync_bytes),
                ("Async", io.async_bytes),
                ("Total", total),
            ] {
                let labels = [device.as_str(), &major, &minor, operation];
                if let Some(bytes) = bytes {
                    self.add("container_blkio_device_usage_total", &labels, bytes);
                }
            }
            let device = [device.as_str()];
            self.add("container_fs_reads_bytes_total", &device, io.read_bytes);
            self.add("container_fs_reads_total", &device, io.read_ios);
            self.add("container_fs_writes_bytes_total", &device, io.write_bytes);
            self.add("container_fs_writes_total", &device, io.write_ios);
            self.add("container_fs_sector_reads_total", &device, io.read_bytes / SECTOR);
            self.add(
                "container_fs_sector_writes_total",
                &device,
                io.write_bytes / SECTOR,
            );
            if let Some(s) = &io.scheduler {
                for (name, value) in [
                    ("container_fs_io_current", s.queued),
                    (
                        "container_fs_io_time_seconds_total",
                        (s.read_ns + s.write_ns) / NS,
                    ),
                    ("container_fs_read_seconds_total", s.read_ns / NS),
                    ("container_fs_reads_merged_total", s.read_merged),
                    ("container_fs_write_seconds_total", s.write_ns / NS),
                    ("container_fs_writes_merged_total", s.write_merged),
                ] {
                    self.add(name, &device, value);
                }
            }
            if let Some(cost) = &io.cost {
                for (what, value) in [
                    ("indebt", cost.indebt_us),
                    ("indelay", cost.indelay_us),
                    ("usage", cost.usage_us),
                    ("wait", cost.wait_us),
                ] {
                    let name = format!("container_fs_io_cost_{what}_seconds_total");
                    self.add(&name, &device, value / US);
                }
            }
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

/// Of the kernel's block layer, whatever the device's are.
const SECTOR: u64 = 512;

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
    use super::families::LABELS;
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
            io: vec![wire::BlkIo {
                read_bytes: 1024,
                discard_bytes: Some(7),
                sync_bytes: Some(1),
                async_bytes: Some(2),
                scheduler: Some(Default::default()),
                cost: Some(wire::CostIo {
                    usage_us: 9 * US,
                    ..Default::default()
                }),
                ..Default::default()
            }],
            memory_high_events: Some(4),
            memory_refaults_anon: Some(6),
            cpu_burst_ns: Some(2 * NS),
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
        assert_eq!(value("container_cpu_cfs_burst_seconds_total"), 2);
        assert_eq!(value("container_memory_events_high_total"), 4);
        assert_eq!(value("container_memory_workingset_refault_anon_total"), 6);
        assert_eq!(value("container_fs_io_cost_usage_seconds_total"), 9);
        assert_eq!(value("container_fs_sector_reads_total"), 2);
        let operations = |metrics: &Metrics| {
            let usage = metrics.list.iter();
            usage
                .filter(|m| m.name == "container_blkio_device_usage_total")
                .count()
        };
        assert_eq!(operations(&metrics), 6);
        // What is not counted has no value, rather than 0.
        let mut metrics = Metrics::new(Default::default());
        let io = vec![wire::BlkIo::default()];
        metrics.cgroup(&wire::CgroupStats {
            io,
            ..Default::default()
        });
        assert_eq!(operations(&metrics), 2);
        for name in [
            "container_cpu_cfs_burst_periods_total",
            "container_memory_pgscan_total",
            "container_fs_reads_merged_total",
        ] {
            assert!(!metrics.list.iter().any(|m| m.name == name), "{name}");
        }
    }
}
