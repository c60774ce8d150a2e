//! The core in a guest as real nodes are: unified cgroups with the systemd driver, AppArmor, all capabilities, and power cuts.
#![forbid(unsafe_code)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use harness::{Lab, vm};

/// Software emulation is ten times slower than the machine, and other suites run beside it.
const BOOT: Duration = Duration::from_secs(300);
/// Everything between a boot and its end or cut.
const PHASE: Duration = Duration::from_secs(1000);

/// Boots `phase` and waits until it says `until`, with no test of it failed.
fn phase(
    lab: &Lab,
    dir: &std::path::Path,
    disk: &std::path::Path,
    name: &str,
    until: &str,
) -> Result<vm::Guest> {
    let suite = vm::suite_disk(lab, dir, name)?;
    let mut guest = vm::Guest::boot(disk, &suite)?;
    guest.wait("SUITE phase", BOOT)?;
    let lines = guest.wait(until, PHASE)?;
    let failed: Vec<&String> = lines.iter().filter(|l| l.contains("SUITE failed")).collect();
    ensure!(failed.is_empty(), "{failed:?}\n{}", lines.join("\n"));
    Ok(guest)
}

#[test]
fn the_core_passes_on_unified_cgroups_with_systemd_and_apparmor() -> Result<()> {
    let lab = Lab::new("vm-core")?;
    let dir = vm::gather(&lab)?;
    let disk = vm::overlay(&lab)?;
    // VM_TESTS="install limits": only these.
    if let Ok(only) = std::env::var("VM_TESTS") {
        std::fs::write(dir.join("phases/core"), only)?;
    }
    drop(phase(&lab, &dir, &disk, "core", "SUITE end")?);
    lab.finish()
}

/// The first cut comes with a pull, a build's commit, a pod's and a container's start held half-way, the second somewhere in
/// all of them at once.
#[test]
fn after_power_cuts_every_layer_is_whole_and_nothing_is_left() -> Result<()> {
    let lab = Lab::new("vm-cut")?;
    let dir = vm::gather(&lab)?;
    let disk = vm::overlay(&lab)?;
    phase(&lab, &dir, &disk, "first", "SUITE ready for the cut")?.cut()?;
    let working = phase(&lab, &dir, &disk, "second", "SUITE ready for the cut")?;
    let anywhere = u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_millis()) * 4;
    harness::tell(&format!("vm: the power is cut {anywhere} ms from now"));
    std::thread::sleep(Duration::from_millis(anywhere));
    working.cut()?;
    drop(phase(&lab, &dir, &disk, "last", "SUITE end")?);
    lab.finish()
}
