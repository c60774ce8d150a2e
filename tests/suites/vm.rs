//! The core in a guest as real nodes are: unified cgroups with the systemd driver, AppArmor, all capabilities, and power cuts.
#![forbid(unsafe_code)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use harness::{Lab, vm};

/// Waits until the guest says `until`, with no test of its phase failed.
fn passes(mut guest: vm::Guest, until: &str) -> Result<vm::Guest> {
    guest.wait("SUITE phase")?;
    let lines = guest.wait_for(&[until, "SUITE end"])?;
    let failed: Vec<&String> = lines.iter().filter(|l| l.contains("SUITE failed")).collect();
    ensure!(failed.is_empty(), "{failed:?}\n{}", lines.join("\n"));
    let last = lines.last().map_or("", String::as_str);
    ensure!(last.contains(until), "no {until:?}:\n{}", lines.join("\n"));
    Ok(guest)
}

#[test]
fn the_core_passes_on_unified_cgroups_with_systemd_and_apparmor() -> Result<()> {
    let lab = Lab::new("vm-core")?;
    let dir = vm::gather(&lab)?;
    // VM_TESTS="install limits": only these.
    let only = std::env::var("VM_TESTS").ok();
    if let Some(only) = &only {
        std::fs::write(dir.join("phases/core"), only)?;
    }
    let suite = vm::suite_disk(&lab, &dir, "core")?;
    let guest = vm::Guest::go_on("core", &vm::overlay(&lab)?, &suite)?;
    if only.is_none_or(|only| only.contains("node_shutdown")) {
        // The last of them powers the node off.
        let goodbye = "SUITE the pod has said goodbye";
        passes(guest, goodbye)?.wait_end()?;
    } else {
        drop(passes(guest, "SUITE end")?);
    }
    lab.finish()
}

#[test]
fn critest_passes_with_its_apparmor_specs() -> Result<()> {
    let lab = Lab::new("vm-critest")?;
    let suite = vm::suite_disk(&lab, &vm::gather(&lab)?, "critest")?;
    let guest = vm::Guest::go_on("critest", &vm::overlay(&lab)?, &suite)?;
    drop(passes(guest, "SUITE end")?);
    lab.finish()
}

/// The first cut comes with a pull, a build's commit, a pod's and a container's start held half-way, the second somewhere in
/// all of them at once.
#[test]
fn after_power_cuts_every_layer_is_whole_and_nothing_is_left() -> Result<()> {
    let lab = Lab::new("vm-cut")?;
    let suite = vm::suite_disk(&lab, &vm::gather(&lab)?, "first")?;
    let disk = vm::overlay(&lab)?;
    let half_way = vm::Guest::go_on("cut", &disk, &suite)?;
    passes(half_way, "SUITE ready for the cut")?.cut()?;
    let working = vm::Guest::boot("cut", &disk, &suite, "second")?;
    let working = passes(working, "SUITE ready for the cut")?;
    let anywhere = u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_millis()) * 4;
    harness::tell(&format!("vm: the power is cut {anywhere} ms from now"));
    std::thread::sleep(Duration::from_millis(anywhere));
    working.cut()?;
    drop(passes(
        vm::Guest::boot("cut", &disk, &suite, "last")?,
        "SUITE end",
    )?);
    lab.finish()
}
