//! What a build has outside the store, written down before it is made, and how anybody undoes it.
//!
//! A build owns one directory under the state directory:
//! ```text
//! <state>/builds/<build>/             0700
//!   shim.sock shim.json shim.log      the shim's own
//!   resolv.conf hosts                 bind-mounted into RUN steps
//!   net/<stage>                       a pinned network namespace
//!   mnt/<n>/                          overlay mounts of COPY, ADD, WORKDIR
//!   run/<step>/{config.json,rootfs}   the bundle of a RUN
//! ```
//! and, where RUN has a network of its own, one CNI attachment a stage. The words below are the owner's estate in
//! the catalog ([`slipway_image::Store::set_estate`]). Undoing it, in this order: the shim and its containers
//! (alive: stop and release the pod, shut down; dead: `cleanup --all`), CNI DEL, mounts, pinned namespaces, the
//! directory; then the store's own rows ([`slipway_image::DeadOwner::bury`]). Every part is idempotent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use slipway_image::{DeadOwner, Store};
use slipway_network::{Attachment, Cni};
use slipway_shim_client::{Error as ShimError, Launcher};

use crate::sandbox::Surroundings;

/// The estate's JSON.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Estate {
    /// 1.
    pub version: u32,
    /// What it belongs to: `build`.
    pub kind: String,
    /// The build's own directory.
    pub state_dir: PathBuf,
    /// CNI attachments, the intended ones included.
    #[serde(default)]
    pub attachments: Vec<Attachment>,
}

/// Why an estate could not be undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstateError {
    /// Its owner used words that we do not know.
    #[error("what the dead owner {owner} left cannot be read")]
    Unreadable {
        /// The owner.
        owner: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The store said no.
    #[error("cannot ask the store for what dead builds left")]
    Store(#[source] Box<slipway_image::StoreError>),
    /// The shim or what it ran cannot be stopped.
    #[error("cannot stop the shim of the build in {}", state_dir.display())]
    Shim {
        /// The build's directory.
        state_dir: PathBuf,
        /// Why.
        #[source]
        source: Box<ShimError>,
    },
    /// A network cannot be left.
    #[error("cannot disconnect a stage of the build in {} from its network", state_dir.display())]
    Network {
        /// The build's directory.
        state_dir: PathBuf,
        /// Why.
        #[source]
        source: Box<slipway_network::CniError>,
    },
    /// Nobody here can leave networks.
    #[error(
        "cannot disconnect a stage of the build in {} from its network: CNI is not configured here",
        state_dir.display()
    )]
    NoNetworks {
        /// The build's directory.
        state_dir: PathBuf,
    },
    /// A mount or file stays.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl From<slipway_image::StoreError> for EstateError {
    fn from(error: slipway_image::StoreError) -> EstateError {
        EstateError::Store(Box::new(error))
    }
}

impl Estate {
    /// The estate of a build with this directory.
    #[must_use]
    pub fn of(state_dir: &Path) -> Estate {
        Estate {
            version: 1,
            kind: "build".to_owned(),
            state_dir: state_dir.to_path_buf(),
            attachments: Vec::new(),
        }
    }

    /// For [`Store::set_estate`].
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Undoes everything; `cni` is needed where there are attachments, `launcher` where there may be a shim.
    ///
    /// # Errors
    /// The first thing that would not go; what could be undone besides is.
    pub async fn undo(&self, launcher: Option<&Launcher>, cni: Option<&Cni>) -> Result<(), EstateError> {
        let mut first = None;
        let mut keep = |result: Result<(), EstateError>| {
            if let Err(e) = result {
                first.get_or_insert(e);
            }
        };
        if let Some(launcher) = launcher {
            keep(self.stop_shim(launcher).await);
        }
        for attachment in &self.attachments {
            let state_dir = self.state_dir.clone();
            keep(match cni {
                Some(cni) => cni.del(attachment).await.map_err(|e| EstateError::Network {
                    state_dir,
                    source: Box::new(e),
                }),
                None => Err(EstateError::NoNetworks { state_dir }),
            });
        }
        keep(self.undo_files().await);
        first.map_or(Ok(()), Err)
    }

    /// Unmounts what is mounted in the build's directory, and removes it.
    ///
    /// # Errors
    /// What would not go.
    pub async fn undo_files(&self) -> Result<(), EstateError> {
        let dir = self.state_dir.clone();
        let removed = tokio::task::spawn_blocking(move || remove_dir(&dir)).await;
        removed.unwrap_or_else(|e| {
            let source = std::io::Error::other(e);
            Err(EstateError::Io {
                act: "remove",
                path: self.state_dir.clone(),
                source,
            })
        })
    }

