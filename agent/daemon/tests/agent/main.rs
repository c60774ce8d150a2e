//! slipway-agent as a program, on a fake driver and before a stand-in kubelet.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod api;
mod bad;
mod cdi;
mod faults;
mod faults_again;
mod files;
mod kubelet;
mod kubernetes;
mod metrics;
mod node;
mod plugin;
mod release;
mod sick;
mod signs;
mod watching;
mod who;
