//! The device plugin API towards kubelet: one plugin a resource, kept registered over every restart of kubelet.
//!
//! What is handed out is posted on a [`Board`]; a plugin reads it and knows nothing else. So a plugin may be begun anew at any
//! time without losing what was known about a device's health.

mod register;
mod serve;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::board::{Board, Posted};
use crate::config::Resources;
use crate::status::Status;

pub use register::keep_registered;

/// The API's version.
pub const VERSION: &str = "v1beta1";
/// kubelet's socket in its folder.
pub const KUBELET_SOCKET: &str = "kubelet.sock";

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
    /// Whether containers are kept from starting on a sick device.
    pub refuse_start: bool,
    /// Where a GPU is named on which a container was kept from starting.
    pub refused: mpsc::Sender<String>,
    /// What is handed out.
    pub board: Board,
    /// Where it is told whether kubelet has it.
    pub status: Arc<Status>,
    /// How long it waits for what.
    pub pace: Pace,
}

/// How long registering waits.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// After a first failure; twice as long after each further one.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
    /// How often the folder is looked at where nothing is heard of it.
    pub look: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            first: Duration::from_millis(50),
            longest: Duration::from_secs(10),
            look: Duration::from_secs(10),
        }
    }
}

impl Plugin {
    fn posted(&self) -> Arc<Posted> {
        Arc::clone(&self.board.borrow())
    }
}
