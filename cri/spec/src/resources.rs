//! Cgroup limits from CRI's numbers to OCI's. Values are kept as given: which file they become, and
//! what happens where a controller is missing, is the cgroup code's to decide.

use oci_spec::runtime as oci;

use crate::error::SpecError;
use crate::input::Resources;

/// Converts limits, for a new container and for an update alike.
///
/// # Errors
/// A number or text that no kernel takes.
pub fn to_oci(r: &Resources) -> Result<oci::LinuxResources, SpecError> {
    let mut to = oci::LinuxResources::default();
    to.set_cpu(cpu(r)?);
    to.set_memory(memory(r)?);
    if r.pids_limit != 0 {
        if r.pids_limit < -1 {
            return Err(negative("pids_limit", r.pids_limit));
        }
        let pids = oci::LinuxPidsBuilder::default().limit(r.pids_limit);
        to.set_pids(Some(pids.build().expect("the field is set")));
    }
    if !r.hugepage_limits.is_empty() {
        to.set_hugepage_limits(Some(
            r.hugepage_limits.iter().map(hugepage).collect::<Result<_, _>>()?,
        ));
    }
    if !r.unified.is_empty() {
        for (file, value) in &r.unified {
            check_unified(file, value)?;
        }
        to.set_unified(Some(r.unified.clone().into_iter().collect()));
    }
    Ok(to)
}

fn negative(field: &'static str, value: i64) -> SpecError {
    SpecError::invalid(field, value.to_string(), "is negative")
}

fn cpu(r: &Resources) -> Result<Option<oci::LinuxCpu>, SpecError> {
    let mut cpu = oci::LinuxCpu::default();
    if r.cpu_shares != 0 {
        cpu.set_shares(Some(
            u64::try_from(r.cpu_shares).map_err(|_| negative("cpu_shares", r.cpu_shares))?,
        ));
    }
    if r.cpu_period != 0 {
        let period = u64::try_from(r.cpu_period)
            .ok()
            .filter(|p| (1_000..=1_000_000).contains(p));
        let period = period.ok_or_else(|| {
            SpecError::invalid(
                "cpu_period",
                r.cpu_period.to_string(),
                "is outside 1000..=1000000 microseconds",
            )
        })?;
        cpu.set_period(Some(period));
    }
    if r.cpu_quota != 0 {
        if r.cpu_quota != -1 && r.cpu_quota < 1_000 {
            let shown = r.cpu_quota.to_string();
            return Err(SpecError::invalid(
                "cpu_quota",
                shown,
                "is neither -1 nor at least 1000 microseconds",
            ));
        }
        cpu.set_quota(Some(r.cpu_quota));
    }
    for (field, list) in [("cpuset_cpus", &r.cpuset_cpus), ("cpuset_mems", &r.cpuset_mems)] {
        if !list.is_empty() && !is_cpu_list(list) {
            return Err(SpecError::invalid(
                field,
                list.as_str(),
                "is not a list like 0-3,7",
            ));
        }
    }
    cpu.set_cpus((!r.cpuset_cpus.is_empty()).then(|| r.cpuset_cpus.clone()));
    cpu.set_mems((!r.cpuset_mems.is_empty()).then(|| r.cpuset_mems.clone()));
    Ok((cpu != oci::LinuxCpu::default()).then_some(cpu))
}

fn is_cpu_list(list: &str) -> bool {
    let number = |n: &str| !n.is_empty() && n.len() <= 6 && n.bytes().all(|b| b.is_ascii_digit());
    list.split(',').all(|part| match part.split_once('-') {
        Some((from, to)) => number(from) && number(to) && from.parse::<u32>().ok() <= to.parse::<u32>().ok(),
        None => number(part),
    })
}

/// A limit on memory is one on memory and swap together unless the request says more: nothing
/// swaps that was not allowed to.
fn memory(r: &Resources) -> Result<Option<oci::LinuxMemory>, SpecError> {
    let checked = |field, value: i64| match value {
        0 => Ok(None),
        v if v < -1 => Err(negative(field, v)),
        v => Ok(Some(v)),
    };
    let limit = checked("memory_limit_in_bytes", r.memory_limit)?;
    let swap = checked("memory_swap_limit_in_bytes", r.memory_swap_limit)?;
    if let (Some(limit), Some(swap @ 1..)) = (limit, swap)
        && swap < limit
    {
        let shown = swap.to_string();
        return Err(SpecError::invalid(
            "memory_swap_limit_in_bytes",
            shown,
            "is below the memory limit",
        ));
    }
    let mut memory = oci::LinuxMemory::default();
    memory.set_limit(limit);
    memory.set_swap(swap.or(limit));
    memory.set_reservation(checked("memory_reservation", r.memory_reservation)?);
    Ok((memory != oci::LinuxMemory::default()).then_some(memory))
}

