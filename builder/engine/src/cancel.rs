//! The one signal that stops a build: the user's interrupt or another step's failure.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

/// Set once, seen by tasks (which await it) and by blocking work (which polls it).
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    token: Arc<CancellationToken>,
}

impl Cancel {
    /// Not set.
    #[must_use]
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// One that is set with this one, but not the other way round.
    #[must_use]
    pub fn child(&self) -> Cancel {
        Cancel {
            token: Arc::new(self.token.child_token()),
        }
    }

    /// Sets it.
    pub fn set(&self) {
        self.token.cancel();
    }

    /// Whether it is set.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is set.
    pub async fn wait(&self) {
        self.token.cancelled().await;
    }
}
