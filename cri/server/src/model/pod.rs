//! A pod sandbox as asked for.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Resources, StringMap};

/// Everything a PodSandboxConfig says that means something on Linux.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodConfig {
    pub metadata: PodMetadata,
    /// Empty: the host's.
    pub hostname: String,
    /// Absolute; `None`: the pod's containers write no logs.
    pub log_directory: Option<PathBuf>,
    pub dns: Option<Dns>,
    pub port_mappings: Vec<PortMapping>,
    pub labels: StringMap,
    pub annotations: StringMap,
    pub runtime_handler: String,
    /// A cgroup path, or a slice's name with the systemd driver; `None`: one under the configured root.
    pub cgroup_parent: Option<String>,
    pub namespaces: PodNamespaces,
    /// Allows privileged containers.
    pub privileged: bool,
    pub sysctls: StringMap,
    /// What the kubelet reckons the pod costs besides its containers: kept and told, not applied.
    pub overhead: Option<Resources>,
    /// The sum of the containers' limits: kept and told, not applied (the kubelet owns the pod's cgroup).
    pub resources: Option<Resources>,
}

/// Who a pod is. All four together are its name here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodMetadata {
    pub name: String,
    pub uid: String,
    pub namespace: String,
    pub attempt: u32,
}

impl PodMetadata {
    /// The reserved name; unique among pods. Kubernetes names and uids have no underscore.
    pub fn reserved_name(&self) -> String {
        format!("{}_{}_{}_{}", self.name, self.namespace, self.uid, self.attempt)
    }
}

/// What goes into resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// One port of the pod on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    /// Never 0: a mapping without a host port is dropped when decoding.
    pub host_port: u16,
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// Which of a pod's namespaces are its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodNamespaces {
    /// `Pod` or `Node`.
    pub network: Scope,
    /// `Pod` (shared, with the built-in init), `Container` or `Node`.
    pub pid: Scope,
    /// `Pod`, `Container` or `Node`.
    pub ipc: Scope,
    pub user: Option<UserNamespace>,
}

/// Who shares a namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    #[default]
    Pod,
    Container,
    Node,
}

/// A user namespace for the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    pub uids: Vec<slipway_spec::IdMap>,
    pub gids: Vec<slipway_spec::IdMap>,
}
