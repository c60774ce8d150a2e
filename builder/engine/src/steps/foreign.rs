//! What devices bring into a step's files, and how it is kept out of its layer.
//!
//! A device's mounts need points to be mounted on, and its hooks make links, name folders to the loader and make the
//! loader's cache anew. All of that is done when the container is created and waits to be started: it is surveyed then,
//! and taken out when the command has ended ([`slipway_snapshot::Scaffold`]). Knows nothing of devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use slipway_image::Active;
use slipway_snapshot::{Root, Scaffold, Survey};

use super::StepContext;
use super::run::OWN_MOUNTS;
use crate::error::StepError;

/// What the loader reads to find libraries, relative to the root.
const LOADER_CACHE: &str = "etc/ld.so.cache";
/// What makes it, where an image has it.
const LDCONFIG: [&str; 2] = ["/sbin/ldconfig", "/usr/sbin/ldconfig"];

/// What is in the step's files because of its devices, and none of its own doing.
pub(super) struct Foreign {
    /// Full names of the devices.
    pub devices: Vec<String>,
    upper: PathBuf,
    before: Option<Survey>,
    found: Option<Arc<Scaffold>>,
}

impl Foreign {
    pub fn of(devices: &[String], active: &Active) -> Foreign {
        Foreign {
            devices: devices.to_vec(),
            upper: active.upper.clone(),
            before: None,
            found: None,
        }
    }

    /// What is there now is the step's, and what every container's own mounts are made on.
    pub async fn begin(&mut self, cx: &StepContext<'_>, root: &Root) -> Result<(), StepError> {
        if !self.devices.is_empty() {
            for own in OWN_MOUNTS {
                let made = root.mkdir_all(Path::new(own), 0o755, None);
                made.map_err(|source| StepError::Io {
                    act: "make the directory",
                    path: own.into(),
                    source,
                })?;
            }
            let upper = self.upper.clone();
            self.before = Some(cx.blocking(move || Survey::of(&upper).map_err(survey)).await?);
        }
        Ok(())
    }

    /// What has come since then is not.
    pub async fn end(&mut self, cx: &StepContext<'_>) -> Result<(), StepError> {
        if let Some(before) = self.before.take() {
            let upper = self.upper.clone();
            let found = move || before.scaffold(&upper).map_err(survey);
            self.found = Some(Arc::new(cx.blocking(found).await?));
        }
        Ok(())
    }

    /// The program to make the loader's cache anew with, where the command has made it itself: while the driver's libraries
    /// were there, which it names now and which are not in the layer. What would name them to the program is gone then.
    pub async fn loader_cache(
        &self,
        cx: &StepContext<'_>,
        active: &Active,
        merged: &Path,
    ) -> Result<Option<&'static str>, StepError> {
        let Some(found) = self.found.clone() else {
            return Ok(None);
        };
        let (mount, merged) = (active.mount.clone(), merged.to_path_buf());
        cx.blocking(move || {
            let remade = found.is_remade(&mount, Path::new(LOADER_CACHE));
            if !remade.map_err(survey)? {
                return Ok(None);
            }
            let root = Root::open(&merged).map_err(|source| StepError::Io {
                act: "open",
                path: merged.clone(),
                source,
            })?;
            let there = |path: &&&str| matches!(root.metadata(Path::new(path)), Ok(Some(_)));
            let Some(program) = LDCONFIG.iter().find(there) else {
                return Ok(None);
            };
            found.strike_mounted(&mount, &merged).map_err(struck)?;
            Ok(Some(*program))
        })
        .await
    }

    /// Takes out what has come; nothing is mounted any more.
    pub async fn strike(self, cx: &StepContext<'_>, active: &Active) -> Result<(), StepError> {
        let (Some(found), mount) = (self.found, active.mount.clone()) else {
            return Ok(());
        };
        cx.blocking(move || found.strike(&mount).map_err(struck)).await
    }
}

fn struck(source: slipway_snapshot::SnapshotError) -> StepError {
    StepError::Mount {
        act: "take what its devices brought out of",
        source,
    }
}

fn survey(source: slipway_snapshot::SnapshotError) -> StepError {
    StepError::Mount {
        act: "look for what devices bring into",
        source,
    }
}
