//! Limits on cgroup v2: OCI speaks v1, so most of this is translation.

use super::resources::{BlockIo, Cpu, Memory, Resources, ThrottleDevice};
use super::write::{read, read_limit, set, set_device_weight, unsupported};
use super::{Cgroup, Result, common};
use std::path::Path;

/// Applies everything but devices.
pub(super) fn apply(cgroup: &Cgroup, r: &Resources) -> Result<()> {
    let dir = cgroup.v2();
    if let Some(m) = &r.memory {
        memory(dir, m)?;
    }
    if let Some(c) = &r.cpu {
        cpu(dir, c)?;
    }
    if let Some(p) = &r.pids {
        common::pids(dir, p)?;
    }
    if let Some(b) = &r.block_io {
        block_io(dir, b)?;
    }
    for h in r.hugepage_limits.iter().flatten() {
        common::hugepages_v2(dir, h)?;
    }
    for (device, limit) in r.rdma.iter().flatten() {
        common::rdma(dir, device, limit)?;
    }
    if let Some(n) = &r.network {
        let zero = n.class_id.unwrap_or(0) == 0 && n.priorities.iter().flatten().all(|p| p.priority == 0);
        if !zero {
            return Err(unsupported("network", "cgroup v2 has no network classes"));
        }
    }
    for (file, value) in r.unified.iter().flatten() {
        common::unified(dir, file, value)?;
    }
    Ok(())
}

fn bytes(limit: i64) -> String {
    if limit < 0 {
        "max".into()
    } else {
        limit.to_string()
    }
}

fn memory(dir: Option<&Path>, m: &Memory) -> Result<()> {
    let limit = m.limit.filter(|n| *n != 0);
    if let Some(n) = limit {
        if m.check_before_update == Some(true) && n > 0 {
            common::check_usage(dir, "memory.current", n.unsigned_abs())?;
        }
        set("memory.limit", dir, "memory.max", &bytes(n), n < 0)?;
    }
    if let Some(swap) = swap_v2(dir, m, limit)? {
        set("memory.swap", dir, "memory.swap.max", &bytes(swap), swap <= 0)?;
    }
    if let Some(n) = m.reservation.filter(|n| *n != 0) {
        set("memory.reservation", dir, "memory.low", &bytes(n), n < 0)?;
    }
    if m.kernel_tcp.is_some_and(|n| n > 0) {
        return Err(unsupported("memory.kernelTCP", "cgroup v2 has no such limit"));
    }
    if m.swappiness.is_some() {
        return Err(unsupported("memory.swappiness", "cgroup v2 has no swappiness"));
    }
    if m.disable_oom_killer == Some(true) {
        return Err(unsupported(
            "memory.disableOOMKiller",
            "cgroup v2 cannot switch the OOM killer off",
        ));
    }
    Ok(())
}

/// OCI's swap is memory + swap; v2's is swap alone. Without a limit in this update, the one in force counts.
fn swap_v2(dir: Option<&Path>, m: &Memory, limit: Option<i64>) -> Result<Option<i64>> {
    let swap = match m.swap.filter(|n| *n != 0) {
        None => return Ok((limit == Some(-1)).then_some(-1)),
        Some(n) if n < 0 => return Ok(Some(-1)),
        Some(n) => n,
    };
    let limit = match limit {
        Some(n) if n < 0 => return Ok(Some(swap)),
        Some(n) => n,
        None => match read_limit(dir, "memory.max") {
            Some(n) if n != u64::MAX => i64::try_from(n).unwrap_or(i64::MAX),
            _ => {
                return Err(unsupported(
                    "memory.swap",
                    "there is no memory limit to take it from",
                ));
            }
        },
    };
    if swap < limit {
        return Err(unsupported(
            "memory.swap",
            format!("{swap} is memory and swap, less than memory alone ({limit})"),
        ));
    }
    Ok(Some(swap - limit))
}

