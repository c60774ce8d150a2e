//! `RUN --mount`: what is mounted into a command besides the step's own files. Binds of the context, of stages and
//! of images; caches that outlive the build; memory; secrets. Ssh agents cannot be given to a build yet.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{MountBuilder, Spec};
use slipway_dockerfile::instruction::MountKind;
use slipway_dockerfile::step::{RunStep, Source};
use slipway_image::Active;
use slipway_snapshot::Root;

use super::StepContext;
use super::caches::{self, CacheMount, Start};
use super::origins::{Content, Places, layers, select, start_key, tip_of};
use crate::cache_mount::{self, CacheDir};
use crate::cancel::Cancel;
use crate::copy::CopyError;
use crate::copy::apply::Destination;
use crate::copy::digest::Selection;
use crate::copy::select::resolve;
use crate::copy::tree::{Owners, Tree};
use crate::error::StepError;
use crate::layer::Tip;
use crate::request::Secret;
use crate::sandbox::{MountPoints, Point};

/// Of a secret's file that does not say.
const SECRET_MODE: u32 = 0o400;

/// What the mounts of a step need, looked up before its cache key is known.
#[derive(Default)]
pub(super) struct Inputs {
    contents: Vec<Content>,
    list: Vec<Input>,
    /// Variables that get a secret.
    pub env: Vec<(String, Secret)>,
    /// Secrets that have to be there and are not; no matter where the step comes from the cache.
    missing: Vec<String>,
}

enum Input {
    /// A path of the build context.
    Context {
        target: PathBuf,
        read_only: bool,
        tree: Arc<Tree>,
        selection: Arc<Selection>,
    },
    /// A path of another root file system.
    Tip {
        target: PathBuf,
        read_only: bool,
        tip: Tip,
        source: String,
        name: String,
    },
    /// A directory that stays.
    Cache(Box<CacheMount>),
    /// A file that only the command sees.
    Secret {
        target: PathBuf,
        secret: Secret,
        mode: u32,
        owner: (u32, u32),
    },
}

/// Something that can be bind-mounted now.
pub(super) struct Mounted {
    /// Where in the container.
    pub target: PathBuf,
    /// What on the host.
    pub source: PathBuf,
    /// No writes.
    pub read_only: bool,
    /// A file, not a directory.
    pub is_file: bool,
    /// The snapshot behind it, mounted here.
    view: Option<(Active, PathBuf)>,
    /// A cache, held while it is used.
    _cache: Option<Arc<CacheDir>>,
    /// Memory that holds a secret, mounted here.
    secret: Option<PathBuf>,
}

/// Looks up what the mounts name.
pub(super) async fn prepare(cx: &StepContext<'_>, step: &RunStep) -> Result<Inputs, StepError> {
    let mut inputs = Inputs::default();
    for mount in &step.mounts {
        let target = PathBuf::from(mount.target.clone().unwrap_or_default());
        let read_only = mount.read_only;
        match &mount.kind {
            MountKind::Tmpfs { .. } => {}
            MountKind::Bind {
                from: Source::Context,
                source,
            } => {
                let tree = cx.build.context_tree()?;
                let (path, cancel) = (source.clone(), cx.build.cancel.clone());
                let (tree, selection, content) = cx
                    .blocking(move || {
                        let (selection, content) = select(&tree, &path, &cancel)?;
                        Ok((tree, Arc::new(selection), content))
                    })
                    .await?;
                inputs.contents.push(Content::Known(content));
                inputs.list.push(Input::Context {
                    target,
                    read_only,
                    tree,
                    selection,
                });
            }
            MountKind::Bind { from, source } => {
                let (tip, name) = tip_of(cx, from).await?;
                inputs.contents.push(match from {
                    Source::Stage(_) => Content::Stage {
                        tip: tip.clone(),
                        source: source.clone(),
                        name: name.clone(),
                    },
                    _ => Content::Known(layers(&tip).unwrap_or(*crate::key::scratch().as_bytes())),
                });
                inputs.list.push(Input::Tip {
                    target,
                    read_only,
                    tip,
                    source: source.clone(),
                    name,
                });
            }
            MountKind::Cache {
                id,
                sharing,
                from,
                source,
                mode,
                uid,
                gid,
            } => {
                let start = match from {
                    Source::Scratch => None,
                    from => {
                        let key = start_key(cx, from).await?;
                        let (tip, _) = tip_of(cx, from).await?;
                        Some(Start {
                            tip,
                            key,
                            source: source.clone(),
                        })
                    }
                };
                // One for each mount that could have a source, so that they are told apart by their places.
                let key = start.as_ref().map_or_else(crate::key::scratch, |start| start.key);
                inputs.contents.push(Content::Known(*key.as_bytes()));
                inputs.list.push(Input::Cache(Box::new(CacheMount {
                    target,
                    read_only,
                    id: id.clone(),
                    sharing: *sharing,
                    start,
                    mode: mode.unwrap_or(cache_mount::MODE),
                    owner: (uid.unwrap_or(0), gid.unwrap_or(0)),
                })));
            }
            // Not in the key: it is what gets something done, and no part of what is made.
            MountKind::Secret {
                id,
                env,
                required,
                mode,
                uid,
                gid,
            } => match cx.build.request.secrets.get(id) {
                Some(secret) => {
                    inputs
                        .env
                        .extend(env.iter().map(|env| (env.clone(), secret.clone())));
                    if mount.target.is_some() {
                        inputs.list.push(Input::Secret {
                            target,
                            secret: secret.clone(),
                            mode: mode.unwrap_or(SECRET_MODE),
                            owner: (uid.unwrap_or(0), gid.unwrap_or(0)),
                        });
                    }
                }
                None if *required => inputs.missing.push(id.clone()),
                None => {}
            },
            MountKind::Ssh { .. } => {
                return Err(StepError::Unsupported {
                    what: "RUN --mount=type=ssh".to_owned(),
                });
            }
        }
    }
    Ok(inputs)
}

