//! The test harness: real components around the programs under test.
//!
//! Owns instances of `slipwayd` with roots, bridges and cgroups of their own, real registries on loopback, small images
//! made by our own builder, and the proof that nothing is left. Knows the programs only from outside: by their command
//! lines, the CRI and the host's own view (`/proc`, `/sys`).
#![forbid(unsafe_code)]

pub mod cluster;
pub mod cmd;
pub mod containerd;
pub mod cri;
pub mod crictl;
pub mod critest;
pub mod daemon;
pub mod forge;
pub mod image;
pub mod lab;
pub mod leftovers;
pub mod oracle;
pub mod process;
pub mod registry;
pub mod spdy;
pub mod vm;
pub mod websocket;
pub mod world;

pub use crictl::Crictl;
pub use daemon::{Daemon, Setup};
pub use lab::Lab;
pub use world::World;

/// Tells the person who runs the suite, also when the test passes: the test runner keeps back only what `print!` says.
pub fn tell(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// The CRI's generated types, for tests that build requests.
pub use slipway_cri_api::v1;
