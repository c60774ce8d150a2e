//! The device plugin API towards kubelet: one plugin a resource, kept registered over every restart of kubelet.
//!
//! What is handed out is published in a [`Board`]; a plugin reads it and knows nothing else. So a plugin may be begun anew at
//! any time without losing what was known about a device's health.

mod register;
mod serve;

use std::path::PathBuf;
use std::sync::Arc;

use slipway_cdi::Spec;
use slipway_gpu::Inventory;
use tokio::sync::watch;

use crate::config::Resources;
use crate::node::Item;

pub use register::keep_registered;

/// The API's version.
pub const VERSION: &str = "v1beta1";
/// kubelet's socket in its folder.
pub const KUBELET_SOCKET: &str = "kubelet.sock";

/// What plugins read.
#[derive(Debug, Clone, Default)]
pub struct Posted {
    /// The node as it is.
    pub inventory: Inventory,
    /// Everything handed out, by resource.
    pub items: std::collections::BTreeMap<String, Vec<Item>>,
    /// The CDI file, for runtimes that cannot read it.
    pub spec: Option<Spec>,
}

/// Where it is posted.
pub type Board = watch::Receiver<Arc<Posted>>;

/// One resource's plugin.
#[derive(Debug, Clone)]
pub struct Plugin {
    /// As `nvidia.com/gpu`.
    pub resource: String,
    /// kubelet's folder.
    pub folder: PathBuf,
    /// Vendor and class of CDI names.
    pub kind: String,
    /// How things are handed out.
    pub settings: Resources,
    /// What is handed out.
    pub board: Board,
}

impl Plugin {
    fn items(&self) -> Vec<Item> {
        let posted = self.board.borrow();
        posted.items.get(&self.resource).cloned().unwrap_or_default()
    }
}
