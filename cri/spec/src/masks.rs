//! Paths of /proc and /sys that are hidden or read-only.

use crate::host::HostFacts;
use crate::input::SpecInput;

/// What Kubernetes hides unless procMount says otherwise.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

/// Hidden on top: power figures and interrupt counts tell what neighbours compute.
const SIDE_CHANNELS: [&str; 2] = ["/proc/interrupts", "/sys/devices/virtual/powercap"];

const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Paths to hide. An empty list of the request's is honoured; any other one gets the side channels
/// added.
pub(crate) fn masked(input: &SpecInput) -> Vec<String> {
    if input.privileged {
        return Vec::new();
    }
    let mut paths = match &input.masked_paths {
        Some(none) if none.is_empty() => return Vec::new(),
        Some(asked) => asked.clone(),
        None => MASKED.map(str::to_owned).to_vec(),
    };
    for extra in side_channels(&input.host) {
        if !paths.contains(&extra) {
            paths.push(extra);
        }
    }
    paths
}

fn side_channels(host: &HostFacts) -> Vec<String> {
    let cpus = if host.thermal_throttle { host.cpus } else { 0 };
    let throttle = (0..cpus).map(|n| format!("/sys/devices/system/cpu/cpu{n}/thermal_throttle"));
    SIDE_CHANNELS
        .iter()
        .map(|s| (*s).to_owned())
        .chain(throttle)
        .collect()
}

/// Paths to make read-only.
pub(crate) fn readonly(input: &SpecInput) -> Vec<String> {
    if input.privileged {
        return Vec::new();
    }
    match &input.readonly_paths {
        Some(asked) => asked.clone(),
        None => READONLY.map(str::to_owned).to_vec(),
    }
}
