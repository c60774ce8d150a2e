//! The shim from slipwayd's and the builder's side: find it, start it, connect to a running one, call it, clean up after
//! a dead one. It knows the protocol and the process, nothing of what a pod or a build means to its caller.
//!
//! A [`Shim`] is one connection, shared by its clones; calls run side by side on it and each has a deadline. Losing the
//! connection never harms the pod: [`Launcher::connect`] makes a new one, and exits are kept until acknowledged.
#![forbid(unsafe_code)]

mod calls;
mod connection;
mod error;
mod launch;

pub use calls::{CreateContainer, Exit, Output, Shim, Stdin};
pub use error::Error;
pub use launch::{DeadContainer, Launcher};
pub use slipway_shim_api::{pod, status::Code, task};

/// What every call of this crate answers with.
pub type Result<T> = std::result::Result<T, Error>;
