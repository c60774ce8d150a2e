//! slipway-agent: the GPUs of a node, for kubelet and for container runtimes.
//!
//! ```text
//!  NVML ─ child process ─ slipway_gpu::Supervisor ─▶ run ─▶ node (what may be handed out) ─▶ board ─▶ plugin ─▶ kubelet
//!                                                     └─▶ cdi ─▶ /var/run/cdi/*.json ─▶ slipwayd, containerd, CRI-O
//! ```
//! `run` is the story of the daemon; `node` and `prefer` are pure. The agent and the runtime meet in CDI files, and where a GPU
//! is condemned under a container (`fault`), in slipwayd's service for that.

#![forbid(unsafe_code)]

pub mod board;
mod cause;
pub mod cdi;
mod cli;
pub mod config;
mod control;
mod fault;
mod gone;
mod hook;
mod http;
mod ill;
mod incident;
mod kmsg;
mod kube;
pub mod node;
mod own;
pub mod plugin;
mod pods;
pub mod prefer;
mod record;
mod run;
mod status;

pub use cli::main;
