//! What the runtime says of itself and of the node: Version, Status, RuntimeConfig.

use std::collections::HashMap;

use slipway_cri_api::v1;
use slipway_network::NetworkStatus;

use super::decode::RUNTIME_HANDLERS;
use crate::config::CgroupDriver;
use crate::daemon::Daemon;

/// What the kubelet calls us.
pub const RUNTIME_NAME: &str = "slipway";

pub fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        // The kubelet's own API version, answered as every runtime does.
        version: "0.1.0".to_owned(),
        runtime_name: RUNTIME_NAME.to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

pub fn status(daemon: &Daemon, verbose: bool) -> v1::StatusResponse {
    let network = daemon.cni.status();
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus {
            conditions: vec![
                condition("RuntimeReady", true, "", ""),
                network_condition(&network),
            ],
        }),
        info: if verbose { info(daemon) } else { HashMap::new() },
        runtime_handlers: RUNTIME_HANDLERS
            .iter()
            .map(|name| v1::RuntimeHandler {
                name: (*name).to_owned(),
                features: Some(v1::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: daemon.host.kernel >= RECURSIVE_READ_ONLY,
                    user_namespaces: false,
                }),
            })
            .collect(),
        features: Some(v1::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
            mount_options: false,
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
fn info(daemon: &Daemon) -> HashMap<String, String> {
    let of = |value: serde_json::Result<serde_json::Value>| value.unwrap_or_default().to_string();
    let releases: Vec<String> = daemon.releases.all().iter().map(|r| r.pod.to_string()).collect();
    HashMap::from([
        ("config".to_owned(), of(serde_json::to_value(&daemon.config))),
        ("host".to_owned(), of(serde_json::to_value(&daemon.host))),
        (
            "bootId".to_owned(),
            serde_json::Value::from(daemon.boot_id.clone()).to_string(),
        ),
        (
            "networkReleasesPending".to_owned(),
            serde_json::Value::from(releases).to_string(),
        ),
    ])
}
