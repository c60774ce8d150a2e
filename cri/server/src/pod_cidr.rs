//! UpdateRuntimeConfig: which addresses the kubelet says the node's pods may have, and what that came to. Where a template
//! is configured it becomes the network's configuration; otherwise whoever configures CNI decides, and Status says so.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use slipway_network::{Installed, PodCidrs};

use crate::daemon::Daemon;
use crate::error::Error;

const FIELD: &str = "runtime_config.network_config.pod_cidr";

/// What was told last.
#[derive(Default)]
pub struct PodCidr {
    told: Mutex<Option<Told>>,
}

/// The words of the kubelet and what was done about them.
#[derive(Debug, Clone, Serialize)]
pub struct Told {
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    pub outcome: String,
}

impl PodCidr {
    pub fn told(&self) -> Option<Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Takes note of a pod CIDR. Empty: nothing is said.
pub async fn update(daemon: &Arc<Daemon>, pod_cidr: String) -> Result<(), Error> {
    if pod_cidr.is_empty() {
        return Ok(());
    }
    let cidrs = PodCidrs::parse(&pod_cidr).map_err(|reason| Error::invalid(FIELD, reason))?;
    let done = {
        let daemon = daemon.clone();
        crate::blocking::run(move || install(&daemon, &cidrs)).await
    };
    let outcome = match &done {
        Ok(outcome) => outcome.clone(),
        Err(error) => error.chain(),
    };
    tracing::info!(pod_cidr, outcome, "told of the pod CIDR");
    *daemon
        .pod_cidr
        .told
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some(Told { pod_cidr, outcome });
    done.map(drop)
}

fn install(daemon: &Daemon, cidrs: &PodCidrs) -> Result<String, Error> {
    let Some(path) = &daemon.config.network.conf_template else {
        return Ok(
            "not applied: network.conf_template is not configured; the CNI configuration decides".to_owned(),
        );
    };
    let template = std::fs::read_to_string(path).map_err(Error::io("read the template", path))?;
    let installed = daemon
        .cni
        .install(&template, cidrs)
        .map_err(|source| Error::NetworkTemplate {
            path: path.clone(),
            source: Box::new(source),
        })?;
    Ok(match installed {
        Installed::Written(path) => format!("written to {}", path.display()),
        Installed::Unchanged(path) => format!("{} has it", path.display()),
        Installed::OtherNetwork(name) => format!("not applied: network {name:?} is configured already"),
    })
}
