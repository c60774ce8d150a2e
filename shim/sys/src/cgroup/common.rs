//! Limits that are the same, or nearly, on both versions.

use super::resources::{HugepageLimit, Pids, Rdma};
use super::write::{missing, read_limit, set, unsupported};
use super::{CgroupError, Result};
use std::path::Path;

pub(super) fn pids(dir: Option<&Path>, p: &Pids) -> Result<()> {
    match p.limit {
        0 => Ok(()),
        n if n < 0 => set("pids.limit", dir, "pids.max", "max", true),
        n => set("pids.limit", dir, "pids.max", &n.to_string(), false),
    }
}

pub(super) fn rdma(dir: Option<&Path>, device: &str, limit: &Rdma) -> Result<()> {
    let mut line = device.to_string();
    for (name, value) in [
        ("hca_handle", limit.hca_handles),
        ("hca_object", limit.hca_objects),
    ] {
        if let Some(n) = value {
            line.push_str(&format!(" {name}={n}"));
        }
    }
    let zero = [limit.hca_handles, limit.hca_objects]
        .into_iter()
        .flatten()
        .all(|n| n == 0);
    set(&format!("rdma.{device}"), dir, "rdma.max", &line, zero)
}

/// "2MB" names files: nothing else than a number and a unit may.
pub(super) fn page_size(h: &HugepageLimit) -> Result<&str> {
    let size = h.page_size.as_str();
    let digits = size.trim_end_matches(['K', 'M', 'G', 'B']);
    if digits.is_empty() || digits.len() == size.len() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(unsupported("hugepageLimits", format!("{size:?} is no page size")));
    }
    Ok(size)
}

pub(super) fn hugepages_v2(dir: Option<&Path>, h: &HugepageLimit) -> Result<()> {
    let size = page_size(h)?;
    let (limit, key) = (h.limit.to_string(), format!("hugepageLimits.{size}"));
    set(&key, dir, &format!("hugetlb.{size}.max"), &limit, h.limit == 0)?;
    set(&key, dir, &format!("hugetlb.{size}.rsvd.max"), &limit, true)
}

/// OCI's `unified`: a file's name and what to write, line by line.
pub(super) fn unified(dir: Option<&Path>, file: &str, value: &str) -> Result<()> {
    let key = format!("unified.{file}");
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_');
    if !file.contains('.') || file.starts_with('.') || !file.bytes().all(plain) {
        return Err(unsupported(&key, "it is no name of a cgroup file"));
    }
    if file.starts_with("cgroup.") && !file.starts_with("cgroup.max.") {
        return Err(unsupported(
            &key,
            "it steers the cgroup itself, which is not a limit",
        ));
    }
    let zero = matches!(value.trim(), "" | "0" | "max");
    if dir.is_none_or(|d| !d.join(file).exists()) && !zero {
        return Err(missing(&key, file));
    }
    value
        .lines()
        .try_for_each(|line| set(&key, dir, file, line, zero))
}

/// OCI's `checkBeforeUpdate`.
pub(super) fn check_usage(dir: Option<&Path>, file: &str, limit: u64) -> Result<()> {
    match read_limit(dir, file) {
        Some(usage) if usage > limit => {
            let reason = format!("{usage} bytes are in use, more than the new limit of {limit}");
            Err(CgroupError::Unsupported {
                key: "memory.limit".into(),
                reason,
            })
        }
        _ => Ok(()),
    }
}
