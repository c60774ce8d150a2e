//! What crictl inspectp shows beyond the status: how the pod came to be as it is.

use super::Pod;
use super::dir::PodDir;
use crate::daemon::Daemon;
use crate::records::PodNetworkState;

/// The verbose information of a pod, as JSON.
pub fn verbose(daemon: &Daemon, pod: &Pod) -> serde_json::Value {
    let state = pod.state();
    let attachment = match &state.network {
        PodNetworkState::Planned(attachment) | PodNetworkState::Attached(attachment) => {
            serde_json::to_value(attachment).unwrap_or_default()
        }
        PodNetworkState::Host | PodNetworkState::Released => serde_json::Value::Null,
    };
    serde_json::json!({
        "pid": state.init_pid.unwrap_or(0),
        "phase": state.phase,
        "stateDirectory": PodDir::new(&daemon.paths.pods, pod.id()).path(),
        "namespaces": state.namespaces,
        "cgroupParent": super::run::cgroup_parent(daemon, pod),
        "network": attachment,
        "networkReleasePending": daemon.releases.contains(pod.id()),
        "bootId": pod.record().boot_id,
        "shimConnected": pod.shim().is_some(),
        "config": pod.record().config,
    })
}
