//! Limits, of pods and containers, at creation and later.

use slipway_cri_api::v1;

use super::{Invalid, invalid};
use crate::model::Resources;

/// A CRI resources message; whether the kernel takes each limit is found out when it is set.
pub fn resources(field: &'static str, r: &v1::LinuxContainerResources) -> Result<Resources, Invalid> {
    let least = |name: &str, value: i64, least: i64| {
        if value < least {
            Err(invalid(field, format!("{name} is {value}, less than {least}")))
        } else {
            Ok(())
        }
    };
    least("cpu_period", r.cpu_period, 0)?;
    least("cpu_quota", r.cpu_quota, -1)?;
    least("cpu_shares", r.cpu_shares, 0)?;
    least("memory_limit_in_bytes", r.memory_limit_in_bytes, -1)?;
    least("memory_swap_limit_in_bytes", r.memory_swap_limit_in_bytes, -1)?;
    least("oom_score_adj", r.oom_score_adj, -1000)?;
    if r.oom_score_adj > 1000 {
        return Err(invalid(
            field,
            format!("oom_score_adj is {}, more than 1000", r.oom_score_adj),
        ));
    }
    Ok(Resources {
        limits: slipway_spec::Resources {
            cpu_period: r.cpu_period,
            cpu_quota: r.cpu_quota,
            cpu_shares: r.cpu_shares,
            memory_limit: r.memory_limit_in_bytes,
            memory_swap_limit: r.memory_swap_limit_in_bytes,
            memory_reservation: 0,
            cpuset_cpus: r.cpuset_cpus.clone(),
            cpuset_mems: r.cpuset_mems.clone(),
            pids_limit: 0,
            hugepage_limits: r
                .hugepage_limits
                .iter()
                .map(|h| (h.page_size.clone(), h.limit))
                .collect(),
            unified: r.unified.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        },
        oom_score_adj: r.oom_score_adj,
    })
}
