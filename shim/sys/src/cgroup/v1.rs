//! Limits on cgroup v1 and hybrid.

use super::resources::{BlockIo, Cpu, HugepageLimit, Memory, Network, Resources, ThrottleDevice};
use super::write::{read_limit, set, set_device_weight, try_write, unsupported, write};
use super::{Cgroup, Result, common};
use std::path::Path;

/// Applies everything but devices.
pub(super) fn apply(cgroup: &Cgroup, r: &Resources) -> Result<()> {
    if let Some(m) = &r.memory {
        memory(cgroup.v1("memory"), m)?;
    }
    if let Some(c) = &r.cpu {
        cpu(cgroup.v1("cpu"), c)?;
        cpuset(cgroup.v1("cpuset"), c)?;
    }
    if let Some(p) = &r.pids {
        common::pids(cgroup.v1("pids"), p)?;
    }
    if let Some(b) = &r.block_io {
        block_io(cgroup.v1("blkio"), b)?;
    }
    for h in r.hugepage_limits.iter().flatten() {
        hugepages(cgroup, h)?;
    }
    if let Some(n) = &r.network {
        network(cgroup, n)?;
    }
    for (device, limit) in r.rdma.iter().flatten() {
        common::rdma(cgroup.v1("rdma"), device, limit)?;
    }
    for (file, value) in r.unified.iter().flatten() {
        common::unified(cgroup.v2(), file, value)?;
    }
    Ok(())
}

/// What v1 writes for "unlimited".
fn bytes(limit: i64) -> String {
    if limit < 0 { "-1".into() } else { limit.to_string() }
}

fn amount(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(u64::MAX)
}

fn memory(dir: Option<&Path>, m: &Memory) -> Result<()> {
    let (limit, swap) = (m.limit.filter(|n| *n != 0), m.swap.filter(|n| *n != 0));
    if m.check_before_update == Some(true)
        && let Some(limit) = limit
    {
        common::check_usage(dir, "memory.usage_in_bytes", amount(limit))?;
    }
    let now = read_limit(dir, "memory.limit_in_bytes").unwrap_or(u64::MAX);
    let now_both = read_limit(dir, "memory.memsw.limit_in_bytes");
    // The kernel holds limit ≤ memory+swap at every moment, so the order of the two depends on the direction.
    let both = match (swap, limit, now_both) {
        (Some(swap), _, _) => Some(swap),
        // Only the limit was given, and it would come to lie above: the room for swap stays what it is.
        (None, Some(limit), Some(now_both)) if now_both != u64::MAX && amount(limit) > now_both => {
            Some(if limit < 0 {
                -1
            } else {
                limit.saturating_add(i64::try_from(now_both.saturating_sub(now)).unwrap_or(0))
            })
        }
        _ => None,
    };
    let set_limit = || {
        limit.map_or(Ok(()), |n| {
            set("memory.limit", dir, "memory.limit_in_bytes", &bytes(n), n < 0)
        })
    };
    let set_both = || {
        both.map_or(Ok(()), |n| {
            // Without swap accounting "no swap at all" and "any swap" cannot be told apart, and nothing is lost.
            let zero = n < 0 || Some(n) == limit;
            set("memory.swap", dir, "memory.memsw.limit_in_bytes", &bytes(n), zero)
        })
    };
    if both.is_some_and(|n| amount(n) > now_both.unwrap_or(u64::MAX)) {
        set_both()?;
        set_limit()?;
    } else {
        set_limit()?;
        set_both()?;
    }
    if let Some(n) = m.reservation.filter(|n| *n != 0) {
        set(
            "memory.reservation",
            dir,
            "memory.soft_limit_in_bytes",
            &bytes(n),
            n < 0,
        )?;
    }
    if let Some(n) = m.kernel_tcp.filter(|n| *n != 0) {
        set(
            "memory.kernelTCP",
            dir,
            "memory.kmem.tcp.limit_in_bytes",
            &bytes(n),
            n < 0,
        )?;
    }
    if let Some(n) = m.swappiness {
        set(
            "memory.swappiness",
            dir,
            "memory.swappiness",
            &n.to_string(),
            false,
        )?;
    }
    if let Some(off) = m.disable_oom_killer {
        set(
            "memory.disableOOMKiller",
            dir,
            "memory.oom_control",
            if off { "1" } else { "0" },
            !off,
        )?;
    }
    Ok(())
}

