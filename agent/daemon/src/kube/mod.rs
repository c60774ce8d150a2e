//! Telling Kubernetes: the node's labels and condition, Events on pods and on the node. All of it goes through one queue that
//! is worked off beside everything else: an API server that is gone is tried again with growing pauses, and nobody waits for it.
//!
//! What has to be so (labels, condition) is sent as it is now; what happened (Events) is kept in order, [`MAX_NOTES`] at most.
//! Rights: get and patch `nodes`, patch `nodes/status`, create `events`, and get `pods` where kubelet tells no UIDs. What is done
//! about pods on sick GPUs (`fault`) has its own: get and delete `pods`, create `pods/eviction`.

mod access;
mod client;
mod events;
mod labels;
mod report;

pub use access::Source;
pub use client::{Client, KubeError, Refusal};
pub use events::Note;
pub use report::{Report, keep_features};
