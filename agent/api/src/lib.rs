//! kubelet's APIs on the node: messages, clients and server traits generated from `proto/`.
//!
//! Owns the wire and nothing else, as far as the agent uses it.
#![forbid(unsafe_code)]

/// The device plugin API: kubelet's registration, and what a plugin serves.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod v1beta1 {
    tonic::include_proto!("v1beta1");
}

/// Which container has which devices.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod podresources {
    tonic::include_proto!("v1");
}

/// The pods that kubelet knows, with their UIDs. The pods themselves are Kubernetes' own messages ([`core`]).
#[allow(missing_docs, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod pods {
    tonic::include_proto!("v1alpha1");
}

/// As much of Kubernetes' own messages as is read: the numbers of `k8s.io.api.core.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod core {
    tonic::include_proto!("core");
}
