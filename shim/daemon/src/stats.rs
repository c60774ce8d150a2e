//! What containers use, in the shapes of both protocols. Measuring is `slipway_sys::cgroup`'s.

use crate::fault::Fault;
use crate::shim::Shim;
use crate::task::Container;
use prost::Message;
use slipway_shim_api::{Any, metrics_v1 as v1, metrics_v2 as v2, pod, task};
use slipway_sys::cgroup::{Psi, PsiData, Stats};

impl Shim {
    /// Pod.Stats. A container whose cgroup is gone while it is asked for (it has ended) is left out, unless named.
    ///
    /// # Errors
    /// When a container that was named does not exist.
    pub fn pod_stats(&self, request: &pod::StatsRequest) -> Result<Vec<u8>, Fault> {
        let measure = |c: &Container| c.cgroup.stats().map(|stats| for_pod(&c.id, stats));
        let containers = if request.container_ids.is_empty() {
            self.containers.values().filter_map(|c| measure(c).ok()).collect()
        } else {
            let one = |id: &String| {
                let key = self.find(id)?;
                let container = self.containers.get(&key).ok_or_else(|| Fault::not_found(id))?;
                Ok(measure(container)?)
            };
            request
                .container_ids
                .iter()
                .map(one)
                .collect::<Result<_, Fault>>()?
        };
        let pod = self.pod.cgroup.as_ref();
        let pod = pod
            .and_then(|own| own.cgroup.stats().ok())
            .map(|stats| for_pod(&self.config.id, stats));
        Ok(pod::StatsResponse { containers, pod }.encode_to_vec())
    }

    /// Task.Stats: what containerd's own shim sends, for the cgroup version of this machine.
    ///
    /// # Errors
    /// When there is no such container, or its cgroup cannot be read.
    pub fn task_stats(&self, id: &str) -> Result<Vec<u8>, Fault> {
        let key = self.find(id)?;
        let container = self.containers.get(&key).ok_or_else(|| Fault::not_found(id))?;
        let stats = container.cgroup.stats()?;
        let any = if self.layout.is_v2() {
            Any {
                type_url: "io.containerd.cgroups.v2.Metrics".to_owned(),
                value: for_containerd_v2(&stats).encode_to_vec(),
            }
        } else {
            Any {
                type_url: "io.containerd.cgroups.v1.Metrics".to_owned(),
                value: for_containerd_v1(&stats).encode_to_vec(),
            }
        };
        Ok(task::StatsResponse { stats: Some(any) }.encode_to_vec())
    }
}

fn for_pod(id: &str, s: Stats) -> pod::CgroupStats {
    let data = |d: PsiData| pod::PsiData {
        total_us: d.total_us,
        avg10: d.avg10,
        avg60: d.avg60,
        avg300: d.avg300,
    };
    let psi = |p: Psi| pod::Psi {
        full: Some(data(p.full)),
        some: Some(data(p.some)),
    };
    pod::CgroupStats {
        id: id.to_owned(),
        time_ns: crate::clock::now(),
        cpu_usage_ns: s.cpu_usage_ns,
        cpu_user_ns: s.cpu_user_ns,
        cpu_system_ns: s.cpu_system_ns,
        cpu_periods: s.cpu_periods,
        cpu_throttled_periods: s.cpu_throttled_periods,
        cpu_throttled_ns: s.cpu_throttled_ns,
        memory_usage: s.memory_usage,
        memory_working_set: s.memory_working_set,
        memory_rss: s.memory_rss,
        memory_limit: s.memory_limit,
        memory_page_faults: s.memory_page_faults,
        memory_major_page_faults: s.memory_major_page_faults,
        swap_usage: s.swap_usage,
        swap_limit: s.swap_limit,
        pids: s.pids,
        pids_limit: s.pids_limit,
        oom_kills: s.oom_kills,
        memory_cache: s.memory_cache,
        memory_mapped_file: s.memory_mapped_file,
        memory_peak: s.memory_peak,
        memory_failcnt: s.memory_failcnt,
        cpu_psi: s.cpu_psi.map(psi),
        memory_psi: s.memory_psi.map(psi),
        io_psi: s.io_psi.map(psi),
        io: s
            .io
            .iter()
            .map(|io| pod::BlkIo {
                major: io.major,
                minor: io.minor,
                read_bytes: io.read_bytes,
                write_bytes: io.write_bytes,
                read_ios: io.read_ios,
                write_ios: io.write_ios,
                discard_bytes: io.discard_bytes,
                sync_bytes: io.sync_bytes,
                async_bytes: io.async_bytes,
                scheduler: io.scheduler.map(|counts| pod::SchedulerIo {
                    read_merged: counts.read_merged,
                    write_merged: counts.write_merged,
                    read_ns: counts.read_ns,
                    write_ns: counts.write_ns,
                    queued: counts.queued,
                }),
                cost: io.cost.map(|cost| pod::CostIo {
                    usage_us: cost.usage_us,
                    wait_us: cost.wait_us,
                    indebt_us: cost.indebt_us,
                    indelay_us: cost.indelay_us,
                }),
            })
            .collect(),
        processes: s.processes,
        threads: s.threads,
        memory_kernel: s.memory_kernel,
        memory_active_file: s.memory_active_file,
        swap_limited: s.swap_limited,
        cpu_burst_periods: s.more.cpu_burst_periods,
        cpu_burst_ns: s.more.cpu_burst_ns,
        memory_high_events: s.more.memory_high_events,
        memory_max_events: s.more.memory_max_events,
        memory_dirty: s.more.memory_dirty,
        memory_writeback: s.more.memory_writeback,
        memory_pages_scanned: s.more.memory_pages_scanned,
        memory_pages_stolen: s.more.memory_pages_stolen,
        memory_refaults_file: s.more.memory_refaults_file,
        memory_refaults_anon: s.more.memory_refaults_anon,
    }
}