pub(super) fn resolve_one(tree: &Tree, path: &str) -> Result<crate::copy::tree::Found, StepError> {
    resolve(tree, path)?.into_iter().next().ok_or_else(|| {
        CopyError::NotFound {
            path: path.to_owned(),
            place: tree.name.clone(),
        }
        .into()
    })
}

impl Inputs {
    /// Where the mounts come from; `None` where that says no more than their contents.
    pub fn places(&self) -> Option<Places> {
        Places::of(&self.contents)
    }

    /// What the mounts contribute to the step's own key. Reads what is mounted of stages.
    pub async fn by_contents(&self, cx: &StepContext<'_>) -> Result<Vec<[u8; 32]>, StepError> {
        let mut contents = Vec::with_capacity(self.contents.len());
        for content in &self.contents {
            contents.push(content.digest(cx).await?);
        }
        Ok(contents)
    }
}

/// Makes everything ready to be bind-mounted.
pub(super) async fn mount(cx: &StepContext<'_>, inputs: &Inputs) -> Result<Vec<Mounted>, StepError> {
    if let Some(id) = inputs.missing.first() {
        return Err(StepError::NoSecret { id: id.clone() });
    }
    let caches = inputs.list.iter().filter_map(|input| match input {
        Input::Cache(cache) => Some(&**cache),
        _ => None,
    });
    let mut caches = caches::take(cx, caches.collect()).await?.into_iter();
    let mut mounted = Vec::new();
    for input in &inputs.list {
        match one(cx, input, &mut caches).await {
            Ok(one) => mounted.push(one),
            Err(error) => {
                unmount(cx, mounted).await?;
                return Err(error);
            }
        }
    }
    Ok(mounted)
}

/// `caches` gives the directories of the cache mounts, in their order.
async fn one(
    cx: &StepContext<'_>,
    input: &Input,
    caches: &mut impl Iterator<Item = Arc<CacheDir>>,
) -> Result<Mounted, StepError> {
    match input {
        Input::Tip {
            target,
            read_only,
            tip,
            source,
            name,
        } => {
            let (view, point) = view(cx, tip).await?;
            let found = inside(&point, source, name);
            match found {
                Ok((source, is_file)) => Ok(Mounted {
                    target: target.clone(),
                    source,
                    read_only: *read_only,
                    is_file,
                    view: Some((view, point)),
                    _cache: None,
                    secret: None,
                }),
                Err(error) => {
                    drop_view(cx, view, point).await?;
                    Err(error)
                }
            }
        }
        Input::Context {
            target,
            read_only,
            tree,
            selection,
        } => {
            let (view, point) = view(cx, &Tip::scratch()).await?;
            let at = point.join("content");
            let copied = copy_context(cx, &point, tree, selection).await;
            if let Err(error) = copied {
                drop_view(cx, view, point).await?;
                return Err(error);
            }
            Ok(Mounted {
                target: target.clone(),
                source: at,
                read_only: *read_only,
                is_file: !selection.found.is_dir(),
                view: Some((view, point)),
                _cache: None,
                secret: None,
            })
        }
        Input::Secret {
            target,
            secret,
            mode,
            owner,
        } => {
            let dir = cx.build.sandbox.fresh_dir("secret")?;
            let (at, secret, mode, owner) = (dir.clone(), secret.clone(), *mode, *owner);
            let source = cx.blocking(move || in_memory(&at, &secret, mode, owner)).await?;
            Ok(Mounted {
                target: target.clone(),
                source,
                read_only: true,
                is_file: true,
                view: None,
                _cache: None,
                secret: Some(dir),
            })
        }
        Input::Cache(cache) => {
            let taken = caches.next().ok_or_else(|| StepError::Task {
                reason: "a cache mount was not taken".to_owned(),
            })?;
            Ok(Mounted {
                target: cache.target.clone(),
                source: taken.fs(),
                read_only: cache.read_only,
                is_file: false,
                view: None,
                _cache: Some(taken),
                secret: None,
            })
        }
    }
}

/// A private copy of what the context holds: a command can neither see what is ignored nor write to the real files.
async fn copy_context(
    cx: &StepContext<'_>,
    point: &Path,
    tree: &Arc<Tree>,
    selection: &Arc<Selection>,
) -> Result<(), StepError> {
    let (point, tree, selection) = (point.to_path_buf(), Arc::clone(tree), Arc::clone(selection));
    let cancel = cx.build.cancel.clone();
    cx.blocking(move || copy_plain(&point, "/content", false, &tree, &selection, &cancel))
        .await
}

