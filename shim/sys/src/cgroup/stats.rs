//! Measuring a cgroup, from the files of both versions. A file or line that is not there leaves zeros.

use super::write::{read, read_limit};
use super::{BlkIoStats, Cgroup, Psi, PsiData, Stats};
use std::path::Path;

pub(super) fn stats(cgroup: &Cgroup) -> Stats {
    let mut s = Stats::default();
    match cgroup.v1("memory") {
        Some(dir) => memory_v1(&mut s, dir),
        None => memory_v2(&mut s, cgroup.v2()),
    }
    s.memory_working_set = s.memory_usage.saturating_sub(s.memory_working_set);
    match cgroup.v1("cpuacct") {
        Some(dir) => cpu_v1(&mut s, dir, cgroup.v1("cpu")),
        None => cpu_v2(&mut s, cgroup.v2()),
    }
    let pids = cgroup.v1("pids").or(cgroup.v2());
    s.pids = read_limit(pids, "pids.current").unwrap_or(0);
    s.pids_limit = limit(read_limit(pids, "pids.max"));
    match cgroup.v1("blkio") {
        Some(dir) => io_v1(&mut s, dir),
        None => s.io = parse_io_stat(&read(cgroup.v2(), "io.stat").unwrap_or_default()),
    }
    let pressure = |file| read(cgroup.v2(), file).and_then(|t| parse_psi(&t));
    s.cpu_psi = pressure("cpu.pressure");
    s.memory_psi = pressure("memory.pressure");
    s.io_psi = pressure("io.pressure");
    s
}

/// How many processes the OOM killer killed. v1's counter is the cgroup's own, v2's counts those below as well.
pub(super) fn oom_kills(cgroup: &Cgroup) -> u64 {
    match cgroup.v1("memory") {
        Some(dir) => field(
            &read(Some(dir), "memory.oom_control").unwrap_or_default(),
            "oom_kill",
        ),
        None => field(
            &read(cgroup.v2(), "memory.events").unwrap_or_default(),
            "oom_kill",
        ),
    }
}

fn limit(value: Option<u64>) -> u64 {
    value.filter(|n| *n != u64::MAX).unwrap_or(0)
}