/// containerd writes "unlimited" as the largest number.
fn limit(bytes: u64) -> u64 {
    if bytes == 0 { u64::MAX } else { bytes }
}

fn for_containerd_v1(s: &Stats) -> v1::Metrics {
    let inactive_file = s.memory_usage.saturating_sub(s.memory_working_set);
    let entry = |op: &str, major, minor, value| v1::BlkIoEntry {
        op: op.to_owned(),
        device: String::new(),
        major,
        minor,
        value,
    };
    v1::Metrics {
        pids: Some(v1::PidsStat {
            current: s.pids,
            limit: s.pids_limit,
        }),
        cpu: Some(v1::CpuStat {
            usage: Some(v1::CpuUsage {
                total: s.cpu_usage_ns,
                kernel: s.cpu_system_ns,
                user: s.cpu_user_ns,
                per_cpu: Vec::new(),
            }),
            throttling: Some(v1::Throttle {
                periods: s.cpu_periods,
                throttled_periods: s.cpu_throttled_periods,
                throttled_time: s.cpu_throttled_ns,
            }),
        }),
        memory: Some(v1::MemoryStat {
            cache: s.memory_cache,
            rss: s.memory_rss,
            mapped_file: s.memory_mapped_file,
            pg_fault: s.memory_page_faults,
            pg_maj_fault: s.memory_major_page_faults,
            inactive_file,
            total_cache: s.memory_cache,
            total_rss: s.memory_rss,
            total_mapped_file: s.memory_mapped_file,
            total_pg_fault: s.memory_page_faults,
            total_pg_maj_fault: s.memory_major_page_faults,
            total_inactive_file: inactive_file,
            hierarchical_memory_limit: limit(s.memory_limit),
            usage: Some(v1::MemoryEntry {
                limit: limit(s.memory_limit),
                usage: s.memory_usage,
                max: s.memory_peak,
                failcnt: s.memory_failcnt,
            }),
            swap: Some(v1::MemoryEntry {
                limit: limit(s.swap_limit),
                usage: s.swap_usage,
                ..Default::default()
            }),
            ..Default::default()
        }),
        blkio: Some(v1::BlkIoStat {
            io_service_bytes_recursive: s
                .io
                .iter()
                .flat_map(|io| {
                    [
                        entry("Read", io.major, io.minor, io.read_bytes),
                        entry("Write", io.major, io.minor, io.write_bytes),
                    ]
                })
                .collect(),
            io_serviced_recursive: s
                .io
                .iter()
                .flat_map(|io| {
                    [
                        entry("Read", io.major, io.minor, io.read_ios),
                        entry("Write", io.major, io.minor, io.write_ios),
                    ]
                })
                .collect(),
            ..Default::default()
        }),
        memory_oom_control: Some(v1::MemoryOomControl {
            oom_kill: s.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn for_containerd_v2(s: &Stats) -> v2::Metrics {
    let data = |d: PsiData| v2::PsiData {
        avg10: d.avg10,
        avg60: d.avg60,
        avg300: d.avg300,
        total: d.total_us,
    };
    let psi = |p: Psi| v2::PsiStats {
        some: Some(data(p.some)),
        full: Some(data(p.full)),
    };
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: s.pids,
            limit: s.pids_limit,
        }),
        cpu: Some(v2::CpuStat {
            usage_usec: s.cpu_usage_ns / 1000,
            user_usec: s.cpu_user_ns / 1000,
            system_usec: s.cpu_system_ns / 1000,
            nr_periods: s.cpu_periods,
            nr_throttled: s.cpu_throttled_periods,
            throttled_usec: s.cpu_throttled_ns / 1000,
            psi: s.cpu_psi.map(psi),
            ..Default::default()
        }),
        memory: Some(v2::MemoryStat {
            anon: s.memory_rss,
            file: s.memory_cache,
            file_mapped: s.memory_mapped_file,
            inactive_file: s.memory_usage.saturating_sub(s.memory_working_set),
            pgfault: s.memory_page_faults,
            pgmajfault: s.memory_major_page_faults,
            usage: s.memory_usage,
            usage_limit: limit(s.memory_limit),
            max_usage: s.memory_peak,
            swap_usage: s.swap_usage,
            swap_limit: limit(s.swap_limit),
            psi: s.memory_psi.map(psi),
            ..Default::default()
        }),
        io: Some(v2::IoStat {
            usage: s
                .io
                .iter()
                .map(|io| v2::IoEntry {
                    major: io.major,
                    minor: io.minor,
                    rbytes: io.read_bytes,
                    wbytes: io.write_bytes,
                    rios: io.read_ios,
                    wios: io.write_ios,
                })
                .collect(),
            psi: s.io_psi.map(psi),
        }),
        memory_events: Some(v2::MemoryEvents {
            oom_kill: s.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_is_the_largest_number_for_containerd() {
        let stats = Stats {
            memory_usage: 10,
            memory_working_set: 7,
            ..Stats::default()
        };
        let v1 = for_containerd_v1(&stats).memory.expect("memory");
        assert_eq!(v1.usage.map(|u| (u.usage, u.limit)), Some((10, u64::MAX)));
        assert_eq!(v1.total_inactive_file, 3);
        let v2 = for_containerd_v2(&stats).memory.expect("memory");
        assert_eq!((v2.usage, v2.usage_limit), (10, u64::MAX));
    }
}
