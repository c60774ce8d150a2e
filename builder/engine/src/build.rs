//! A build from request to image: read, plan, find the bases, solve, commit; and whatever happened, leave nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use slipway_dockerfile::{Base as PlanBase, Plan, PlanInput, Platform, Program, StageId, StageProgram};
use slipway_image::{Active, Image, Lease, NewImage, Puller, Store, StoreError, Writer};
use tokio::sync::watch;

use crate::base::{Base, Images};
use crate::cancel::Cancel;
use crate::config;
use crate::context::{self, Context};
use crate::copy::archive;
use crate::copy::tree::{Owners, Tree};
use crate::devices::Devices;
use crate::error::{BaseError, BuildError, Excerpt, StepError};
use crate::key::Scope;
use crate::layer::{PrepareError, Tip};
use crate::progress::{Event, Progress, StepId};
use crate::request::{BuildRequest, ContextSource};
use crate::sandbox::{Sandbox, Surroundings};
use crate::solve::{self, StageDone, StageOutcome};

/// Builds images into one store.
#[derive(Clone)]
pub struct Builder {
    /// The store, opened as [`slipway_image::OwnerKind::Build`]: one build at a time through one opening.
    pub store: Store,
    /// Pulls base images.
    pub puller: Arc<Puller>,
    /// Shim, network, state directory.
    pub around: Surroundings,
}

/// A build that went well.
#[derive(Debug, Clone)]
pub struct Built {
    /// The image, in the store and runnable.
    pub image: Image,
    /// Wall time of it all.
    pub elapsed: Duration,
    /// From the end of the last step until the image could be run.
    pub committing: Duration,
}

/// What all steps of a build share.
pub(crate) struct Build {
    pub id: String,
    pub store: Store,
    pub lease: Arc<Lease>,
    pub request: BuildRequest,
    pub progress: Arc<dyn Progress>,
    /// Set by the first failure and by an interrupt.
    pub cancel: Cancel,
    /// Set by an interrupt only: finished steps need not be kept.
    pub abandon: Cancel,
    pub sandbox: Sandbox,
    pub images: Images,
    pub devices: Devices,
    pub epoch: Option<i64>,
    /// What the image is for: images that files are taken from are its platform's, whatever a stage runs on.
    pub target_platform: Platform,
    pub context: Context,
    tree: Option<Arc<Tree>>,
    stages: HashMap<StageId, (String, watch::Receiver<Option<StageOutcome>>)>,
    next_step: AtomicU32,
    next_snapshot: AtomicU32,
    actives: Mutex<BTreeSet<String>>,
    sealing: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl Builder {
    /// Builds. `cancel` interrupts; nothing but the cache entries of finished steps is left then.
    ///
    /// # Errors
    /// See [`BuildError`]; after any of them nothing is left but what [`BuildError::Leftovers`] names.
    pub async fn build(
        &self,
        request: BuildRequest,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<Built, BuildError> {
        let began = Instant::now();
        let id = new_id().map_err(|source| BuildError::Io {
            act: "read",
            path: PathBuf::from("/dev/urandom"),
            source,
        })?;
        let lease = self.lease(&id).await?;
        let sandbox = Sandbox::begin(&id, &self.store, self.around.clone()).await?;
        let steps = cancel.child();
        let images = Images::new(
            self.store.clone(),
            Arc::clone(&lease),
            Arc::clone(&self.puller),
            request.pull,
            Arc::clone(&progress),
            steps.clone(),
        );
        let devices = Devices::new(Arc::clone(&self.around.cdi));
        let build = Build {
            id,
            store: self.store.clone(),
            lease,
            request,
            progress,
            cancel: steps,
            abandon: cancel.clone(),
            sandbox,
            images,
            devices,
            epoch: None,
            target_platform: own_platform(),
            context: Context::nothing(),
            tree: None,
            stages: HashMap::new(),
            next_step: AtomicU32::new(1),
            next_snapshot: AtomicU32::new(1),
            actives: Mutex::default(),
            sealing: Mutex::default(),
        };
        // The build's parts are shared by its tasks from here on, and all of those end before `solve` returns.
        let (build, made) = build.run(began).await;
        let ended = build.end().await;
        match (made, ended) {
            (Err(e), ended) => {
                if let Err(left) = ended {
                    let text = format!("{}", crate::chain(&left));
                    build.progress.event(Event::Warning { text });
                }
                Err(if cancel.is_set() { BuildError::Cancelled } else { e })
            }
            (Ok(_), Err(left)) => Err(left),
            (Ok(built), Ok(())) => Ok(built),
        }
    }

    async fn lease(&self, id: &str) -> Result<Arc<Lease>, BuildError> {
        let (store, what) = (self.store.clone(), format!("build {id}"));
        blocking("take a lease in the store", move || store.lease(&what))
            .await
            .map(Arc::new)
    }
}

async fn blocking<T: Send + 'static>(
    act: &'static str,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, BuildError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(BuildError::store(act)),
        Err(e) => Err(BuildError::Io {
            act,
            path: PathBuf::new(),
            source: std::io::Error::other(e),
        }),
    }
}

