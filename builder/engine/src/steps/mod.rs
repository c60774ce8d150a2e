//! One step of a stage: found in the cache, or done on a snapshot of its own and sealed behind the next one.
//!
//! ```text
//! key ─▶ cache? ─hit─▶ the layer that is there
//!          └miss─▶ lock the key ─▶ cache again? ─▶ snapshot ─▶ mount ─▶ run | copy | workdir ─▶ unmount ─▶ sealer
//! ```

mod add;
mod caches;
mod copy;
mod foreign;
mod mounts;
mod origins;
mod run;
mod workdir;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use slipway_dockerfile::{Action, StageProgram, Step};
use slipway_image::{Active, CacheLock, Digest, LayerOptions, Lease, Store, StoreError};

use crate::build::Build;
use crate::clamp;
use crate::error::StepError;
use crate::layer::{CacheValue, Finished, Later, Sealer, Tip};
use crate::output::Tail;
use crate::progress::{Event, StepId};
use crate::request::BuildRequest;

/// How long one try for a key's lock takes before the build looks whether it was cancelled.
const LOCK_TRY: Duration = Duration::from_millis(250);

/// Everything a step needs to know.
pub(crate) struct StepContext<'a> {
    pub build: &'a Arc<Build>,
    pub stage: &'a StageProgram,
    pub step: &'a Step,
    pub id: StepId,
    pub sealer: &'a Sealer,
    /// What is below.
    pub tip: Tip,
    /// The key of what is below.
    pub key: Digest,
    /// The end of the output, for the error message.
    pub tail: Arc<Tail>,
}

/// By what a step's layer is found.
pub(crate) struct Keys {
    /// Its own key, which knows all that it depends on.
    own: Digest,
    /// A way to it that is known already.
    way: Option<Digest>,
    /// One that is not known yet.
    later: Option<Later>,
}

impl Keys {
    /// The step's own key alone.
    pub fn only(own: Digest) -> Keys {
        Keys {
            own,
            way: None,
            later: None,
        }
    }

    /// With a way by the layers of what the step takes: known when it was looked for, or to be known.
    pub fn with(own: Digest, way: Option<Digest>, later: impl FnOnce() -> Option<Later>) -> Keys {
        Keys {
            own,
            way,
            later: if way.is_none() { later() } else { None },
        }
    }
}

/// What a step made.
pub(crate) struct StepResult {
    pub tip: Tip,
    pub key: Digest,
    pub created: SystemTime,
    pub cached: bool,
}

/// What in a step cannot be done yet; asked before anything runs.
pub(crate) fn not_built(step: &Step) -> Option<String> {
    use slipway_dockerfile::instruction::{MountKind, Security};
    use slipway_dockerfile::step::{CopySource, Source};
    match &step.action {
        Action::Config | Action::Workdir(_) => None,
        Action::Copy(copy) => {
            let keyword = if copy.is_add { "ADD" } else { "COPY" };
            if let Source::Named(name) = &copy.from {
                return Some(format!("{keyword} --from={name}, a named build context,"));
            }
            copy.sources.iter().find_map(|source| match source {
                CopySource::Url { url, .. } => Some(format!("ADD of a URL ({url})")),
                CopySource::Git(git) => Some(format!("ADD of a git repository ({})", git.remote)),
                CopySource::Path { .. } | CopySource::Document { .. } => None,
            })
        }
        Action::Run(run) => {
            if run.security == Security::Insecure {
                return Some("RUN --security=insecure".to_owned());
            }
            run.mounts.iter().find_map(|mount| match &mount.kind {
                MountKind::Ssh { .. } => Some("RUN --mount=type=ssh".to_owned()),
                MountKind::Bind {
                    from: Source::Named(name),
                    ..
                }
                | MountKind::Cache {
                    from: Source::Named(name),
                    ..
                } => Some(format!("RUN --mount from={name}, a named build context,")),
                MountKind::Cache {
                    from: Source::Context,
                    ..
                } => Some("RUN --mount=type=cache from the build context".to_owned()),
                _ => None,
            })
        }
    }
}

