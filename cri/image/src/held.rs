//! A lease in async code: what it held is given back on a blocking thread, whoever drops it.
//!
//! Releasing a lease writes to the catalog and may remove directories with many files.

use crate::store::Lease;
use std::ops::Deref;
use std::sync::Arc;
use tokio::runtime::Handle;

/// A lease that may be dropped anywhere.
#[derive(Debug)]
pub(crate) struct Held(Option<Lease>);

impl Held {
    pub(crate) fn new(lease: Lease) -> Held {
        Held(Some(lease))
    }

    /// Gives back what it held, now, on a thread that may block, if nobody else has it.
    pub(crate) fn release(held: Arc<Held>) {
        if let Some(mut held) = Arc::into_inner(held) {
            drop(held.0.take());
        }
    }
}

impl Deref for Held {
    type Target = Lease;
    fn deref(&self) -> &Lease {
        self.0.as_ref().expect("it is taken out only when dropped")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Without a runtime we are on a thread that may block.
        if let (Some(lease), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(lease));
        }
    }
}