/// Twelve random hexadecimal digits.
fn new_id() -> std::io::Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; 6];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex::encode(bytes))
}

impl Build {
    async fn run(mut self, began: Instant) -> (Arc<Build>, Result<Built, BuildError>) {
        // Before anything is pulled.
        if let Err(e) = self.devices.of_build(&self.request) {
            return (Arc::new(self), Err(BuildError::Device(e)));
        }
        let program = match self.read().await {
            Ok(program) => program,
            Err(e) => return (Arc::new(self), Err(e)),
        };
        self.epoch = program.epoch;
        let mut senders = HashMap::new();
        for stage in &program.stages {
            let (sender, receiver) = watch::channel(None);
            senders.insert(stage.id, sender);
            self.stages.insert(stage.id, (stage.name.clone(), receiver));
        }
        let build = Arc::new(self);
        let made = async {
            let done = solve::solve(&build, &program, senders).await?;
            let target = program
                .stages
                .iter()
                .find(|s| s.id == program.target)
                .ok_or_else(|| BuildError::Unsupported {
                    what: "a build without a target".to_owned(),
                })?;
            build.progress.event(Event::Committing);
            let last_step = Instant::now();
            // Nothing runs any more: what is outside the store goes while the last layer is hashed.
            let (image, ended) = tokio::join!(build.commit(target, &done), build.sandbox.end());
            if let Err(left) = ended {
                // `end` tries once more and tells.
                tracing::debug!(error = %left, "the build's sandbox does not go at once");
            }
            let image = image?;
            Ok(Built {
                image,
                elapsed: began.elapsed(),
                committing: last_step.elapsed(),
            })
        }
        .await;
        (build, made)
    }

    /// Reads the input and finds the bases, until every step is known.
    async fn read(&mut self) -> Result<Program, BuildError> {
        let unpacked = self.unpack_context().await?;
        let (source, dockerfile) = (self.request.context.clone(), self.request.dockerfile.clone());
        self.context =
            tokio::task::spawn_blocking(move || context::load(&source, unpacked.as_deref(), &dockerfile))
                .await
                .map_err(|e| BuildError::Io {
                    act: "read the context in",
                    path: PathBuf::new(),
                    source: std::io::Error::other(e),
                })??;
        if let Some(dir) = &self.context.dir {
            let tree = Tree::open(
                dir,
                self.context.ignore.clone(),
                Owners::Root,
                "the build context",
            );
            self.tree = Some(Arc::new(tree.map_err(|e| BuildError::Io {
                act: "open the build context",
                path: dir.clone(),
                source: std::io::Error::other(e),
            })?));
        }
        let text = &self.context.dockerfile;
        let wrong = |error: slipway_dockerfile::Error| {
            let excerpt = Excerpt::of(&text.text, &error.span);
            BuildError::Dockerfile {
                error: Box::new(error),
                excerpt,
            }
        };
        let ast = slipway_dockerfile::parse(&text.text, &text.name).map_err(wrong)?;
        let input = PlanInput {
            build_args: self.request.build_args.clone(),
            target: self.request.target.clone(),
            labels: self.request.labels.clone(),
            ignore: self.context.ignore.clone(),
            ..PlanInput::new(own_platform())
        };
        let mut plan = Plan::new(&ast, &input).map_err(wrong)?;
        loop {
            let pending: Vec<_> = plan
                .pending()
                .into_iter()
                .map(|stage| {
                    (
                        stage.id,
                        stage.base.clone(),
                        stage.platform.clone(),
                        stage.span.clone(),
                    )
                })
                .collect();
            if pending.is_empty() {
                break;
            }
            let bases =
                futures_util::future::try_join_all(pending.iter().map(|(id, base, platform, span)| async {
                    let PlanBase::Image(name) = base else {
                        let what = "a named build context as a base".to_owned();
                        return Err(BuildError::Unsupported { what });
                    };
                    let base = self.images.get(name, platform, self.step(), false).await;
                    let image = base.and_then(|b| b.image());
                    image.map(|image| (*id, image)).map_err(|error| match error {
                        BaseError::Cancelled => BuildError::Cancelled,
                        error => BuildError::Base {
                            image: name.clone(),
                            span: span.clone(),
                            excerpt: Excerpt::of(&text.text, span),
                            error: Box::new(error),
                        },
                    })
                }))
                .await?;
            for (id, image) in bases {
                plan.resolve(id, image).map_err(wrong)?;
            }
        }
        let program = plan.evaluate().map_err(wrong)?;
        self.warn(&program);
        Ok(program)
    }

