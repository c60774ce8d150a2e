//! The proof that nothing is left: mounts, processes, cgroups, links and firewall rules, as the host sees them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::lab::Lab;

/// Fails when anything of `lab` is still on the machine, after waiting a moment for what ends by itself.
///
/// # Errors
/// Lists everything found.
pub fn check(lab: &Lab) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let found = find(lab);
        if found.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "left behind by {}:\n  {}",
                lab.path().display(),
                found.join("\n  ")
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Everything of `lab` that is on the machine now, a line each.
pub fn find(lab: &Lab) -> Vec<String> {
    let mut found = Vec::new();
    found.extend(mounts_under(lab.path()).into_iter().map(|m| format!("mount {m}")));
    // A registry is the harness's own, and ends with the test.
    let processes = processes_naming(lab.path())
        .into_iter()
        .filter(|(_, c)| !c.starts_with("docker-registry "));
    found.extend(processes.map(|(pid, c)| format!("process {pid}: {c}")));
    found.extend(
        cgroups_named(lab.cgroup().trim_start_matches('/'))
            .into_iter()
            .map(|c| format!("cgroup {c}")),
    );
    found.extend(
        firewall_rules_naming(&lab.network())
            .into_iter()
            .map(|r| format!("firewall rule {r}")),
    );
    let ipam = lab.join("ipam").join(lab.network());
    if let Ok(dir) = std::fs::read_dir(&ipam) {
        for e in dir.flatten() {
            let name = e.file_name().to_string_lossy().into_owned();
            if name.parse::<std::net::IpAddr>().is_ok() {
                found.push(format!("leased address {name}"));
            }
        }
    }
    found
}

/// Mount points below `dir`, from this process's mountinfo.
pub fn mounts_under(dir: &Path) -> Vec<String> {
    let info = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    info.lines()
        .filter_map(|l| l.split(' ').nth(4))
        .filter(|m| Path::new(m).starts_with(dir))
        .map(str::to_owned)
        .collect()
}

/// Processes other than this one whose command line names `dir`.
pub fn processes_naming(dir: &Path) -> Vec<(u32, String)> {
    let needle = dir.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for e in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = e.file_name().to_str().and_then(|s| s.parse::<u32>().ok()) else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let Ok(cmd) = std::fs::read(e.path().join("cmdline")) else {
            continue;
        };
        let cmd = String::from_utf8_lossy(&cmd).replace('\0', " ");
        if cmd.contains(&needle) {
            found.push((pid, cmd));
        }
    }
    found
}

/// Directories in any cgroup hierarchy whose name contains `name`.
pub fn cgroups_named(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let root = Path::new("/sys/fs/cgroup");
    let mut tops = vec![root.to_path_buf()];
    tops.extend(
        std::fs::read_dir(root)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.is_dir()),
    );
    for top in tops {
        for e in std::fs::read_dir(&top).into_iter().flatten().flatten() {
            if e.file_name().to_string_lossy().contains(name) && e.path().is_dir() {
                found.push(e.path().display().to_string());
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

/// iptables rules whose text contains `name`.
pub fn firewall_rules_naming(name: &str) -> Vec<String> {
    crate::cmd::run(
        &mut crate::cmd::command("iptables-save", [] as [&str; 0]),
        Duration::from_secs(10),
    )
    .map(|o| {
        o.stdout
            .lines()
            .filter(|l| l.contains(name))
            .map(str::to_owned)
            .collect()
    })
    .unwrap_or_default()
}

/// Removes a bridge a CNI plugin made (it never removes its own); silent when there is none.
pub fn remove_bridge(name: &str) {
    if Path::new("/sys/class/net").join(name).exists() {
        let _ = crate::cmd::run(
            &mut crate::cmd::command("ip", ["link", "del", name]),
            Duration::from_secs(10),
        );
    }
}

/// Removes the NAT rules and chains of a CNI network and the cgroups of a test: what a reboot takes with it.
///
/// # Errors
/// A program could not be run.
pub fn forget_as_a_reboot_does(lab: &Lab) -> Result<()> {
    let mut chains = Vec::new();
    for rule in firewall_rules_naming(&lab.network()) {
        chains.extend(
            rule.split(' ')
                .filter(|w| w.starts_with("CNI-") && w.len() > 20)
                .map(str::to_owned),
        );
        let delete = rule.replacen("-A ", "-D ", 1);
        crate::cmd::sh(&format!("iptables -w -t nat {delete} || true"))?;
    }
    chains.sort();
    chains.dedup();
    for chain in chains {
        crate::cmd::sh(&format!(
            "iptables -w -t nat -F {chain}; iptables -w -t nat -X {chain} || true"
        ))?;
    }
    for top in cgroups_named(lab.cgroup().trim_start_matches('/')) {
        crate::cmd::sh(&format!("find {top} -depth -type d -exec rmdir {{}} +  || true"))?;
    }
    Ok(())
}
