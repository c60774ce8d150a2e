//! A GPU driver for machines without one: `libnvidia-ml.so.1` at the C ABI, and the files a driver has around it.
//!
//! The library (`abi`) answers from a folder that `SLIPWAY_FAKE_GPU` names:
//! ```text
//! topology.json   what there is ([`topology`]); read again when it changes, so geometry may change under a running program
//! events          appended to: "GPU XID [GI CI]" raises an XID, "GPU reset" brings a lost GPU back, "GPU reattach" only for
//!                 processes that start after it, "reload" makes the library useless to those before it, "GPU set KEY VALUE"
//!                 changes what a GPU tells of its state (`events::Key`); kept for ever
//! overrides       "FUNCTION CODE", "FUNCTION sleep MS", "FUNCTION hang", each optionally followed by a GPU's index
//! calls           when it is there: one line a call, "FUNCTION [GPU]"
//! held            locked by each program that has initialised the library
//! ```
//! After XID 79 every call on that GPU answers GPU_IS_LOST until its reset. `driver` lays out the rest: libraries,
//! programs, /dev, /proc/driver/nvidia and /sys, below a folder of the test's.

#[allow(non_snake_case, reason = "the names are the C library's")]
mod abi;
pub mod driver;
mod events;
mod state;
pub mod topology;

pub use driver::Driver;
pub use topology::Topology;

/// The variable that names the folder.
pub const FOLDER: &str = "SLIPWAY_FAKE_GPU";