    /// Shows what the checks of the language have to say.
    fn warn(&self, program: &Program) {
        let unused = program.unused_build_args.iter();
        let unused =
            unused.map(|name| format!("--build-arg {name}: no stage that is built has an ARG of that name"));
        for text in program.warnings.iter().map(ToString::to_string).chain(unused) {
            self.progress.event(Event::Warning { text });
        }
    }

    /// An archive as context is unpacked into a snapshot of the build's own.
    async fn unpack_context(&self) -> Result<Option<PathBuf>, BuildError> {
        let ContextSource::Archive(stream) = &self.request.context else {
            return Ok(None);
        };
        let active = self
            .prepare(&Tip::scratch())
            .await
            .map_err(BuildError::prepare("make a place for the build context"))?;
        let (stream, cancel, dir) = (stream.clone(), self.cancel.clone(), active.upper.clone());
        let unpacked = tokio::task::spawn_blocking(move || {
            let io = std::io::Error::other::<crate::copy::CopyError>;
            let stream = archive::unpacked(stream.read(&cancel)?)?;
            archive::unpack_into(&dir, stream, &cancel).map_err(io)
        })
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e)));
        unpacked.map_err(|source| BuildError::Io {
            act: "unpack the build context into",
            path: active.upper.clone(),
            source,
        })?;
        Ok(Some(active.upper))
    }

    /// A number for a step that is about to be shown.
    pub fn step(&self) -> StepId {
        StepId(self.next_step.fetch_add(1, Ordering::Relaxed))
    }

    /// What determines the keys of a stage's steps.
    pub fn scope(&self, stage: &StageProgram) -> Scope {
        Scope {
            platform: stage.platform.clone(),
            network: self.request.network,
            epoch: self.epoch,
            devices: Vec::new(),
        }
    }

    /// The context's files.
    pub fn context_tree(&self) -> Result<Arc<Tree>, StepError> {
        self.tree.clone().ok_or_else(|| StepError::Unsupported {
            what: "copying from the build context where there is none (the Dockerfile came alone)".to_owned(),
        })
    }

    /// A stage's name for messages.
    pub fn stage_name(&self, stage: StageId) -> String {
        self.stages
            .get(&stage)
            .map_or_else(|| stage.0.to_string(), |(name, _)| name.clone())
    }

    /// Waits for another stage.
    pub async fn stage_result(&self, stage: StageId) -> Result<Tip, StepError> {
        Ok(self.stage_done(stage).await?.tip.clone())
    }

    /// Waits for another stage.
    pub async fn stage_done(&self, stage: StageId) -> Result<Arc<StageDone>, StepError> {
        let Some((_, receiver)) = self.stages.get(&stage) else {
            return Err(StepError::Task {
                reason: format!("stage {} was not planned", stage.0),
            });
        };
        let mut receiver = receiver.clone();
        tokio::select! {
            outcome = receiver.wait_for(Option::is_some) => match outcome.map(|o| o.clone()) {
                Ok(Some(Ok(done))) => Ok(done),
                _ => Err(StepError::Cancelled),
            },
            () = self.cancel.wait() => Err(StepError::Cancelled),
        }
    }

    /// An image that files are taken from.
    pub async fn source_image(
        &self,
        name: &str,
        platform: &Platform,
        step: StepId,
    ) -> Result<Arc<Base>, StepError> {
        self.images
            .get(name, platform, step, true)
            .await
            .map_err(|source| StepError::Source {
                image: name.to_owned(),
                source: Box::new(source),
            })
    }

    /// A writable snapshot on top of `tip`, remembered until it is a layer or forgotten.
    pub async fn prepare(&self, tip: &Tip) -> Result<Active, PrepareError> {
        let n = self.next_snapshot.fetch_add(1, Ordering::Relaxed);
        let key = format!("build/{}/{n}", self.id);
        self.actives().insert(key.clone());
        let (store, lease, tip) = (self.store.clone(), Arc::clone(&self.lease), tip.clone());
        let (asked, cancel) = (key.clone(), self.cancel.clone());
        tokio::task::spawn_blocking(move || tip.prepare(&store, &asked, &lease, &cancel))
            .await
            .unwrap_or(Err(StoreError::NoSnapshot { key }.into()))
    }

    /// Removes a snapshot that will not become a layer.
    pub async fn forget(&self, key: &str) {
        let (store, gone) = (self.store.clone(), key.to_owned());
        let removed = tokio::task::spawn_blocking(move || store.remove_active(&gone)).await;
        match removed {
            Ok(Ok(())) => {
                self.actives().remove(key);
            }
            // `end` tries again.
            Ok(Err(error)) => tracing::debug!(%error, key, "a snapshot is not removed yet"),
            Err(error) => tracing::debug!(%error, key, "a snapshot is not removed yet"),
        }
    }

    /// A stage's sealer that may have work left.
    pub fn still_sealing(&self, task: tokio::task::JoinHandle<()>) {
        self.sealing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(task);
    }

    fn actives(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.actives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the image of the finished target.
    async fn commit(&self, target: &StageProgram, done: &StageDone) -> Result<Image, BuildError> {
        let chain = match done.tip.chain().await {
            Ok(chain) => chain,
            Err(error) if error.is_cancelled() => return Err(BuildError::Cancelled),
            Err(error) => {
                return Err(
                    solve::not_sealed(self, &done.made).map_or(BuildError::Seal(error), BuildError::Step)
                );
            }
        };
        let (store, lease) = (self.store.clone(), Arc::clone(&self.lease));
        let (target, history) = (target.clone(), done.history.clone());
        let (names, epoch) = (self.request.tags.clone(), self.epoch);
        blocking("commit the image", move || {
            let mut layers = Vec::new();
            let mut at = chain;
            while let Some(chain) = at {
                let layer = store.layer(&chain)?.ok_or(StoreError::NoLayer { chain })?;
                layers.push(layer.diff_id);
                at = layer.parent;
            }
            layers.reverse();
            let config = config::bytes(&config::Parts {
                platform: &target.platform,
                config: &target.config,
                author: target.author.as_deref(),
                history: &history,
                layers: &layers,
                epoch,
                now: SystemTime::now(),
            });
            store.commit_image(NewImage {
                config: &config,
                manifest: None,
                names,
                repo_digests: Vec::new(),
                writer: Writer::Build,
                lease: &lease,
            })
        })
        .await
    }

    /// Undoes everything but the image and the cache.
    async fn end(&self) -> Result<(), BuildError> {
        let sealing = std::mem::take(&mut *self.sealing.lock().unwrap_or_else(PoisonError::into_inner));
        for task in sealing {
            if let Err(error) = task.await {
                tracing::error!(%error, "sealing the layers of a stage panicked");
            }
        }
        let outside = self.sandbox.end().await;
        let (store, left) = (self.store.clone(), self.actives().clone());
        let inside = blocking("remove the build's snapshots", move || {
            // One that will not go keeps none of the others.
            let mut result = Ok(());
            for key in &left {
                result = result.and(store.remove_active(key));
            }
            result
        })
        .await;
        outside.map_err(Box::new)?;
        inside
    }
}

/// The machine's own platform, as OCI spells it.
#[must_use]
pub fn own_platform() -> Platform {
    Platform::new("linux", std::env::consts::ARCH)
}

/// Build arguments as the command line gives them: a name alone takes its value from the environment.
#[must_use]
pub fn build_args(
    given: &[(String, Option<String>)],
    env: impl Fn(&str) -> Option<String>,
) -> BTreeMap<String, String> {
    given
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), value.clone().or_else(|| env(name))?)))
        .collect()
}
