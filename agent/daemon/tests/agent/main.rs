//! slipway-agent as a program, on a fake driver and before a stand-in kubelet.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod cdi;
mod files;
mod kubelet;
mod metrics;
mod node;
mod plugin;
mod sick;
mod who;