fn cpu(dir: Option<&Path>, c: &Cpu) -> Result<()> {
    if let Some(n) = c.idle {
        set("cpu.idle", dir, "cpu.idle", &n.to_string(), n == 0)?;
    }
    // An idle group has no weight: the kernel refuses one.
    if let Some(n) = c.shares.filter(|n| *n != 0 && c.idle != Some(1)) {
        set("cpu.shares", dir, "cpu.weight", &weight(n).to_string(), false)?;
    }
    if c.burst == Some(0) {
        set("cpu.burst", dir, "cpu.max.burst", "0", true)?;
    }
    let (quota, period) = (c.quota.filter(|n| *n != 0), c.period.filter(|n| *n != 0));
    if quota.is_some() || period.is_some() {
        let now = read(dir, "cpu.max").unwrap_or_default();
        let (now_quota, now_period) = now.split_once(' ').unwrap_or(("max", "100000"));
        let quota = quota.map_or(now_quota.to_string(), |n| {
            if n < 0 { "max".into() } else { n.to_string() }
        });
        let period = period.map_or(now_period.to_string(), |n| n.to_string());
        set(
            "cpu.quota",
            dir,
            "cpu.max",
            &format!("{quota} {period}"),
            quota == "max",
        )?;
    }
    if let Some(n) = c.burst.filter(|n| *n != 0) {
        set("cpu.burst", dir, "cpu.max.burst", &n.to_string(), false)?;
    }
    if c.realtime_runtime.unwrap_or(0) != 0 || c.realtime_period.unwrap_or(0) != 0 {
        return Err(unsupported(
            "cpu.realtimeRuntime",
            "cgroup v2 has no realtime limits",
        ));
    }
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

/// v1's shares (2 … 1024 … 262144) as v2's weight (1 … 100 … 10000): the curve through these three points in
/// logarithms that Kubernetes, runc and crun share, so that a pod's and its containers' weights compare.
pub(super) fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        n => {
            let log = (n as f64).log2();
            let exponent = log * (log + 125.0) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

/// v1's 10 … 1000 as v2's 1 … 10000.
pub(super) fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight.clamp(10, 1000) - 10) * 9999 / 990
}

/// Whether the weight of block IO is the BFQ scheduler's.
pub(super) fn has_bfq(dir: Option<&Path>) -> bool {
    dir.is_some_and(|d| d.join("io.bfq.weight").exists())
}

fn block_io(dir: Option<&Path>, b: &BlockIo) -> Result<()> {
    let bfq = has_bfq(dir);
    let file = if bfq { "io.bfq.weight" } else { "io.weight" };
    let value = |n: u16| if bfq { u64::from(n) } else { io_weight(n) };
    if let Some(n) = b.weight.filter(|n| *n != 0) {
        let line = if bfq {
            value(n).to_string()
        } else {
            format!("default {}", value(n))
        };
        set("blockIO.weight", dir, file, &line, false)?;
    }
    for d in b.weight_device.iter().flatten() {
        if let Some(n) = d.weight.filter(|n| *n != 0) {
            set_device_weight(dir, file, (d.major, d.minor), value(n))?;
        }
    }
    if b.leaf_weight.is_some_and(|n| n != 0) {
        return Err(unsupported("blockIO.leafWeight", "cgroup v2 has none"));
    }
    let throttles: [(&str, &str, &Option<Vec<ThrottleDevice>>); 4] = [
        (
            "blockIO.throttleReadBpsDevice",
            "rbps",
            &b.throttle_read_bps_device,
        ),
        (
            "blockIO.throttleWriteBpsDevice",
            "wbps",
            &b.throttle_write_bps_device,
        ),
        (
            "blockIO.throttleReadIOPSDevice",
            "riops",
            &b.throttle_read_iops_device,
        ),
        (
            "blockIO.throttleWriteIOPSDevice",
            "wiops",
            &b.throttle_write_iops_device,
        ),
    ];
    for (key, name, list) in throttles {
        for t in list.iter().flatten() {
            let rate = if t.rate == 0 {
                "max".into()
            } else {
                t.rate.to_string()
            };
            set(
                key,
                dir,
                "io.max",
                &format!("{}:{} {name}={rate}", t.major, t.minor),
                t.rate == 0,
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_agree_with_kubernetes_at_the_points_it_documents() {
        let pairs = [
            (0, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (1 << 40, 10_000),
            (512, 59),
            (102, 17),
        ];
        for (shares, expected) in pairs {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert_eq!((io_weight(10), io_weight(1000), io_weight(0)), (1, 10_000, 1));
    }
}
