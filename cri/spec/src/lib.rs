//! From an image's configuration, a container's wishes and the facts of the host to one OCI
//! runtime specification.
//!
//! Pure: no wire types come in, no file is read, no system call is made; what is needed from the
//! host or from the image's root file system comes in as values ([`HostFacts`], passwd and group
//! as bytes, device nodes already looked up). The same [`generate`] serves pods
//! (slipwayd) and RUN steps (the builder, through [`RunStep`]).
//!
//! Everything that comes in is hostile until checked here: paths, ids, sysctls, annotations,
//! profiles. Image labels are never looked at.

#![forbid(unsafe_code)]

mod annotations;
pub mod blockio;
pub mod capability;
mod devices;
mod error;
mod generate;
mod host;
mod input;
mod json;
mod masks;
mod mounts;
mod namespaces;
mod path;
mod process;
pub mod resources;
mod run_step;
pub mod seccomp;
pub mod signal;
pub mod sysctl;
pub mod user;

pub use blockio::{BlockIo, BlockIoClasses, BlockIoError};
pub use error::SpecError;
pub use generate::{SpecOutput, generate};
pub use host::{CgroupVersion, HostFacts};
pub use input::{
    Apparmor, CapabilityRequest, CapabilitySet, Device, IdMap, ImageDefaults, Mount, Namespace, Namespaces,
    PodFiles, Propagation, Resources, Rlimit, Seccomp, SelinuxLabels, SpecInput, SupplementalGroupsPolicy,
    UserNamespace, UserSpec,
};
pub use mounts::{check_propagation, volumes};
pub use run_step::RunStep;
