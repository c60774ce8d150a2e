//! The streaming server, from outside: over both transports, with a client of these tests and with the real crictl.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod abuse;
mod client;
mod command;
mod crictl;
mod fake;
mod forward;
mod tls;
