//! The caches of a RUN: which directory each is, taking all of them without waiting in a circle, and how a new one
//! begins: filled by one step that has it alone, and shared only then.
//!
//! Lock order: the directories of `shared` and `locked` mounts in the order of their paths, each once a command; then
//! those of `private` ones, which nobody waits for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use slipway_dockerfile::instruction::Sharing;
use slipway_image::Digest;

use super::StepContext;
use super::mounts::{copy_plain, drop_view, resolve_one, view};
use crate::cache_mount::{CacheDir, Identity};
use crate::copy::digest::Selection;
use crate::copy::tree::{All, Owners, Tree};
use crate::error::StepError;
use crate::layer::Tip;

/// How long a cache that somebody else uses is left alone before it is tried again.
const PAUSE: Duration = Duration::from_millis(50);
/// So many builds use private caches of one id at a time at most.
const MOST_PRIVATE: usize = 10_000;

/// A directory that stays.
pub(super) struct CacheMount {
    pub target: PathBuf,
    pub read_only: bool,
    pub id: String,
    pub sharing: Sharing,
    pub start: Option<Start>,
    pub mode: u32,
    pub owner: (u32, u32),
}

/// What a new cache is a copy of.
pub(super) struct Start {
    pub tip: Tip,
    pub key: Digest,
    pub source: String,
}

impl CacheMount {
    fn dir(&self, root: &Path) -> PathBuf {
        let start = self.start.as_ref();
        CacheDir::path(
            root,
            &Identity {
                id: &self.id,
                start: start.map(|start| (start.key, &*start.source)),
                mode: self.mode,
                owner: self.owner,
            },
        )
    }
}

/// Takes the directories of all caches of a command, filled; in the order of the mounts.
pub(super) async fn take(
    cx: &StepContext<'_>,
    caches: Vec<&CacheMount>,
) -> Result<Vec<Arc<CacheDir>>, StepError> {
    let root = cx.build.store.root();
    // Alone, when any mount of the directory wants it so.
    let mut waited: BTreeMap<PathBuf, (&CacheMount, bool)> = BTreeMap::new();
    for cache in caches.iter().filter(|cache| cache.sharing != Sharing::Private) {
        let (_, alone) = waited.entry(cache.dir(root)).or_insert((*cache, false));
        *alone |= cache.sharing == Sharing::Locked;
    }
    let mut taken = BTreeMap::new();
    for (dir, (cache, alone)) in waited {
        let held = Arc::new(wait_for(cx, cache, &dir, alone).await?);
        taken.insert(dir, held);
    }
    let mut all = Vec::with_capacity(caches.len());
    for cache in caches {
        let own = cache.dir(root);
        all.push(
            match taken.get(&own).filter(|_| cache.sharing != Sharing::Private) {
                Some(dir) => Arc::clone(dir),
                None => {
                    let dir = a_free_one(&own)?;
                    if !dir.fs().exists() {
                        fill(cx, cache, &dir).await?;
                    }
                    Arc::new(dir)
                }
            },
        );
    }
    Ok(all)
}

fn failed(dir: &Path) -> impl FnOnce(std::io::Error) -> StepError {
    let path = dir.to_path_buf();
    move |source| StepError::Io {
        act: "open the cache",
        path,
        source,
    }
}

/// Takes a directory, filled.
async fn wait_for(
    cx: &StepContext<'_>,
    cache: &CacheMount,
    dir: &Path,
    alone: bool,
) -> Result<CacheDir, StepError> {
    let mut told = false;
    loop {
        let new = !dir.join("fs").exists();
        let taken = CacheDir::try_take(dir, !alone && !new).map_err(failed(dir))?;
        let held = match taken {
            Some(taken) if alone || new => {
                if !taken.fs().exists() {
                    fill(cx, cache, &taken).await?;
                }
                match alone {
                    true => Some(taken),
                    false => taken.share().map_err(failed(dir))?,
                }
            }
            // It may have been pruned between our looking and taking it.
            Some(taken) => Some(taken).filter(|taken| taken.fs().exists()),
            None => None,
        };
        if let Some(held) = held {
            return Ok(held);
        }
        if !std::mem::replace(&mut told, true) {
            cx.remark("another step uses the cache mount; waiting for it");
        }
        tokio::select! {
            () = cx.build.cancel.wait() => return Err(StepError::Cancelled),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

/// The first of the numbered directories that nobody uses.
fn a_free_one(own: &Path) -> Result<CacheDir, StepError> {
    for n in 0..MOST_PRIVATE {
        let dir = match n {
            0 => own.to_path_buf(),
            n => PathBuf::from(format!("{}-{n}", own.display())),
        };
        if let Some(taken) = CacheDir::try_take(&dir, false).map_err(failed(&dir))? {
            return Ok(taken);
        }
    }
    Err(StepError::Task {
        reason: format!("each of the {MOST_PRIVATE} directories of a private cache mount is in use"),
    })
}

/// Makes a new cache, which we have alone: empty, or a copy of what it is to start with.
async fn fill(cx: &StepContext<'_>, cache: &CacheMount, dir: &CacheDir) -> Result<(), StepError> {
    let fs = dir.fs();
    let io = |source| StepError::Io {
        act: "make the cache",
        path: fs.clone(),
        source,
    };
    let fresh = dir.fresh().map_err(io)?;
    let made = match &cache.start {
        Some(start) => copy_start(cx, start, &fresh).await,
        None => Ok(()),
    };
    let placed = made.and_then(|()| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(cache.mode)).map_err(io)?;
        std::os::unix::fs::chown(&fresh, Some(cache.owner.0), Some(cache.owner.1)).map_err(io)?;
        std::fs::rename(&fresh, &fs).map_err(io)
    });
    if placed.is_err()
        && let Err(error) = std::fs::remove_dir_all(&fresh)
    {
        tracing::debug!(%error, path = %fresh.display(), "goes when the cache is made by somebody else");
    }
    placed
}

async fn copy_start(cx: &StepContext<'_>, start: &Start, to: &Path) -> Result<(), StepError> {
    let (view, point) = view(cx, &start.tip).await?;
    let (from, to, source, cancel) = (
        point.clone(),
        to.to_path_buf(),
        start.source.clone(),
        cx.build.cancel.clone(),
    );
    let copied = cx
        .blocking(move || {
            let tree = Tree::open(&from, None, Owners::Kept, "the cache's source")?;
            let found = resolve_one(&tree, &source)?;
            let entries = tree.list(&found, &All)?;
            let selection = Selection {
                contents_only: found.is_dir(),
                found,
                entries,
            };
            copy_plain(&to, "/", true, &tree, &selection, &cancel)
        })
        .await;
    drop_view(cx, view, point).await?;
    copied
}