/// Copies without any of COPY's options.
pub(super) fn copy_plain(
    to: &Path,
    path: &str,
    is_directory: bool,
    tree: &Tree,
    selection: &Selection,
    cancel: &Cancel,
) -> Result<(), StepError> {
    let root = Root::open(to).map_err(|source| StepError::Io {
        act: "open",
        path: to.to_path_buf(),
        source,
    })?;
    let destination = Destination {
        root: &root,
        path,
        is_directory,
        owner: None,
        chmod: None,
    };
    Ok(destination.copy(tree, selection, cancel)?)
}

pub(super) async fn view(cx: &StepContext<'_>, tip: &Tip) -> Result<(Active, PathBuf), StepError> {
    let view = cx
        .build
        .prepare(tip)
        .await
        .map_err(StepError::prepare("make a view of the files to mount"))?;
    let point = cx.build.sandbox.fresh_dir("mnt")?;
    let (mount, at) = (view.mount.clone(), point.clone());
    cx.blocking(move || {
        mount
            .mount_volatile(&at)
            .map_err(|source| StepError::Mount { act: "mount", source })
    })
    .await?;
    Ok((view, point))
}

pub(super) async fn drop_view(cx: &StepContext<'_>, view: Active, point: PathBuf) -> Result<(), StepError> {
    let unmounted = cx
        .blocking(move || {
            slipway_snapshot::unmount(&point).map_err(|source| StepError::Mount {
                act: "unmount",
                source,
            })
        })
        .await;
    cx.build.forget(&view.key).await;
    unmounted
}

/// The real place of `source` in a mounted root file system, and whether it is a file.
fn inside(point: &Path, source: &str, name: &str) -> Result<(PathBuf, bool), StepError> {
    let tree = Tree::open(point, None, Owners::Kept, name)?;
    let found = resolve_one(&tree, source)?;
    Ok((point.join(&found.real), !found.is_dir()))
}

/// Takes the views down again.
pub(super) async fn unmount(cx: &StepContext<'_>, mounted: Vec<Mounted>) -> Result<(), StepError> {
    let mut result = Ok(());
    for one in mounted.into_iter().rev() {
        if let Some((view, point)) = one.view {
            result = result.and(drop_view(cx, view, point).await);
        }
        if let Some(dir) = one.secret {
            result = result.and(cx.blocking(move || forget_memory(&dir)).await);
        }
    }
    result
}

/// Writes a secret into memory of its own, mounted at `dir`; the file. It is on no disk.
fn in_memory(dir: &Path, secret: &Secret, mode: u32, owner: (u32, u32)) -> Result<PathBuf, StepError> {
    use rustix::mount::MountFlags;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let path = dir.join("secret");
    let io = |act: &'static str| {
        let path = path.clone();
        move |source: std::io::Error| StepError::Io { act, path, source }
    };
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("tmpfs", dir, "tmpfs", flags, c"mode=0700,size=1m")
        .map_err(|e| io("mount memory for")(e.into()))?;
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        std::io::Write::write_all(&mut file, secret.expose())?;
        std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        file.set_permissions(std::fs::Permissions::from_mode(mode & 0o7777))
    };
    write().map_err(io("write the secret into")).inspect_err(|_| {
        if let Err(error) = forget_memory(dir) {
            tracing::warn!(%error, dir = %dir.display(), "goes with the build");
        }
    })?;
    Ok(path)
}

fn forget_memory(dir: &Path) -> Result<(), StepError> {
    slipway_snapshot::unmount(dir).map_err(|source| StepError::Mount {
        act: "unmount",
        source,
    })
}

/// tmpfs mounts go straight into the specification.
pub(super) fn add_tmpfs(
    spec: &mut Spec,
    step: &RunStep,
    root: &Root,
    points: &mut MountPoints,
) -> Result<(), StepError> {
    let mut list = spec.mounts().clone().unwrap_or_default();
    for mount in &step.mounts {
        let MountKind::Tmpfs { size } = &mount.kind else {
            continue;
        };
        let target = PathBuf::from(mount.target.clone().unwrap_or_default());
        let target = if super::run::under_own_mount(&target) {
            target
        } else {
            points.ensure(root, &target, Point::Directory)?
        };
        let mut options = vec!["nosuid".to_owned(), "nodev".to_owned()];
        if let Some(size) = size {
            options.push(format!("size={size}"));
        }
        if mount.read_only {
            options.push("ro".to_owned());
        }
        let built = MountBuilder::default()
            .destination(target)
            .typ("tmpfs")
            .source("tmpfs")
            .options(options)
            .build()
            .map_err(|e| StepError::Task {
                reason: e.to_string(),
            })?;
        list.push(built);
    }
    // What lies in another mount comes after it, whatever their kinds; among equals the order is as it was.
    list.sort_by_key(|mount| mount.destination().components().count());
    spec.set_mounts(Some(list));
    Ok(())
}