    /// Ends the shim and whatever it runs; nothing where there is none.
    ///
    /// # Errors
    /// What would not go.
    pub async fn stop_shim(&self, launcher: &Launcher) -> Result<(), EstateError> {
        if !self.state_dir.exists() {
            return Ok(());
        }
        let failed = |e| EstateError::Shim {
            state_dir: self.state_dir.clone(),
            source: Box::new(e),
        };
        match launcher.connect(&self.state_dir).await {
            Ok(shim) => {
                let stopped = tokio::time::timeout(Duration::from_secs(30), async {
                    shim.stop_pod().await?;
                    for container in shim.info().await?.containers {
                        shim.delete(&container.id).await?;
                    }
                    shim.release_pod().await?;
                    shim.shutdown().await
                })
                .await;
                match stopped {
                    Ok(Ok(())) => {
                        let _ = tokio::time::timeout(Duration::from_secs(5), shim.closed()).await;
                    }
                    Ok(Err(e)) => tracing::warn!(error = %e, "the shim of a build does not stop by itself"),
                    Err(_) => tracing::warn!("the shim of a build does not answer"),
                }
            }
            Err(ShimError::Gone) => {}
            Err(e) => tracing::debug!(error = %e, "no connection to the shim of a build"),
        }
        // Also after an orderly end: idempotent, and the proof that nothing is left.
        launcher
            .cleanup(&self.state_dir, true)
            .await
            .map(|_| ())
            .map_err(failed)
    }
}

/// Unmounts what is mounted in a build's directory and removes it.
fn remove_dir(dir: &Path) -> Result<(), EstateError> {
    let failed = |act, path: &Path| {
        let path = path.to_path_buf();
        move |source| EstateError::Io { act, path, source }
    };
    for point in slipway_snapshot::mounts_under(dir).map_err(failed("find what is mounted in", dir))? {
        slipway_snapshot::unmount(&point)
            .map_err(std::io::Error::other)
            .map_err(failed("unmount", &point))?;
    }
    slipway_snapshot::remove_tree(dir).map_err(failed("remove", dir))
}

/// Undoes what dead builds left; how many. A build that is alive is never touched.
///
/// # Errors
/// The first that could not be undone, after all were tried: it is tried again at the next call.
pub async fn sweep(store: &Store, around: &Surroundings) -> Result<usize, EstateError> {
    // Without the shim's programs nothing can be undone; whoever has them will.
    let Ok(launcher) = &around.launcher else {
        return Ok(0);
    };
    let asked = store.clone();
    let dead = tokio::task::spawn_blocking(move || asked.dead_owners()).await;
    let dead = dead.map_err(|e| EstateError::Io {
        act: "ask",
        path: store.root().to_path_buf(),
        source: std::io::Error::other(e),
    })??;
    let mut undone = 0;
    let mut first = None;
    for owner in dead {
        match undo_dead(owner, launcher, around.cni.as_deref()).await {
            Ok(true) => undone += 1,
            Ok(false) => {}
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    first.map_or(Ok(undone), Err)
}

/// Undoes what one dead owner left; false: it was no build.
async fn undo_dead(owner: DeadOwner, launcher: &Launcher, cni: Option<&Cni>) -> Result<bool, EstateError> {
    let id = owner.id.clone();
    let estate: Estate = serde_json::from_str(&owner.estate).map_err(|source| EstateError::Unreadable {
        owner: id.clone(),
        source,
    })?;
    if estate.kind != "build" {
        return Ok(false);
    }
    tracing::info!(owner = %id, dir = %estate.state_dir.display(), "undoing what a dead build left");
    estate.undo(Some(launcher), cni).await?;
    tokio::task::spawn_blocking(move || owner.bury())
        .await
        .map_err(|e| EstateError::Io {
            act: "bury",
            path: estate.state_dir.clone(),
            source: std::io::Error::other(e),
        })??;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store with one living owner, and dead ones with these estates.
    fn store_of_the_dead(root: &Path, estates: &[&str]) -> Store {
        let open = || Store::open(root, slipway_image::OwnerKind::Build).unwrap();
        let store = open();
        for estate in estates {
            open().set_estate(Some(estate)).unwrap();
        }
        store
    }

    #[tokio::test]
    async fn a_dead_build_that_cannot_be_undone_holds_up_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let gone = Estate::of(&dir.path().join("gone")).to_json();
        let store = store_of_the_dead(
            &dir.path().join("root"),
            &[&gone, "not ours", &gone, "nor this", &gone],
        );
        let around = Surroundings {
            cdi: std::sync::Arc::new(slipway_cdi::Cache::new(Vec::new())),
            launcher: Ok(Launcher {
                shim: "/no/shim".into(),
                worker: "/no/worker".into(),
            }),
            state: dir.path().to_path_buf(),
            cni: None,
        };
        let error = sweep(&store, &around).await.unwrap_err();
        assert!(matches!(error, EstateError::Unreadable { .. }), "{error}");
        let left: Vec<String> = store
            .dead_owners()
            .unwrap()
            .into_iter()
            .map(|o| o.estate.clone())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(!left.contains(&gone));
    }

    #[test]
    fn an_estate_survives_its_json() {
        let estate = Estate::of(Path::new("/run/slipway/builds/x"));
        let back: Estate = serde_json::from_str(&estate.to_json()).unwrap();
        assert_eq!((back.version, back.kind.as_str()), (1, "build"));
        assert_eq!(back.state_dir, estate.state_dir);
    }
}
