//! What the runtime says of itself and of the node: Version, Status, RuntimeConfig.

use std::collections::BTreeMap;

use slipway_cri_api::v1;
use slipway_network::NetworkStatus;

use crate::config::CgroupDriver;
use crate::daemon::Daemon;
use crate::records::Unreadable;

/// What the kubelet calls us.
pub const RUNTIME_NAME: &str = "slipway";

pub fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        // The kubelet's own API version, answered as every runtime does.
        version: "0.1.0".to_owned(),
        runtime_name: RUNTIME_NAME.to_owned(),
        runtime_version: crate::version::program().to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

pub fn status(daemon: &Daemon, verbose: bool) -> v1::StatusResponse {
    let network = daemon.cni.status();
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus {
            conditions: [
                Some(condition("RuntimeReady", true, "", "")),
                Some(network_condition(&network)),
                records_condition(&daemon.registry.unreadable()),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }),
        info: if verbose { info(daemon) } else { BTreeMap::new() },
        runtime_handlers: daemon
            .config
            .runtime
            .handler_names()
            .map(|name| v1::RuntimeHandler {
                name: name.to_owned(),
                features: Some(v1::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: daemon.host.kernel >= RECURSIVE_READ_ONLY,
                    user_namespaces: daemon.maps_owners,
                }),
            })
            .collect(),
        features: Some(v1::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: daemon.maps_owners,
            mount_options: true,
        }),
    }
}

/// mount_setattr with AT_RECURSIVE.
const RECURSIVE_READ_ONLY: (u32, u32) = (5, 12);

fn condition(kind: &str, status: bool, reason: &str, message: &str) -> v1::RuntimeCondition {
    v1::RuntimeCondition {
        r#type: kind.to_owned(),
        status,
        reason: reason.to_owned(),
        message: message.to_owned(),
    }
}

fn network_condition(status: &NetworkStatus) -> v1::RuntimeCondition {
    match status {
        NetworkStatus::Ready { .. } => condition("NetworkReady", true, "", ""),
        NetworkStatus::NotReady { reason } => {
            condition("NetworkReady", false, "NetworkPluginNotReady", reason)
        }
    }
}

/// There only when it is false: that something on this node is left alone because nobody here can read what it is.
fn records_condition(unreadable: &Unreadable) -> Option<v1::RuntimeCondition> {
    /// Names in the message; all of them are in the verbose information.
    const NAMED: usize = 8;
    let all: Vec<String> = unreadable
        .iter()
        .map(|(id, untold)| format!("{id} ({}: {})", untold.kind, untold.why))
        .collect();
    if all.is_empty() {
        return None;
    }
    let more = if all.len() > NAMED { ", …" } else { "" };
    let message = format!(
        "{} pods and containers are left alone, their records cannot be read: {}{more}",
        all.len(),
        all[..all.len().min(NAMED)].join(", ")
    );
    Some(condition(
        "SlipwayRecordsReadable",
        false,
        "UnreadableRecords",
        &message,
    ))
}

pub fn runtime_config(daemon: &Daemon) -> v1::RuntimeConfigResponse {
    let driver = match daemon.config.runtime.cgroup_driver {
        CgroupDriver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
        CgroupDriver::Systemd => v1::CgroupDriver::Systemd,
    };
    v1::RuntimeConfigResponse {
        linux: Some(v1::LinuxRuntimeConfiguration {
            cgroup_driver: driver as i32,
        }),
    }
}

/// Each value is one JSON document, as crictl info wants them.
fn info(daemon: &Daemon) -> BTreeMap<String, String> {
    let of = |value: serde_json::Result<serde_json::Value>| value.unwrap_or_default().to_string();
    let releases: Vec<String> = daemon.releases.all().iter().map(|r| r.pod.to_string()).collect();
    BTreeMap::from([
        ("config".to_owned(), of(serde_json::to_value(&daemon.config))),
        ("host".to_owned(), of(serde_json::to_value(&daemon.host))),
        (
            "bootId".to_owned(),
            serde_json::Value::from(daemon.boot_id.clone()).to_string(),
        ),
        (
            "podCIDR".to_owned(),
            of(serde_json::to_value(daemon.pod_cidr.told())),
        ),
        (
            "unreadableRecords".to_owned(),
            of(serde_json::to_value(
                daemon.registry.unreadable().iter().collect::<BTreeMap<_, _>>(),
            )),
        ),
        (
            "networkReleasesPending".to_owned(),
            serde_json::Value::from(releases).to_string(),
        ),
    ])
}
