//! `slipway build` with real mounts, shims and containers. Needs root, busybox-static, and the shim's programs beside
//! this one; offline.
#![forbid(unsafe_code)]

mod crash;
mod files;
mod lab;
mod language;
mod results;
