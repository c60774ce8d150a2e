//! The streaming server, from outside: over both transports, with a client of these tests. crictl comes in tests/suites.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod abuse;
mod client;
mod command;
mod fake;
mod forward;
mod tls;