fn cpu(dir: Option<&Path>, c: &Cpu) -> Result<()> {
    if let Some(n) = c.idle {
        set("cpu.idle", dir, "cpu.idle", &n.to_string(), n == 0)?;
    }
    if let Some(n) = c.shares.filter(|n| *n != 0) {
        set(
            "cpu.shares",
            dir,
            "cpu.shares",
            &n.clamp(2, 262_144).to_string(),
            false,
        )?;
    }
    if c.burst == Some(0) {
        set("cpu.burst", dir, "cpu.cfs_burst_us", "0", true)?;
    }
    let period = c.period.filter(|n| *n != 0).map(|n| n.to_string());
    let quota = c.quota.filter(|n| *n != 0);
    let set_quota = || {
        quota.map_or(Ok(()), |n| {
            set(
                "cpu.quota",
                dir,
                "cpu.cfs_quota_us",
                &n.max(-1).to_string(),
                n < 0,
            )
        })
    };
    match (&period, dir.filter(|d| d.join("cpu.cfs_period_us").exists())) {
        // The old quota with the new period may be more than the parent allows: then the quota comes first.
        (Some(p), Some(d)) if quota.is_some() && try_write(&d.join("cpu.cfs_period_us"), p).is_err() => {
            set_quota()?;
            write("cpu.period", d.join("cpu.cfs_period_us"), p)?;
        }
        (Some(_), Some(_)) if quota.is_some() => set_quota()?,
        (Some(p), _) => {
            set(
                "cpu.period",
                dir,
                "cpu.cfs_period_us",
                p,
                quota.is_none_or(|q| q < 0),
            )?;
            set_quota()?;
        }
        (None, _) => set_quota()?,
    }
    if let Some(n) = c.burst.filter(|n| *n != 0) {
        set("cpu.burst", dir, "cpu.cfs_burst_us", &n.to_string(), false)?;
    }
    if let Some(n) = c.realtime_period.filter(|n| *n != 0) {
        set(
            "cpu.realtimePeriod",
            dir,
            "cpu.rt_period_us",
            &n.to_string(),
            false,
        )?;
    }
    if let Some(n) = c.realtime_runtime.filter(|n| *n != 0) {
        set(
            "cpu.realtimeRuntime",
            dir,
            "cpu.rt_runtime_us",
            &n.to_string(),
            false,
        )?;
    }
    Ok(())
}

fn cpuset(dir: Option<&Path>, c: &Cpu) -> Result<()> {
    for (key, file, value) in [
        ("cpu.cpus", "cpuset.cpus", &c.cpus),
        ("cpu.mems", "cpuset.mems", &c.mems),
    ] {
        if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
            set(key, dir, file, value, false)?;
        }
    }
    Ok(())
}

fn block_io(dir: Option<&Path>, b: &BlockIo) -> Result<()> {
    let file = |plain: &'static str, bfq: &'static str| {
        if dir.is_some_and(|d| d.join(plain).exists()) {
            plain
        } else {
            bfq
        }
    };
    let weight = file("blkio.weight", "blkio.bfq.weight");
    let by_device = file("blkio.weight_device", "blkio.bfq.weight_device");
    if let Some(n) = b.weight.filter(|n| *n != 0) {
        set("blockIO.weight", dir, weight, &n.to_string(), false)?;
    }
    if let Some(n) = b.leaf_weight.filter(|n| *n != 0) {
        set(
            "blockIO.leafWeight",
            dir,
            "blkio.leaf_weight",
            &n.to_string(),
            false,
        )?;
    }
    for d in b.weight_device.iter().flatten() {
        if let Some(n) = d.weight.filter(|n| *n != 0) {
            set_device_weight(dir, by_device, (d.major, d.minor), n.into())?;
        }
        if d.leaf_weight.is_some_and(|n| n != 0) {
            return Err(unsupported(
                "blockIO.weightDevice.leafWeight",
                "kernels since 5.0 have none",
            ));
        }
    }
    let throttles: [(&str, &str, &Option<Vec<ThrottleDevice>>); 4] = [
        (
            "blockIO.throttleReadBpsDevice",
            "blkio.throttle.read_bps_device",
            &b.throttle_read_bps_device,
        ),
        (
            "blockIO.throttleWriteBpsDevice",
            "blkio.throttle.write_bps_device",
            &b.throttle_write_bps_device,
        ),
        (
            "blockIO.throttleReadIOPSDevice",
            "blkio.throttle.read_iops_device",
            &b.throttle_read_iops_device,
        ),
        (
            "blockIO.throttleWriteIOPSDevice",
            "blkio.throttle.write_iops_device",
            &b.throttle_write_iops_device,
        ),
    ];
    for (key, file, list) in throttles {
        for t in list.iter().flatten() {
            set(
                key,
                dir,
                file,
                &format!("{}:{} {}", t.major, t.minor, t.rate),
                t.rate == 0,
            )?;
        }
    }
    Ok(())
}

/// On a hybrid machine hugetlb may be a v1 hierarchy, or belong to the v2 one.
fn hugepages(cgroup: &Cgroup, h: &HugepageLimit) -> Result<()> {
    match cgroup.v1("hugetlb") {
        Some(dir) => {
            let size = common::page_size(h)?;
            let (limit, key) = (h.limit.to_string(), format!("hugepageLimits.{size}"));
            set(
                &key,
                Some(dir),
                &format!("hugetlb.{size}.limit_in_bytes"),
                &limit,
                h.limit == 0,
            )?;
            set(
                &key,
                Some(dir),
                &format!("hugetlb.{size}.rsvd.limit_in_bytes"),
                &limit,
                true,
            )
        }
        None => common::hugepages_v2(cgroup.v2(), h),
    }
}

fn network(cgroup: &Cgroup, n: &Network) -> Result<()> {
    if let Some(class) = n.class_id {
        set(
            "network.classID",
            cgroup.v1("net_cls"),
            "net_cls.classid",
            &class.to_string(),
            class == 0,
        )?;
    }
    for p in n.priorities.iter().flatten() {
        let line = format!("{} {}", p.name, p.priority);
        set(
            "network.priorities",
            cgroup.v1("net_prio"),
            "net_prio.ifpriomap",
            &line,
            p.priority == 0,
        )?;
    }
    Ok(())
}