fn hugepage((size, limit): &(String, u64)) -> Result<oci::LinuxHugepageLimit, SpecError> {
    let field = "hugepage_limits";
    let digits = size
        .trim_end_matches("KB")
        .trim_end_matches("MB")
        .trim_end_matches("GB");
    let sound =
        digits.len() + 2 == size.len() && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !sound {
        return Err(SpecError::invalid(
            field,
            size.as_str(),
            "is not a page size like 2MB",
        ));
    }
    let limit =
        i64::try_from(*limit).map_err(|_| SpecError::invalid(field, limit.to_string(), "is too large"))?;
    let mut page = oci::LinuxHugepageLimit::default();
    page.set_page_size(size.clone());
    page.set_limit(limit);
    Ok(page)
}

/// A file of the container's own cgroup that holds a limit: not a path, not one that moves or
/// kills processes.
fn check_unified(file: &str, value: &str) -> Result<(), SpecError> {
    let field = "unified";
    let sound = file.contains('.')
        && !file.starts_with('.')
        && file
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'_');
    if !sound || file.contains("..") {
        return Err(SpecError::invalid(
            field,
            file,
            "is not the name of a cgroup file",
        ));
    }
    if file.starts_with("cgroup.") {
        return Err(SpecError::invalid(field, file, "is not a limit"));
    }
    if value.chars().any(char::is_control) {
        return Err(SpecError::invalid(
            field,
            file,
            "has a value with control characters",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_is_nothing_set() {
        assert_eq!(
            to_oci(&Resources::default()).unwrap(),
            oci::LinuxResources::default()
        );
    }

    #[test]
    fn numbers_are_kept_as_given() {
        let r = Resources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 2,
            memory_limit: 1 << 30,
            cpuset_cpus: "0-3,7".into(),
            hugepage_limits: vec![("2MB".into(), 0), ("1GB".into(), 1 << 30)],
            unified: [("memory.high".to_owned(), "max".to_owned())].into(),
            pids_limit: 100,
            ..Resources::default()
        };
        let to = to_oci(&r).unwrap();
        let cpu = to.cpu().as_ref().unwrap();
        assert_eq!(
            (cpu.period(), cpu.quota(), cpu.shares()),
            (Some(100_000), Some(-1), Some(2))
        );
        let memory = to.memory().as_ref().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(1 << 30), Some(1 << 30)));
        assert_eq!(to.hugepage_limits().as_ref().unwrap()[0].limit(), 0);
        assert_eq!(to.unified().as_ref().unwrap()["memory.high"], "max");
        assert_eq!(to.pids().unwrap().limit(), 100);
    }

    #[test]
    fn numbers_and_texts_that_no_kernel_takes_are_refused() {
        let base = Resources::default;
        for (field, r) in [
            (
                "cpu_shares",
                Resources {
                    cpu_shares: -5,
                    ..base()
                },
            ),
            (
                "cpu_period",
                Resources {
                    cpu_period: 5,
                    ..base()
                },
            ),
            (
                "cpu_quota",
                Resources {
                    cpu_quota: -7,
                    ..base()
                },
            ),
            (
                "cpu_quota",
                Resources {
                    cpu_quota: 10,
                    ..base()
                },
            ),
            (
                "cpuset_cpus",
                Resources {
                    cpuset_cpus: "0-".into(),
                    ..base()
                },
            ),
            (
                "cpuset_cpus",
                Resources {
                    cpuset_cpus: "3-1".into(),
                    ..base()
                },
            ),
            (
                "cpuset_mems",
                Resources {
                    cpuset_mems: "0\n".into(),
                    ..base()
                },
            ),
            (
                "memory_limit",
                Resources {
                    memory_limit: -2,
                    ..base()
                },
            ),
            (
                "memory_swap",
                Resources {
                    memory_limit: 10,
                    memory_swap_limit: 5,
                    ..base()
                },
            ),
            (
                "pids_limit",
                Resources {
                    pids_limit: -2,
                    ..base()
                },
            ),
            (
                "hugepage_limits",
                Resources {
                    hugepage_limits: vec![("2M/".into(), 1)],
                    ..base()
                },
            ),
            (
                "unified",
                Resources {
                    unified: [("../x.y".to_owned(), String::new())].into(),
                    ..base()
                },
            ),
            (
                "unified",
                Resources {
                    unified: [("cgroup.procs".to_owned(), "1".to_owned())].into(),
                    ..base()
                },
            ),
            (
                "unified",
                Resources {
                    unified: [("memory.high".to_owned(), "1\n2".to_owned())].into(),
                    ..base()
                },
            ),
        ] {
            let error = to_oci(&r).unwrap_err().to_string();
            assert!(error.starts_with(field), "{field}: {error}");
        }
    }
}
