//! What devices bring into a step's files, and how it is kept out of its layer.
//!
//! A device's mounts need points to be mounted on, and its hooks make links, name folders to the loader and make the
//! loader's cache anew. All of that is done when the container is created and waits to be started: it is surveyed then,
//! and taken out when the command has ended ([`slipway_snapshot::Scaffold`]). Knows nothing of devices.
//!
//! Where the command has made the loader's cache itself, as packages do, it has found the driver's libraries too. What is
//! no longer there is taken out of that cache, and links that it names, which the hooks' program made before the command's
//! could, stay where their files do.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use slipway_image::Active;
use slipway_snapshot::{Root, RootfsMount, Scaffold, Survey};

use super::StepContext;
use super::run::OWN_MOUNTS;
use crate::error::StepError;
use crate::loader_cache::LoaderCache;

/// What the loader reads to find libraries, relative to the root.
const LOADER_CACHE: &str = "etc/ld.so.cache";
/// What its program knows of libraries that it has read once, by their inodes; it can do without.
const LOADER_NOTES: &str = "var/cache/ldconfig/aux-cache";
/// A cache larger than this is not read.
const CACHE_LIMIT: usize = 8 << 20;

/// What is in the step's files because of its devices, and none of its own doing.
pub(super) struct Foreign {
    /// Full names of the devices.
    pub devices: Vec<String>,
    upper: PathBuf,
    before: Option<Survey>,
    found: Option<Arc<Scaffold>>,
    remade: Option<Remade>,
}

/// The loader's cache, made by the command.
struct Remade {
    cache: Option<LoaderCache>,
    /// Where the files that it names are, links in folders' names followed: relative paths.
    named: BTreeSet<PathBuf>,
}

impl Foreign {
    pub fn of(devices: &[String], active: &Active) -> Foreign {
        Foreign {
            devices: devices.to_vec(),
            upper: active.upper.clone(),
            before: None,
            found: None,
            remade: None,
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

    /// Looks what the command has made, while it is mounted at `merged`.
    pub async fn look(
        &mut self,
        cx: &StepContext<'_>,
        active: &Active,
        merged: &Path,
    ) -> Result<(), StepError> {
        if let Some(found) = self.found.clone() {
            let (mount, merged) = (active.mount.clone(), merged.to_path_buf());
            self.remade = cx.blocking(move || remade(&found, &mount, &merged)).await?;
        }
        Ok(())
    }

    /// Takes out what has come; nothing is mounted any more.
    pub async fn strike(self, cx: &StepContext<'_>, active: &Active) -> Result<(), StepError> {
        let Some(found) = self.found else {
            return Ok(());
        };
        let Some(Remade { cache, named }) = self.remade else {
            let mount = active.mount.clone();
            let strike = move || found.strike(&mount, &BTreeSet::new()).map_err(struck);
            return cx.blocking(strike).await;
        };
        let (mount, upper) = (active.mount.clone(), self.upper.clone());
        cx.blocking(move || {
            found.strike(&mount, &named).map_err(struck)?;
            let notes = Path::new(LOADER_NOTES);
            let root = open(&upper)?;
            let there = root.symlink_metadata(notes).map_err(failed("look up", notes))?;
            match there.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Some(FileType::RegularFile) => root.remove_all(notes).map_err(failed("remove", notes)),
                _ => Ok(()),
            }
        })
        .await?;
        let Some(cache) = cache else {
            cx.remark(format!(
                "/{LOADER_CACHE} is in no format that is known; it may name libraries of the step's devices"
            ));
            return Ok(());
        };
        let mut left = active.clone();
        left.mount = active.mount.to_read();
        let mut gone = BTreeSet::new();
        let looked = cx.on_mount(&left, async |merged: &Path| {
            let root = open(merged)?;
            let there = |path: &&str| matches!(root.metadata(Path::new(path)), Ok(Some(_)));
            gone = cache
                .paths()
                .filter(|path| !there(path))
                .map(str::to_owned)
                .collect();
            Ok(())
        });
        looked.await?;
        if gone.is_empty() {
            return Ok(());
        }
        let upper = self.upper;
        cx.blocking(move || {
            let path = Path::new(LOADER_CACHE);
            let without = cache.without(&gone);
            let write = |root: Root| {
                let without = without.ok_or_else(|| io::Error::other("too large"))?;
                let mut file = root.open_file(path, OFlags::WRONLY | OFlags::TRUNC)?;
                io::Write::write_all(&mut file, &without)
            };
            write(open(&upper)?).map_err(failed("take the devices' libraries out of", path))
        })
        .await
    }
}

/// What the command has made of the loader's cache; `None`: nothing.
fn remade(found: &Scaffold, mount: &RootfsMount, merged: &Path) -> Result<Option<Remade>, StepError> {
    let path = Path::new(LOADER_CACHE);
    if !found.is_remade(mount, path).map_err(survey)? {
        return Ok(None);
    }
    let root = open(merged)?;
    let bytes = root.read(path, CACHE_LIMIT).ok().flatten().unwrap_or_default();
    let cache = LoaderCache::parse(bytes);
    let mut named = BTreeSet::new();
    for file in cache.iter().flat_map(LoaderCache::paths).map(Path::new) {
        if let (Some(folder), Some(name)) = (file.parent(), file.file_name())
            && let Ok(folder) = root.resolve(folder)
        {
            named.insert(folder.strip_prefix("/").unwrap_or(&folder).join(name));
        }
    }
    Ok(Some(Remade { cache, named }))
}

fn open(dir: &Path) -> Result<Root, StepError> {
    Root::open(dir).map_err(failed("open", dir))
}

fn failed(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StepError + use<> {
    let path = path.to_path_buf();
    move |source| StepError::Io { act, path, source }
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
