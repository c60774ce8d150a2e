//! The core in a guest as real nodes are: unified cgroups with the systemd driver, AppArmor, all capabilities, and power cuts.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Lab, vm};

/// Software emulation is ten times slower than the machine, and other suites run beside it.
const BOOT: Duration = Duration::from_secs(180);

fn tell(lines: &[String]) {
    for l in lines
        .iter()
        .filter(|l| l.contains("SUITE ") || l.starts_with("  "))
    {
        harness::tell(&format!(
            "vm: {}",
            l.split_once("SUITE ").map_or(l.as_str(), |(_, t)| t)
        ));
    }
}

#[test]
fn the_core_passes_on_unified_cgroups_with_systemd_and_apparmor() -> Result<()> {
    let lab = Lab::new("vm-core")?;
    let dir = vm::gather(&lab)?;
    let (disk, suite) = (vm::overlay(&lab)?, vm::suite_disk(&lab, &dir, "core")?);
    let mut guest = vm::Guest::boot(&disk, &suite)?;
    tell(&guest.wait("SUITE phase", BOOT)?);
    let lines = guest.wait("SUITE end", Duration::from_secs(600))?;
    tell(&lines);
    drop(guest);
    let failed: Vec<&String> = lines.iter().filter(|l| l.starts_with("SUITE failed")).collect();
    ensure!(failed.is_empty(), "{failed:?}\n{}", lines.join("\n"));
    lab.finish()
}

#[test]
fn after_power_cuts_every_image_is_whole_and_nothing_is_left() -> Result<()> {
    let lab = Lab::new("vm-cut")?;
    let dir = vm::gather(&lab)?;
    let disk = vm::overlay(&lab)?;
    // Each time somewhere else in the work: at a time that no two rounds of it share.
    let cuts = [Some(2_900_u64), Some(5_300), None];
    for (round, cut) in cuts.into_iter().enumerate() {
        let phase = ["work", "again", "after"][round];
        let suite = vm::suite_disk(&lab, &dir, phase)?;
        let mut guest = vm::Guest::boot(&disk, &suite)?;
        guest.wait("SUITE phase", BOOT)?;
        let until = if cut.is_some() {
            "SUITE worked 2"
        } else {
            "SUITE end"
        };
        let lines = guest.wait(until, Duration::from_secs(240))?;
        tell(&lines);
        ensure!(
            !lines.iter().any(|l| l.contains("SUITE failed")),
            "{}",
            lines.join("\n")
        );
        if let Some(ms) = cut {
            std::thread::sleep(Duration::from_millis(ms));
            guest.cut()?;
        }
    }
    lab.finish()
}
