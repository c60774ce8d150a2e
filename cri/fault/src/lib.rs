//! `slipway.fault.v1`: how a program of the node has slipwayd end a container for a reason. Messages, client and server
//! trait generated from `proto/fault.proto`, and the bounds that it states.
//!
//! Owns the wire and nothing else: who checks, kills and remembers is slipwayd.
#![forbid(unsafe_code)]

/// `slipway.fault.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("slipway.fault.v1");
}

/// Where slipwayd serves it with its default state directory.
pub const SOCKET: &str = "/run/slipway/fault/fault.sock";
/// The longest reason, in bytes.
pub const MAX_REASON: usize = 64;
/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 1024;
/// The longest hold, in seconds.
pub const MAX_HOLD: u32 = 3600;
