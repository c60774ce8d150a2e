//! The CRI contract: messages, clients and server traits generated from `proto/runtime.proto`.
//!
//! Owns the wire and nothing else: no validation, no defaults, no behaviour. Decoding into checked types happens in
//! `slipwayd`'s `rpc` modules.
#![forbid(unsafe_code)]

/// `runtime.v1`: the package kubelet, crictl and critest speak.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}
