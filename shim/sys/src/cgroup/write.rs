//! Writing one limit into one file, by the rule of this module: a zero without its controller is dropped, anything
//! else is an error that names the key.

use super::{CgroupError, Result};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Writes `value` for OCI's `key`. `zero`: the value limits nothing that could be used, or everything.
///
/// # Errors
/// [`CgroupError::Unsupported`] when there is no such file and `zero` is false; [`CgroupError::Write`] when the kernel
/// refuses.
pub(super) fn set(key: &str, dir: Option<&Path>, file: &str, value: &str, zero: bool) -> Result<()> {
    let path = dir.map(|d| d.join(file)).filter(|p| p.exists());
    match path {
        Some(path) => write(key, path, value),
        None if zero => Ok(()),
        None => Err(missing(key, file)),
    }
}

pub(super) fn missing(key: &str, file: &str) -> CgroupError {
    let controller = file.split('.').next().unwrap_or(file);
    unsupported(
        key,
        format!("this machine has no {file} (controller {controller}) for this cgroup"),
    )
}

pub(super) fn unsupported(key: &str, reason: impl Into<String>) -> CgroupError {
    CgroupError::Unsupported {
        key: key.to_string(),
        reason: reason.into(),
    }
}

/// Writes to a file that is there.
pub(super) fn write(key: &str, file: PathBuf, value: &str) -> Result<()> {
    try_write(&file, value).map_err(|source| CgroupError::Write {
        key: key.to_string(),
        file,
        value: value.to_string(),
        source,
    })
}

/// Writes the weight of one device. Only the IO scheduler BFQ knows such weights, and it is chosen by device.
///
/// # Errors
/// As [`set`]; [`CgroupError::Unsupported`] where the device has another scheduler.
pub(super) fn set_device_weight(
    dir: Option<&Path>,
    file: &str,
    device: (i64, i64),
    weight: u64,
) -> Result<()> {
    let key = "blockIO.weightDevice";
    let (major, minor) = device;
    let set = set(key, dir, file, &format!("{major}:{minor} {weight}"), false);
    match set {
        Err(CgroupError::Write { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Err(unsupported(
                key,
                format!(
                    "the device {major}:{minor} has an IO scheduler without weights: /sys/dev/block/{major}:{minor}/queue/scheduler has to be \"bfq\" (BFQ)"
                ),
            ))
        }
        other => other,
    }
}

/// Files at which a writer waits while the kernel looks for memory to take back; from 6.16 on not one that is opened not to
/// wait: what is charged next looks for it.
const SLOW: [&str; 2] = ["memory.max", "memory.high"];

/// Never creates; one write(2), as cgroup files want.
pub(super) fn try_write(file: &Path, value: &str) -> io::Result<()> {
    let is_slow = SLOW.iter().any(|slow| file.ends_with(slow));
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .custom_flags(if is_slow { libc::O_NONBLOCK } else { 0 })
        .open(file)?
        .write_all(value.as_bytes())
}

/// A file's text, trimmed; `None` when it cannot be read.
pub(super) fn read(dir: Option<&Path>, file: &str) -> Option<String> {
    std::fs::read_to_string(dir?.join(file))
        .ok()
        .map(|s| s.trim().to_string())
}

/// A file's number; "max" and v1's nearly 2^63 are `u64::MAX`.
pub(super) fn read_limit(dir: Option<&Path>, file: &str) -> Option<u64> {
    /// v1 rounds "unlimited" down to a page below 2^63.
    const UNLIMITED: u64 = i64::MAX as u64 - (1 << 20);
    match read(dir, file)?.as_str() {
        "max" => Some(u64::MAX),
        text => text
            .parse()
            .ok()
            .map(|n: u64| if n >= UNLIMITED { u64::MAX } else { n }),
    }
}
