//! `slipway build` with real mounts, shims and containers. Needs root, busybox-static, and the shim's programs beside
//! this one; offline.
#![forbid(unsafe_code)]
// What fails in a test's own scaffolding fails the test.
#![allow(clippy::unwrap_used)]

mod crash;
mod devices;
mod files;
mod lab;
mod language;
mod network;
mod results;
mod secrets;
