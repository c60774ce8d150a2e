//! When a container's status can be told, and what crictl inspect shows beyond it.

use super::Container;
use crate::daemon::Daemon;
use crate::error::Error;

/// Waits until what is noted of it is what its shim knows; one without a pod has none.
///
/// # Errors
/// [`Error::Timeout`] when that is not so after a moment.
pub async fn wait_known(daemon: &Daemon, container: &Container) -> Result<(), Error> {
    match daemon.registry.pod(container.pod().as_str()) {
        Ok(pod) => pod.known.wait(pod.id().as_str()).await,
        Err(_) => Ok(()),
    }
}

/// The verbose information of a container, as JSON. Reads the bundle: not for async threads.
pub fn verbose(daemon: &Daemon, container: &Container) -> serde_json::Value {
    let state = container.state();
    let bundle = daemon.bundle(container.id());
    let spec = std::fs::read(bundle.config())
        .ok()
        .and_then(|json| serde_json::from_slice::<serde_json::Value>(&json).ok())
        .unwrap_or(serde_json::Value::Null);
    let mut config = serde_json::to_value(&container.record().config).unwrap_or_default();
    hide_values(&mut config);
    serde_json::json!({
        "sandboxID": container.pod(),
        "pid": if container.live() { state.made.pid } else { 0 },
        "phase": state.phase,
        "fault": state.fault,
        "snapshotKey": container.id(),
        "snapshotter": "overlay",
        "bundle": bundle.path(),
        "runtimeType": "io.containerd.slipway.v1",
        "warnings": state.made.warnings,
        "config": config,
        "runtimeSpec": spec,
    })
}

/// The environment stands in the runtime specification anyway; here only its names do.
fn hide_values(config: &mut serde_json::Value) {
    let Some(envs) = config.get_mut("envs").and_then(serde_json::Value::as_array_mut) else {
        return;
    };
    for pair in envs {
        if let Some(name) = pair.get(0).cloned() {
            *pair = name;
        }
    }
}