/// What a step asks for that whoever started the build did not grant; asked before anything runs.
pub(crate) fn not_granted(request: &BuildRequest, step: &Step) -> Option<StepError> {
    use slipway_dockerfile::instruction::Network;
    match &step.action {
        Action::Run(run) if run.network == Network::Host && !request.grants_host_network() => {
            Some(StepError::NotGranted {
                what: "the host's network (RUN --network=host)".to_owned(),
                flag: "--allow=network.host (or --network=host, for all its steps)".to_owned(),
            })
        }
        _ => None,
    }
}

/// What the cache has under `own`; `ways` lead there from now on.
fn look_up(
    store: &Store,
    lease: &Lease,
    own: &Digest,
    ways: &[Digest],
) -> Result<Option<StepResult>, StepError> {
    let entry = store
        .cache_get(own, lease)
        .map_err(StepError::store("look into the build cache"))?;
    let Some(entry) = entry else { return Ok(None) };
    let (Some(chain), Ok(value)) = (entry.chain, serde_json::from_str::<CacheValue>(&entry.value)) else {
        return Ok(None);
    };
    for way in ways {
        store
            .cache_put(way, Some(&chain), &entry.value)
            .map_err(StepError::store("write the build cache"))?;
    }
    Ok(Some(StepResult {
        tip: Tip::committed(chain),
        key: value.key,
        created: value.created(),
        cached: true,
    }))
}

