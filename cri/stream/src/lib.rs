//! Streaming: the HTTP server behind the CRI's Exec, Attach and PortForward.
//!
//! ```text
//! CRI RPC ──▶ Urls::exec ──▶ http://127.0.0.1:PORT/exec/TOKEN          one use, one minute
//! kubelet, crictl ──HTTP/1.1 Upgrade──▶ server ─▶ http ─▶ negotiate ─▶ session ─▶ Runtime
//!                                                             │           │
//!                                     SPDY/3.1 · WebSocket · SPDY in WebSocket
//!                                          (`Framing`)    mux: bounded byte streams
//! ```
//!
//! One task serves one connection, from its first byte to its last: HTTP, the framing's state machine (which does no
//! I/O of its own), and the runtime's future. Nothing is queued without a bound, and a stream whose reader is slow holds
//! up its writer: through windows where the client keeps them, through TCP where it does not.
//!
//! What it refuses to know: containers, pods, processes, terminals, the CRI's messages. The [`Runtime`] gets bounded byte
//! streams and splices them to whatever it has.
#![forbid(unsafe_code)]

mod config;
mod http;
mod mux;
mod negotiate;
mod resize;
mod room;
mod runtime;
mod server;
mod session;
mod spdy;
mod status;
mod token;
mod transport;
mod urls;
mod violation;
mod websocket;

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(any(test, feature = "fuzzing"))]
mod noise;

pub use config::Config;
pub use mux::{Hangup, Input, Output};
pub use resize::{Resizes, TerminalSize};
pub use runtime::{Attach, Exec, Forward, Runtime, Stdio};
pub use server::{BindError, Server};
pub use urls::{AttachRequest, ExecRequest, PortForwardRequest, RequestError, Urls};
