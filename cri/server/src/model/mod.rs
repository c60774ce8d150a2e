//! What pods and containers are asked to be, as checked values: the CRI's messages after `rpc::decode`, before anything
//! is done with them. They are what the records keep and what status answers are made of.
//!
//! No wire type appears here and nothing here does any work.

mod container;
mod pod;

pub use container::{
    Apparmor, ContainerConfig, ContainerMetadata, Device, ImageSpec, Mount, MountSource, PidNamespace,
    Seccomp, Security, StopSignal,
};
pub use pod::{Dns, PodConfig, PodMetadata, PodNamespaces, PortMapping, Protocol, Scope, UserNamespace};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Labels or annotations.
pub type StringMap = BTreeMap<String, String>;

/// Cgroup limits and the OOM score, which the CRI keeps in one message.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    pub limits: slipway_spec::Resources,
    pub oom_score_adj: i64,
}