impl StepContext<'_> {
    /// Does the step.
    pub async fn execute(&self) -> Result<StepResult, StepError> {
        match &self.step.action {
            Action::Copy(copy) => copy::execute(self, copy).await,
            Action::Run(run) => run::execute(self, run).await,
            Action::Workdir(workdir) => workdir::execute(self, workdir).await,
            Action::Config => Err(StepError::Task {
                reason: "a step without files was executed".to_owned(),
            }),
        }
    }

    pub fn remark(&self, text: impl Into<String>) {
        self.build.progress.event(Event::Remark {
            step: self.id,
            text: text.into(),
        });
    }

    /// Runs blocking work that gives up when the build is cancelled.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
    ) -> Result<T, StepError> {
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(e) => Err(StepError::Task {
                reason: e.to_string(),
            }),
        }
    }

    /// The cache's answer for the first of the keys. The others are ways to it: they are recorded on a hit, and whoever
    /// comes by one next finds the layer at once. Never the other way round: what is found by such a way says nothing
    /// about what the first key knows, as another build may have made the same source anew.
    async fn cached(&self, keys: &[Digest]) -> Result<Option<StepResult>, StepError> {
        if self.build.request.no_cache {
            return Ok(None);
        }
        let Some((own, ways)) = keys.split_first() else {
            return Ok(None);
        };
        let (store, lease) = (self.build.store.clone(), Arc::clone(&self.build.lease));
        let (own, ways) = (*own, ways.to_vec());
        self.blocking(move || look_up(&store, &lease, &own, &ways)).await
    }

    /// The right to be the one who makes `key`'s layer; `None` where the cache is not used.
    async fn lock(&self, key: &Digest) -> Result<Option<CacheLock>, StepError> {
        if self.build.request.no_cache {
            return Ok(None);
        }
        let mut told = false;
        loop {
            if self.build.cancel.is_set() {
                return Err(StepError::Cancelled);
            }
            let (store, key) = (self.build.store.clone(), *key);
            let tried = tokio::task::spawn_blocking(move || store.cache_lock(&key, LOCK_TRY)).await;
            match tried.map_err(|e| StepError::Task {
                reason: e.to_string(),
            })? {
                Ok(lock) => return Ok(Some(lock)),
                Err(StoreError::Timeout { .. }) if !told => {
                    self.remark("the same step is being made elsewhere; waiting for its result");
                    told = true;
                }
                Err(StoreError::Timeout { .. }) => {}
                Err(source) => {
                    return Err(StepError::Store {
                        act: "lock the step's cache key",
                        source: Box::new(source),
                    });
                }
            }
        }
    }

    /// The cache's answer, or else what `work` makes of a snapshot, mounted. The first of `keys` is the step's own, the
    /// others are ways to it.
    pub async fn cached_or<F>(&self, keys: Keys, work: F) -> Result<StepResult, StepError>
    where
        F: AsyncFnOnce(&Path) -> Result<(), StepError>,
    {
        self.cached_or_made(keys, async |active: &Active| self.on_mount(active, work).await)
            .await
    }

    /// As [`StepContext::cached_or`], for work that mounts for itself or writes below what is there.
    pub async fn cached_or_made<F>(&self, keys: Keys, work: F) -> Result<StepResult, StepError>
    where
        F: AsyncFnOnce(&Active) -> Result<(), StepError>,
    {
        let Keys { own: key, way, later } = keys;
        let keys: Vec<Digest> = std::iter::once(key).chain(way).collect();
        if let Some(found) = self.cached(&keys).await? {
            return Ok(found);
        }
        let lock = self.lock(&key).await?;
        if lock.is_some()
            && let Some(found) = self.cached(&keys).await?
        {
            return Ok(found);
        }
        let active = self.prepare().await?;
        // What the step writes has to be on disk soon after its end: the disk may as well begin now.
        let flushing = self.build.store.flushing();
        let worked = work(&active).await;
        drop(flushing);
        if let Err(error) = worked {
            self.build.forget(&active.key).await;
            return Err(error);
        }
        let created = SystemTime::now();
        if let Some(epoch) = self.build.epoch {
            let upper = active.upper.clone();
            self.blocking(move || clamp::clamp(&upper, epoch)).await?;
        }
        let tip = self.sealer.seal(Finished {
            active,
            below: self.tip.clone(),
            keys,
            later,
            created,
            lock,
            options: LayerOptions {
                clamp_mtime: self.build.epoch,
                ..LayerOptions::default()
            },
        });
        Ok(StepResult {
            tip,
            key,
            created,
            cached: false,
        })
    }

    async fn prepare(&self) -> Result<Active, StepError> {
        self.build
            .prepare(&self.tip)
            .await
            .map_err(StepError::prepare("make a snapshot for the step"))
    }

    /// Mounts a snapshot, lets `work` use it, and unmounts it whatever happened.
    pub async fn on_mount<F>(&self, active: &Active, work: F) -> Result<(), StepError>
    where
        F: AsyncFnOnce(&Path) -> Result<(), StepError>,
    {
        let point = self.build.sandbox.fresh_dir("mnt")?;
        let (mount, at) = (active.mount.clone(), point.clone());
        self.blocking(move || {
            mount
                .mount_volatile(&at)
                .map_err(|source| StepError::Mount { act: "mount", source })
        })
        .await?;
        let worked = work(&point).await;
        let unmounted = self
            .blocking(move || {
                slipway_snapshot::unmount(&point).map_err(|source| StepError::Mount {
                    act: "unmount",
                    source,
                })?;
                std::fs::remove_dir(&point).map_err(|source| StepError::Io {
                    act: "remove",
                    path: point,
                    source,
                })
            })
            .await;
        worked.and(unmounted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_image::OwnerKind;

    #[test]
    fn a_way_to_a_layer_says_nothing_about_the_contents() {
        if !crate::tests_as_root::is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), OwnerKind::Build).unwrap();
        let lease = store.lease("test").unwrap();
        let active = store.prepare("a", None, &lease).unwrap();
        let layers = store.seal_layers(None, &[(&active, &LayerOptions::default())], &lease);
        let chain = layers.unwrap()[0].chain;
        let (own, way) = (Digest::of(b"own"), Digest::of(b"way"));
        let value = serde_json::to_string(&CacheValue {
            created_ns: 0,
            key: way,
        })
        .unwrap();
        // Somebody else's, of what the way led to then.
        store.cache_put(&way, Some(&chain), &value).unwrap();
        assert!(look_up(&store, &lease, &own, &[way]).unwrap().is_none());
        assert!(look_up(&store, &lease, &own, &[]).unwrap().is_none());
        let other = Digest::of(b"other");
        store.cache_put(&own, Some(&chain), &value).unwrap();
        assert!(look_up(&store, &lease, &own, &[other]).unwrap().is_some());
        assert!(look_up(&store, &lease, &other, &[]).unwrap().is_some());
    }
}
