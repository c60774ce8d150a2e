//! What has to be remembered over restarts, on disk: which GPUs are sick, and which were there.
//!
//! ```text
//! <paths.state>/health.json   the sick ones; durable before it is seen
//! <paths.state>/gpus.json     those that were there last, for when one does not answer; of one boot
//! ```
//! A thread of the runtime's writes; nobody waits for the disk but the end of the program. When several changes come while
//! one is written, the last is written next. What could not be written (the disk is full) is tried again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use slipway_gpu::Gpu;
use slipway_gpu::health::Health;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long what could not be written waits for the next attempt.
const AGAIN: Duration = Duration::from_secs(30);

/// The GPUs that were there last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    boot_id: String,
    /// As they were.
    pub gpus: Vec<Gpu>,
}

impl Known {
    /// Those of another boot may have been taken out since, and a record that cannot be read is none: it is only for GPUs
    /// that do not answer.
    pub fn load(path: &Path, boot_id: String) -> Known {
        let read = std::fs::read(path).ok();
        let kept: Option<Known> = read.and_then(|text| serde_json::from_slice(&text).ok());
        kept.filter(|k| k.boot_id == boot_id).unwrap_or(Known {
            boot_id,
            gpus: Vec::new(),
        })
    }

    fn save(&self, path: &Path) -> std::io::Result<()> {
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(new, path)
    }
}

/// Everything that is kept.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Kept {
    /// The sick ones.
    pub health: Health,
    /// Those that were there.
    pub known: Known,
}

/// The state folder.
#[derive(Debug, Clone)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// The record of sick GPUs.
    pub fn health(&self) -> PathBuf {
        self.0.join("health.json")
    }

    /// The record of GPUs.
    pub fn known(&self) -> PathBuf {
        self.0.join("gpus.json")
    }

    /// What is on disk then: of a part that could not be written, the old one.
    fn save(&self, new: &Kept, old: &Kept) -> Kept {
        let mut saved = new.clone();
        if new.health != old.health
            && let Err(e) = new.health.save(&self.health())
        {
            saved.health.clone_from(&old.health);
            let error = &e as &dyn std::error::Error;
            tracing::error!(file = %self.health().display(), error, "the record of sick GPUs cannot be written");
        }
        if new.known != old.known
            && let Err(e) = new.known.save(&self.known())
        {
            saved.known.clone_from(&old.known);
            let error = &e as &dyn std::error::Error;
            tracing::error!(file = %self.known().display(), error, "the record of GPUs cannot be written");
        }
        saved
    }
}

/// Writes what is sent, until the sender is gone; `old` is what is on disk.
pub fn keep(folder: Folder, old: Kept) -> (watch::Sender<Arc<Kept>>, JoinHandle<()>) {
    keep_trying(folder, old, AGAIN)
}

fn keep_trying(folder: Folder, old: Kept, again: Duration) -> (watch::Sender<Arc<Kept>>, JoinHandle<()>) {
    let mut old = Arc::new(old);
    let (to, mut from) = watch::channel(Arc::clone(&old));
    let work = async move {
        loop {
            let ended = matches!(timeout(again, from.changed()).await, Ok(Err(_)));
            let new = Arc::clone(&from.borrow_and_update());
            if new != old {
                let (folder, before) = (folder.clone(), Arc::clone(&old));
                if let Ok(saved) = tokio::task::spawn_blocking(move || folder.save(&new, &before)).await {
                    old = Arc::new(saved);
                }
            }
            if ended {
                return;
            }
        }
    };
    (to, tokio::spawn(work))
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_gpu::health::Policy;

    #[tokio::test]
    async fn the_last_change_is_on_disk_when_the_program_ends() {
        let dir = tempfile::tempdir().expect("a directory");
        let folder = Folder(dir.path().to_owned());
        let (health, _) = Health::load(&folder.health(), "boot");
        let kept = Kept {
            health,
            known: Known::load(&folder.known(), "boot".into()),
        };
        let (to, done) = keep(folder.clone(), kept.clone());
        for n in 0..50u32 {
            let mut new = kept.clone();
            new.health
                .xid(&Policy::default(), &format!("GPU-{n}"), 79, None, u64::from(n));
            to.send_replace(Arc::new(new));
        }
        drop(to);
        done.await.expect("it ends");
        let (health, told) = Health::load(&folder.health(), "boot");
        assert!(told.is_none() && health.of("GPU-49").is_some());
    }

    async fn until(there: impl Fn() -> bool) {
        let wait = async {
            while !there() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(Duration::from_secs(30), wait).await.expect("it comes");
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_written_when_it_can_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let folder = Folder(dir.path().to_owned());
        let (health, _) = Health::load(&folder.health(), "boot");
        let kept = Kept {
            health,
            known: Known::load(&folder.known(), "boot".into()),
        };
        // What cannot be replaced by a file.
        std::fs::create_dir(folder.health()).expect("make it");
        let (to, done) = keep_trying(folder.clone(), kept.clone(), Duration::from_millis(20));
        let mut new = kept.clone();
        new.health.xid(&Policy::default(), "GPU-1", 79, None, 1);
        to.send_replace(Arc::new(new));
        let attempt = folder.health().with_extension("new");
        for _ in 0..2 {
            until(|| std::fs::remove_file(&attempt).is_ok()).await;
        }
        std::fs::remove_dir(folder.health()).expect("remove it");
        until(|| Health::load(&folder.health(), "boot").0.of("GPU-1").is_some()).await;
        drop(to);
        done.await.expect("it ends");
    }
}
