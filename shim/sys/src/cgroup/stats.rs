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

/// As [`oom_kills`], of a directory of v2; none when that is not there.
pub(super) fn oom_kills_in(dir: &Path) -> Option<u64> {
    read(Some(dir), "memory.events").map(|events| field(&events, "oom_kill"))
}

fn limit(value: Option<u64>) -> u64 {
    value.filter(|n| *n != u64::MAX).unwrap_or(0)
}

/// "name value" lines.
fn field(text: &str, name: &str) -> u64 {
    known(text, name).unwrap_or(0)
}

/// The same, where it is there.
fn known(text: &str, name: &str) -> Option<u64> {
    let found = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    found.and_then(|n| n.trim().parse().ok())
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
    s.more.memory_dirty = known(&stat, "total_dirty");
    s.more.memory_writeback = known(&stat, "total_writeback");
    s.more.memory_refaults_file = known(&stat, "total_workingset_refault_file");
    s.more.memory_refaults_anon = known(&stat, "total_workingset_refault_anon");
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
    s.more.memory_dirty = known(&stat, "file_dirty");
    s.more.memory_writeback = known(&stat, "file_writeback");
    s.more.memory_refaults_file = known(&stat, "workingset_refault_file");
    s.more.memory_refaults_anon = known(&stat, "workingset_refault_anon");
    s.more.memory_pages_scanned = known(&stat, "pgscan");
    s.more.memory_pages_stolen = known(&stat, "pgsteal");
    s.more.memory_high_events = known(&events, "high");
    s.more.memory_max_events = known(&events, "max");
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
    s.more.cpu_burst_periods = known(&stat, "nr_bursts");
    s.more.cpu_burst_ns = known(&stat, "burst_time");
}

fn cpu_v2(s: &mut Stats, dir: Option<&Path>) {
    let stat = read(dir, "cpu.stat").unwrap_or_default();
    s.cpu_usage_ns = field(&stat, "usage_usec") * 1000;
    s.cpu_user_ns = field(&stat, "user_usec") * 1000;
    s.cpu_system_ns = field(&stat, "system_usec") * 1000;
    s.cpu_periods = field(&stat, "nr_periods");
    s.cpu_throttled_periods = field(&stat, "nr_throttled");
    s.cpu_throttled_ns = field(&stat, "throttled_usec") * 1000;
    s.more.cpu_burst_periods = known(&stat, "nr_bursts");
    s.more.cpu_burst_ns = known(&stat, "burst_usec").map(|us| us * 1000);
}

fn io_v1(s: &mut Stats, dir: &Path) {
    let text = |file| read(Some(dir), file).unwrap_or_default();
    each_v1(
        &text("blkio.throttle.io_service_bytes_recursive"),
        |device, what, n| {
            let entry = entry_of(&mut s.io, device);
            match what {
                "Read" => entry.read_bytes = n,
                "Write" => entry.write_bytes = n,
                "Discard" => entry.discard_bytes = Some(n),
                "Sync" => entry.sync_bytes = Some(n),
                "Async" => entry.async_bytes = Some(n),
                _ => {}
            }
        },
    );
    each_v1(
        &text("blkio.throttle.io_serviced_recursive"),
        |device, what, n| {
            let entry = entry_of(&mut s.io, device);
            match what {
                "Read" => entry.read_ios = n,
                "Write" => entry.write_ios = n,
                _ => {}
            }
        },
    );
    // Kernels built to debug BFQ.
    each_v1(&text("blkio.bfq.io_merged_recursive"), |device, what, n| {
        let counts = entry_of(&mut s.io, device).scheduler.get_or_insert_default();
        match what {
            "Read" => counts.read_merged = n,
            "Write" => counts.write_merged = n,
            _ => {}
        }
    });
    each_v1(&text("blkio.bfq.io_service_time_recursive"), |device, what, n| {
        let counts = entry_of(&mut s.io, device).scheduler.get_or_insert_default();
        match what {
            "Read" => counts.read_ns = n,
            "Write" => counts.write_ns = n,
            _ => {}
        }
    });
    each_v1(&text("blkio.bfq.io_queued_recursive"), |device, what, n| {
        if what == "Total" {
            entry_of(&mut s.io, device)
                .scheduler
                .get_or_insert_default()
                .queued = n;
        }
    });
}

