//! What a pull or a push tells while it goes on. Plain values; refuses to know how they are shown.

use crate::digest::Digest;
use std::time::Duration;

/// Hears how a pull or push goes on. Called from the task of the caller, in order; must not block for long.
pub trait Progress: Send + Sync {
    /// Something happened.
    fn event(&self, event: ProgressEvent);
}

/// For callers that do not want to know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _event: ProgressEvent) {}
}

impl<F: Fn(ProgressEvent) + Send + Sync> Progress for F {
    fn event(&self, event: ProgressEvent) {
        self(event);
    }
}

/// One layer of the image being pulled or pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    /// Its blob.
    pub digest: Digest,
    /// Bytes of its blob.
    pub size: u64,
    /// It is in the store already: nothing will be fetched.
    pub present: bool,
}

/// One piece of news. Byte counts are running totals; those of one layer never shrink, except after a corrupt
/// transfer that starts again.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgressEvent {
    /// Pull: the reference means this manifest or index.
    Resolved {
        /// Its digest.
        digest: Digest,
        /// The host that said so.
        host: String,
    },
    /// Pull: the image's layers, bottom first. Comes once, before any event of a layer.
    Layers {
        /// All of them.
        layers: Vec<LayerProgress>,
    },
    /// Pull: bytes of a layer's blob have arrived.
    Downloaded {
        /// The layer.
        layer: Digest,
        /// So far.
        done: u64,
        /// In the end.
        total: u64,
    },
    /// Pull: bytes of a layer's tar have been unpacked.
    Unpacked {
        /// The layer.
        layer: Digest,
        /// So far, uncompressed; how many there will be is not known.
        done: u64,
    },
    /// Pull: all layers are unpacked and are being made durable.
    Committing,
    /// Pull: the registry could not give the image; the one that was built on this node is the answer.
    AnsweredByBuild {
        /// What the registry said.
        reason: String,
    },
    /// A transfer broke and goes on after a pause.
    Retrying {
        /// Of which object.
        what: String,
        /// Why.
        reason: String,
        /// How long the pause is.
        pause: Duration,
    },
    /// Push: a layer's blob is being made of its snapshot.
    Compressing {
        /// The position of the layer, bottom first.
        index: usize,
        /// Bytes of its uncompressed tar.
        total: u64,
    },
    /// Push: it is known which blob a layer is.
    PushLayer {
        /// The position of the layer, bottom first.
        index: usize,
        /// Its blob.
        layer: Digest,
        /// Bytes of its blob.
        size: u64,
    },
    /// Push: the registry has the layer's blob already.
    Exists {
        /// The position of the layer, bottom first.
        index: usize,
    },
    /// Push: the registry took the layer's blob over from another of its repositories.
    Mounted {
        /// The position of the layer, bottom first.
        index: usize,
        /// The repository.
        from: String,
    },
    /// Push: bytes of a layer's blob have been sent.
    Uploaded {
        /// The position of the layer, bottom first.
        index: usize,
        /// So far.
        done: u64,
        /// In the end; not known while the blob is still being made.
        total: Option<u64>,
    },
    /// Push: the manifest is in the registry under its name.
    Pushed {
        /// Its digest.
        digest: Digest,
    },
}
