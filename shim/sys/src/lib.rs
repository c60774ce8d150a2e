//! slipway-sys: the Linux calls Slipway makes, and the only place where it is `unsafe`.
//!
//! Owns: paths inside hostile trees ([`root`]), mounts, namespaces, processes and pidfds, cgroups of both versions and
//! their device programs, running a process in a container ([`exec`]) and the built-in init of a shared PID namespace
//! ([`init`]), running a program of the host on such a tree ([`jail`]), work in a process of its own ([`apart`]), giving
//! memory back ([`memory`]). Synchronous; needs neither threads nor an async runtime, and starts none
//! except in [`ns::in_netns`].
//! Refuses to know: CRI, images, pods, the shim's protocol. What OCI calls `LinuxResources` and `process` it reads as
//! JSON of its own types.

pub mod apart;
pub mod cgroup;
mod error;
pub mod exec;
pub mod fd;
mod fork;
pub mod fs;
pub mod init;
pub mod jail;
pub mod memory;
pub mod mount;
pub mod ns;
pub mod process;
mod remove;
pub mod root;
pub mod seccomp;

pub use error::{Failed, errno};