/// "8:0 Read 4096" lines.
fn each_v1(text: &str, mut take: impl FnMut((u64, u64), &str, u64)) {
    for line in text.lines() {
        let mut words = line.split(' ');
        let (Some(device), Some(what), Some(n)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        if let (Some(device), Ok(n)) = (device_number(device), n.parse()) {
            take(device, what, n);
        }
    }
}

fn device_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn entry_of(list: &mut Vec<BlkIoStats>, (major, minor): (u64, u64)) -> &mut BlkIoStats {
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

/// v2: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0", and "cost.usage=5 …" where there is a cost model.
fn parse_io_stat(text: &str) -> Vec<BlkIoStats> {
    let mut list = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let Some(device) = words.next().and_then(device_number) else {
            continue;
        };
        let entry = entry_of(&mut list, device);
        for (name, value) in words.filter_map(|w| w.split_once('=')) {
            let n = value.parse().unwrap_or(0);
            match name {
                "rbytes" => entry.read_bytes = n,
                "wbytes" => entry.write_bytes = n,
                "rios" => entry.read_ios = n,
                "wios" => entry.write_ios = n,
                "dbytes" => entry.discard_bytes = Some(n),
                "cost.usage" => entry.cost.get_or_insert_default().usage_us = n,
                "cost.wait" => entry.cost.get_or_insert_default().wait_us = n,
                "cost.indebt" => entry.cost.get_or_insert_default().indebt_us = n,
                "cost.indelay" => entry.cost.get_or_insert_default().indelay_us = n,
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
    use super::super::{CostIo, More, SchedulerIo};
    use super::*;

    #[test]
    fn io_and_pressure_are_parsed() {
        let io = parse_io_stat(
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=9 cost.usage=5 cost.wait=6 cost.indebt=7 cost.indelay=8\n253:1 rbytes=5\n",
        );
        let first = BlkIoStats {
            major: 8,
            minor: 0,
            read_bytes: 1,
            write_bytes: 2,
            read_ios: 3,
            write_ios: 4,
            discard_bytes: Some(9),
            cost: Some(CostIo {
                usage_us: 5,
                wait_us: 6,
                indebt_us: 7,
                indelay_us: 8,
            }),
            ..BlkIoStats::default()
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
    /// Files of a cgroup with two lines each, in a directory of the test's own.
    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn what_some_kernels_count_is_read_where_it_is_and_is_nothing_elsewhere() {
        let v2 = files(&[
            (
                "memory.stat",
                "file_dirty 11\nfile_writeback 12\npgscan 13\npgsteal 14\nworkingset_refault_anon 15\nworkingset_refault_file 16\n",
            ),
            ("memory.events", "low 0\nhigh 21\nmax 22\noom 0\n"),
            ("cpu.stat", "usage_usec 1\nnr_bursts 31\nburst_usec 32\n"),
        ]);
        let mut s = Stats::default();
        memory_v2(&mut s, Some(v2.path()));
        cpu_v2(&mut s, Some(v2.path()));
        let expected = More {
            cpu_burst_periods: Some(31),
            cpu_burst_ns: Some(32_000),
            memory_high_events: Some(21),
            memory_max_events: Some(22),
            memory_dirty: Some(11),
            memory_writeback: Some(12),
            memory_pages_scanned: Some(13),
            memory_pages_stolen: Some(14),
            memory_refaults_anon: Some(15),
            memory_refaults_file: Some(16),
        };
        assert_eq!(s.more, expected);
        let v1 = files(&[
            (
                "memory.stat",
                "dirty 1\ntotal_dirty 11\ntotal_writeback 12\ntotal_workingset_refault_anon 15\ntotal_workingset_refault_file 16\n",
            ),
            ("cpu.stat", "nr_periods 1\nnr_bursts 31\nburst_time 32\n"),
        ]);
        let mut s = Stats::default();
        memory_v1(&mut s, v1.path());
        cpu_v1(&mut s, v1.path(), Some(v1.path()));
        let expected = More {
            cpu_burst_ns: Some(32),
            memory_high_events: None,
            memory_max_events: None,
            memory_pages_scanned: None,
            memory_pages_stolen: None,
            ..expected
        };
        assert_eq!(s.more, expected);
        let nothing = files(&[]);
        let mut s = Stats::default();
        memory_v1(&mut s, nothing.path());
        cpu_v1(&mut s, nothing.path(), Some(nothing.path()));
        memory_v2(&mut s, Some(nothing.path()));
        assert_eq!(s.more, More::default());
    }

    #[test]
    fn the_io_of_v1_is_gathered_from_its_files() {
        let lines = |read, write| {
            format!(
                "8:0 Read {read}\n8:0 Write {write}\n8:0 Sync 3\n8:0 Async 4\n8:0 Discard 5\n8:0 Total 6\nTotal 6\n"
            )
        };
        let (throttle, bfq) = (lines(1, 2), lines(7, 8));
        let dir = files(&[
            ("blkio.throttle.io_service_bytes_recursive", &throttle),
            ("blkio.throttle.io_serviced_recursive", &throttle),
        ]);
        let mut s = Stats::default();
        io_v1(&mut s, dir.path());
        let plain = BlkIoStats {
            major: 8,
            minor: 0,
            read_bytes: 1,
            write_bytes: 2,
            read_ios: 1,
            write_ios: 2,
            discard_bytes: Some(5),
            sync_bytes: Some(3),
            async_bytes: Some(4),
            scheduler: None,
            cost: None,
        };
        assert_eq!(s.io, [plain]);
        for file in ["io_merged", "io_service_time", "io_queued"] {
            std::fs::write(dir.path().join(format!("blkio.bfq.{file}_recursive")), &bfq).unwrap();
        }
        let mut s = Stats::default();
        io_v1(&mut s, dir.path());
        let scheduler = SchedulerIo {
            read_merged: 7,
            write_merged: 8,
            read_ns: 7,
            write_ns: 8,
            queued: 6,
        };
        assert_eq!(s.io[0].scheduler, Some(scheduler));
    }
}
