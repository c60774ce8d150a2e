//! Whether a pod's records say what its shim knows. Knows neither of them.
//!
//! After a start they may be older than the truth until the shim has been asked: a container that is written down as created
//! may have run. Who acts on a status takes it for the truth, so nothing is told meanwhile; but not for ever, since a pod of
//! which nothing can be told cannot be taken down.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::error::Error;

/// How long one question waits.
const PATIENCE: Duration = Duration::from_secs(2);
/// After which what is written down is told as it is.
const LONGEST: Duration = Duration::from_secs(60);

/// See the module.
pub struct Known {
    /// Since when they may not.
    unknown: watch::Sender<Option<Instant>>,
}

impl Known {
    /// Of a pod that is made now.
    pub fn yes() -> Known {
        Known {
            unknown: watch::Sender::new(None),
        }
    }

    /// From now on they do, or do not until the shim has been asked.
    pub fn set(&self, known: bool) {
        self.unknown.send_if_modified(|unknown| {
            let other = unknown.is_none() != known;
            if other {
                *unknown = (!known).then(Instant::now);
            }
            other
        });
    }

    /// Waits until they do.
    ///
    /// # Errors
    /// [`Error::Timeout`] when they do not after a moment.
    pub async fn wait(&self, pod: &str) -> Result<(), Error> {
        self.wait_for(pod, PATIENCE).await
    }

    async fn wait_for(&self, pod: &str, timeout: Duration) -> Result<(), Error> {
        let Some(since) = *self.unknown.borrow() else {
            return Ok(());
        };
        let told_anyway = since + LONGEST;
        let until = told_anyway.min(Instant::now() + timeout);
        let mut changes = self.unknown.subscribe();
        let known = tokio::time::timeout_at(until, changes.wait_for(Option::is_none)).await;
        if known.is_ok() || Instant::now() >= told_anyway {
            return Ok(());
        }
        Err(Error::Timeout {
            kind: "the shim of pod",
            id: pod.to_owned(),
            what: "say what has become of its containers, so that nothing is told of them; asking on",
            timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_told_until_it_is_known_or_nobody_will_ever_know() {
        const SHORT: Duration = Duration::from_millis(20);
        let known = Known::yes();
        known.wait("p").await.unwrap();
        known.set(false);
        let error = known.wait_for("p", SHORT).await.unwrap_err();
        assert!(error.to_string().contains("pod p did not say"), "{error}");
        let (waited, ()) = tokio::join!(known.wait_for("p", SHORT * 1000), async {
            tokio::time::sleep(SHORT).await;
            known.set(true);
        });
        waited.unwrap();
        let long_ago = Instant::now() - LONGEST;
        known.unknown.send_replace(Some(long_ago));
        // Still not known, which is no news.
        known.set(false);
        known.wait("p").await.unwrap();
    }
}
