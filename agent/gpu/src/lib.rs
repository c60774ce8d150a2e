//! The GPUs of a node: what they are ([`Inventory`]), who may use them ([`Device`]), and whether they are well ([`health`]).
//!
//! NVML can hang in a way that nothing in its process can end. So it is talked to in a child process ([`child`]), which the
//! [`Supervisor`] replaces when it does not answer in time; what it said before is kept. Nothing here knows of kubelet or of
//! CDI.
//!
//! Unsafe code lies in `nvml::raw` only: the calls that nvml-wrapper lacks or cuts short.

#![deny(unsafe_code)]

pub mod child;
pub mod health;
mod model;
mod nvml;
pub mod signs;
mod supervisor;

pub use model::{
    Device, Failed, Gpu, Inventory, Links, Look, MAX_PROCESSES, Memory, MigDevice, Probe, Process, Rows,
    Sample, System,
};
pub use nvml::{EventKind, GpuEvent};
pub use supervisor::{GpuError, Launch, Supervisor};
