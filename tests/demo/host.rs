//! What the demo puts on the host, by the names that are its own, and what of it is still there.
//!
//! Looks for nothing else: what others on the machine make meanwhile is theirs.

use std::path::Path;

use harness::leftovers;

/// The bridge of the demo's CNI network.
pub const BRIDGE: &str = "slipway-demo0";
/// That network's name, which the rules in the firewall carry.
pub const NETWORK: &str = "slipway-demo";
/// Its addresses.
pub const SUBNET: &str = "10.126.77.0/24";
/// The cgroup above the pod's.
pub const CGROUP: &str = "/slipway-demo";

/// Everything of the demo's that is on the host now, a line each. `work` is its directory.
pub fn left(work: &Path) -> Vec<String> {
    let mut found: Vec<String> = leftovers::mounts_under(work)
        .into_iter()
        .map(|m| format!("mount {m}"))
        .collect();
    found.extend(
        leftovers::processes_naming(&work.join("state"))
            .into_iter()
            .map(|(p, c)| format!("process {p} {c}")),
    );
    found.extend(
        leftovers::cgroups_named(CGROUP.trim_start_matches('/'))
            .into_iter()
            .map(|c| format!("cgroup {c}")),
    );
    found.extend(
        leftovers::firewall_rules_naming(NETWORK)
            .into_iter()
            .map(|r| format!("firewall rule {r}")),
    );
    if Path::new("/sys/class/net").join(BRIDGE).exists() {
        found.push(format!("network link {BRIDGE}"));
    }
    found.extend(on_the_network(work));
    found
}

/// What is still on the demo's network: links on its bridge, and addresses that are taken.
pub fn on_the_network(work: &Path) -> Vec<String> {
    let links = names(&Path::new("/sys/class/net").join(BRIDGE).join("brif"));
    let addresses = names(&work.join("ipam").join(NETWORK));
    links
        .into_iter()
        .map(|l| format!("network link {l} on {BRIDGE}"))
        .chain(
            addresses
                .into_iter()
                // host-local's own files lie beside the addresses.
                .filter(|n| n.parse::<std::net::IpAddr>().is_ok())
                .map(|a| format!("leased address {a}")),
        )
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}
