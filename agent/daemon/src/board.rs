//! What is known of the node at this moment, posted for whoever needs it: plugins, metrics, labels. Who reads it asks nobody
//! else, so none of them can be held up by NVML.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use slipway_cdi::Spec;
use slipway_gpu::Inventory;
use slipway_gpu::health::Health;
use tokio::sync::watch;

use crate::node::Item;

/// The node as it is.
#[derive(Debug, Clone, Default)]
pub struct Posted {
    /// Its GPUs.
    pub inventory: Inventory,
    /// Everything handed out, by resource.
    pub items: BTreeMap<String, Vec<Item>>,
    /// The CDI file, for runtimes that cannot read it.
    pub spec: Option<Spec>,
    /// The GPUs that are not well.
    pub health: Health,
    /// GPUs that do not answer, by UUID: nobody asks them.
    pub silent: BTreeSet<String>,
    /// How many XIDs were heard, by GPU and number, since the agent was started.
    pub xids: BTreeMap<(String, u64), u64>,
}

impl Posted {
    /// What is handed out of a resource.
    pub fn of(&self, resource: &str) -> &[Item] {
        self.items.get(resource).map_or(&[], Vec::as_slice)
    }
}

/// Where it is posted.
pub type Board = watch::Receiver<Arc<Posted>>;