/// "name value" lines.
fn field(text: &str, name: &str) -> u64 {
    let found = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    found.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn memory_v1(s: &mut Stats, dir: &Path) {
    let dir = Some(dir);
    let number = |file| read_limit(dir, file).unwrap_or(0);
    let stat = read(dir, "memory.stat").unwrap_or_default();
    s.memory_usage = number("memory.usage_in_bytes");
    s.memory_limit = limit(read_limit(dir, "memory.limit_in_bytes"));
    s.memory_peak = number("memory.max_usage_in_bytes");
    s.memory_failcnt = number("memory.failcnt");
    // Taken off the usage by the caller.
    s.memory_working_set = field(&stat, "total_inactive_file");
    s.memory_rss = field(&stat, "total_rss");
    s.memory_cache = field(&stat, "total_cache");
    s.memory_mapped_file = field(&stat, "total_mapped_file");
    s.memory_page_faults = field(&stat, "total_pgfault");
    s.memory_major_page_faults = field(&stat, "total_pgmajfault");
    s.swap_usage =
        read_limit(dir, "memory.memsw.usage_in_bytes").map_or(0, |n| n.saturating_sub(s.memory_usage));
    let both = limit(read_limit(dir, "memory.memsw.limit_in_bytes"));
    s.swap_limited = both > 0;
    s.swap_limit = both.saturating_sub(s.memory_limit);
    s.memory_kernel = number("memory.kmem.usage_in_bytes");
    s.memory_active_file = field(&stat, "total_active_file");
    s.oom_kills = field(&read(dir, "memory.oom_control").unwrap_or_default(), "oom_kill");
}

fn memory_v2(s: &mut Stats, dir: Option<&Path>) {
    let stat = read(dir, "memory.stat").unwrap_or_default();
    let events = read(dir, "memory.events").unwrap_or_default();
    s.memory_usage = read_limit(dir, "memory.current").unwrap_or(0);
    s.memory_limit = limit(read_limit(dir, "memory.max"));
    s.memory_peak = read_limit(dir, "memory.peak").unwrap_or(0);
    s.memory_failcnt = field(&events, "max");
    s.memory_working_set = field(&stat, "inactive_file");
    s.memory_rss = field(&stat, "anon");
    s.memory_cache = field(&stat, "file");
    s.memory_mapped_file = field(&stat, "file_mapped");
    s.memory_page_faults = field(&stat, "pgfault");
    s.memory_major_page_faults = field(&stat, "pgmajfault");
    s.swap_usage = read_limit(dir, "memory.swap.current").unwrap_or(0);
    let most = read_limit(dir, "memory.swap.max").filter(|n| *n != u64::MAX);
    s.swap_limited = most.is_some();
    s.swap_limit = most.unwrap_or(0);
    s.memory_kernel = field(&stat, "kernel");
    s.memory_active_file = field(&stat, "active_file");
    s.oom_kills = field(&events, "oom_kill");
}

fn cpu_v1(s: &mut Stats, acct: &Path, cpu: Option<&Path>) {
    let number = |file| read_limit(Some(acct), file).unwrap_or(0);
    s.cpu_usage_ns = number("cpuacct.usage");
    s.cpu_user_ns = number("cpuacct.usage_user");
    s.cpu_system_ns = number("cpuacct.usage_sys");
    let stat = read(cpu, "cpu.stat").unwrap_or_default();
    s.cpu_periods = field(&stat, "nr_periods");
    s.cpu_throttled_periods = field(&stat, "nr_throttled");
    s.cpu_throttled_ns = field(&stat, "throttled_time");
}

fn cpu_v2(s: &mut Stats, dir: Option<&Path>) {
    let stat = read(dir, "cpu.stat").unwrap_or_default();
    s.cpu_usage_ns = field(&stat, "usage_usec") * 1000;
    s.cpu_user_ns = field(&stat, "user_usec") * 1000;
    s.cpu_system_ns = field(&stat, "system_usec") * 1000;
    s.cpu_periods = field(&stat, "nr_periods");
    s.cpu_throttled_periods = field(&stat, "nr_throttled");
    s.cpu_throttled_ns = field(&stat, "throttled_usec") * 1000;
}

fn io_v1(s: &mut Stats, dir: &Path) {
    let bytes = read(Some(dir), "blkio.throttle.io_service_bytes_recursive").unwrap_or_default();
    let ios = read(Some(dir), "blkio.throttle.io_serviced_recursive").unwrap_or_default();
    for (line, is_bytes) in bytes
        .lines()
        .map(|l| (l, true))
        .chain(ios.lines().map(|l| (l, false)))
    {
        let mut words = line.split(' ');
        let (Some(device), Some(what), Some(n)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let (Some((major, minor)), Ok(n)) = (device_number(device), n.parse()) else {
            continue;
        };
        let entry = entry_of(&mut s.io, major, minor);
        match (what, is_bytes) {
            ("Read", true) => entry.read_bytes = n,
            ("Write", true) => entry.write_bytes = n,
            ("Read", false) => entry.read_ios = n,
            ("Write", false) => entry.write_ios = n,
            _ => {}
        }
    }
}

fn device_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn entry_of(list: &mut Vec<BlkIoStats>, major: u64, minor: u64) -> &mut BlkIoStats {
    let at = list
        .iter()
        .position(|e| (e.major, e.minor) == (major, minor))
        .unwrap_or_else(|| {
            list.push(BlkIoStats {
                major,
                minor,
                ..BlkIoStats::default()
            });
            list.len() - 1
        });
    &mut list[at]
}

/// v2: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0".
fn parse_io_stat(text: &str) -> Vec<BlkIoStats> {
    let mut list = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(device_number) else {
            continue;
        };
        let entry = entry_of(&mut list, major, minor);
        for (name, value) in words.filter_map(|w| w.split_once('=')) {
            let n = value.parse().unwrap_or(0);
            match name {
                "rbytes" => entry.read_bytes = n,
                "wbytes" => entry.write_bytes = n,
                "rios" => entry.read_ios = n,
                "wios" => entry.write_ios = n,
                _ => {}
            }
        }
    }
    list
}

/// "some avg10=0.00 avg60=0.00 avg300=0.00 total=0", then "full …".
fn parse_psi(text: &str) -> Option<Psi> {
    let mut psi = Psi::default();
    for line in text.lines() {
        let (name, rest) = line.split_once(' ')?;
        let mut data = PsiData::default();
        for (key, value) in rest.split(' ').filter_map(|w| w.split_once('=')) {
            let number = || value.parse().unwrap_or(0.0);
            match key {
                "avg10" => data.avg10 = number(),
                "avg60" => data.avg60 = number(),
                "avg300" => data.avg300 = number(),
                "total" => data.total_us = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match name {
            "some" => psi.some = data,
            "full" => psi.full = data,
            _ => {}
        }
    }
    Some(psi)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_and_pressure_are_parsed() {
        let io = parse_io_stat("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=9\n253:1 rbytes=5\n");
        let first = BlkIoStats {
            major: 8,
            minor: 0,
            read_bytes: 1,
            write_bytes: 2,
            read_ios: 3,
            write_ios: 4,
        };
        assert_eq!(io[0], first);
        assert_eq!((io.len(), io[1].read_bytes), (2, 5));
        let psi = parse_psi(
            "some avg10=1.50 avg60=0.20 avg300=0.00 total=77\nfull avg10=0.50 avg60=0 avg300=0 total=5",
        );
        let psi = psi.unwrap();
        assert_eq!(
            (psi.some.avg10, psi.some.total_us, psi.full.total_us),
            (1.5, 77, 5)
        );
        assert_eq!(field("oom 3\noom_kill 2\noom_kill_disable 9", "oom_kill"), 2);
    }
}
