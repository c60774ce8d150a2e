//! Container networking through CNI plugins: which network is configured, connecting a pod to it,
//! disconnecting it again whatever happened in between, and its pinned network namespace.
//!
//! The plugins are run by this crate itself, after the CNI specification 1.1 (and what plugins of
//! 0.3.0 to 1.0.0 understand of it). It keeps no state: an [`Attachment`] has everything that DEL
//! needs, and its keeper (slipwayd's catalog, a build) keeps it from before ADD until DEL is
//! proven. It knows nothing of CRI.

#![forbid(unsafe_code)]

mod attachment;
mod chain;
mod cni;
mod config;
mod error;
pub mod netns;
mod plugin;
mod pod;
mod reservation;
mod result;
mod template;
mod version;

pub use attachment::{Attachment, PluginConfig};
pub use chain::chain;
pub use cni::{Cni, Installed, NetworkStatus};
pub use error::{CniError, PluginError};
pub use pod::{Bandwidth, Dns, PodNetwork, PortMapping, Protocol};
pub use result::{Interface, IpAddress, NetworkResult, Route};
pub use template::{PodCidrs, TemplateError};
