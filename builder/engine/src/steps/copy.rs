//! COPY, and ADD of what is local: sources selected and hashed, then copied onto the step's snapshot.

use std::path::Path;
use std::sync::Arc;

use slipway_dockerfile::ignore::Matcher;
use slipway_dockerfile::step::{CopySource, CopyStep, Source};
use slipway_image::{Active, Digest};
use slipway_snapshot::Root;

use super::{Keys, StepContext, StepResult, add};
use crate::cancel::Cancel;
use crate::copy::CopyError;
use crate::copy::apply::Destination;
use crate::copy::archive;
use crate::copy::digest::{Selection, digest};
use crate::copy::select::{Patterns, resolve};
use crate::copy::tree::{All, Filter, Owners, Tree};
use crate::copy::{glob, owner};
use crate::error::StepError;
use crate::layer::{Later, Tip};

/// One source with what it holds.
pub(super) struct Taken {
    /// Where it was found.
    pub tree: Arc<Tree>,
    /// What it names.
    pub selections: Vec<Selection>,
    /// Archives among it are unpacked.
    pub unpack: bool,
}

pub(super) async fn execute(cx: &StepContext<'_>, step: &CopyStep) -> Result<StepResult, StepError> {
    match &step.from {
        Source::Context => {
            let tree = cx.build.context_tree()?;
            from_tree(cx, step, tree, None).await
        }
        Source::Stage(stage) => {
            let tip = cx.build.stage_result(*stage).await?;
            let name = cx.build.stage_name(*stage);
            from_tip(cx, step, &tip, &format!("the stage {name}")).await
        }
        Source::Image(image) => {
            let base = cx
                .build
                .source_image(image, &cx.build.target_platform, cx.id)
                .await?;
            from_tip(cx, step, &base.tip, &format!("the image {image}")).await
        }
        Source::Scratch => from_tip(cx, step, &Tip::scratch(), "scratch").await,
        Source::Named(name) => Err(StepError::Unsupported {
            what: format!("COPY --from={name}, a named build context,"),
        }),
    }
}

/// Files of another root file system: where its layers are known, found by them and not read. A stage that was executed
/// just now goes by its contents, whatever an earlier execution of the same instructions made.
async fn from_tip(
    cx: &StepContext<'_>,
    step: &CopyStep,
    tip: &Tip,
    name: &str,
) -> Result<StepResult, StepError> {
    let scope = cx.build.scope(cx.stage);
    let source = tip.known().map(|chain| crate::key::image(chain.as_ref()));
    let shortcut = source
        .map(|key| scope.shortcut(&cx.key, &cx.step.action, &[*key.as_bytes()]))
        .transpose()?;
    if let Some(shortcut) = shortcut
        && let Some(found) = cx.cached(&[shortcut]).await?
    {
        return Ok(found);
    }
    // A snapshot nobody writes to, only to mount what may not be sealed yet.
    let view = cx
        .build
        .prepare(tip)
        .await
        .map_err(StepError::prepare("make a view of the files to copy"))?;
    let mut result = None;
    let mounted = cx
        .on_mount(&view, async |point: &Path| {
            let tree = Tree::open(point, None, Owners::Kept, name)?;
            result = Some(from_tree(cx, step, Arc::new(tree), Some((tip, shortcut))).await?);
            Ok(())
        })
        .await;
    cx.build.forget(&view.key).await;
    mounted?;
    result.ok_or_else(|| StepError::Task {
        reason: "a copy ended without a result".to_owned(),
    })
}

async fn from_tree(
    cx: &StepContext<'_>,
    step: &CopyStep,
    tree: Arc<Tree>,
    source: Option<(&Tip, Option<Digest>)>,
) -> Result<StepResult, StepError> {
    let remote = add::fetch(cx, step).await?;
    let (owned, cancel) = (step.clone(), cx.build.cancel.clone());
    let (taken, contents) = cx
        .blocking(move || {
            let taken = take(&owned, &tree, remote, &cancel)?;
            let mut contents = Vec::new();
            for one in &taken {
                contents.push(digest(&one.tree, &one.selections, &cancel)?);
            }
            Ok((taken, contents))
        })
        .await?;
    let scope = cx.build.scope(cx.stage);
    let key = scope.step(&cx.key, &cx.step.action, &contents)?;
    let keys = match source {
        None => Keys::only(key),
        Some((tip, shortcut)) => Keys::with(key, shortcut, || {
            let (below, action, source) = (cx.key, cx.step.action.clone(), tip.clone());
            Some(Later {
                tips: vec![tip.clone()],
                key: Box::new(move || {
                    let layers = crate::key::image(source.known()?.as_ref());
                    scope.shortcut(&below, &action, &[*layers.as_bytes()]).ok()
                }),
            })
        }),
    };
    // BuildKit's rule: with --chmod it is an ordinary copy.
    if step.link && step.chmod.is_none() {
        return linked(cx, step, keys, taken).await;
    }
    let (owned, cancel) = (step.clone(), cx.build.cancel.clone());
    cx.cached_or(keys, async |point: &Path| {
        let point = point.to_path_buf();
        cx.blocking(move || {
            let root = open(&point)?;
            let owner = owned
                .chown
                .as_deref()
                .map(|c| owner::resolve(&root, owner::Asked::Chown(c)))
                .transpose()?;
            apply(&root, owner, &owned, &taken, &cancel)
        })
        .await
    })
    .await
}

/// --link: the files are laid down as if nothing were below them, so that the layer does not depend on what is. No
/// link of the image is followed, and a directory of the image merges only with a directory.
async fn linked(
    cx: &StepContext<'_>,
    step: &CopyStep,
    keys: Keys,
    taken: Vec<Taken>,
) -> Result<StepResult, StepError> {
    let (owned, cancel) = (step.clone(), cx.build.cancel.clone());
    cx.cached_or_made(keys, async |active: &Active| {
        let mut owner = None;
        if let Some(chown) = owned.chown.clone() {
            // Names are the image's all the same.
            cx.on_mount(active, async |point: &Path| {
                let point = point.to_path_buf();
                owner = Some(
                    cx.blocking(move || Ok(owner::resolve(&open(&point)?, owner::Asked::Chown(&chown))?))
                        .await?,
                );
                Ok(())
            })
            .await?;
        }
        let upper = active.upper.clone();
        cx.blocking(move || apply(&open(&upper)?, owner, &owned, &taken, &cancel))
            .await
    })
    .await
}

fn open(point: &Path) -> Result<Root, StepError> {
    Root::open(point).map_err(|source| StepError::Io {
        act: "open",
        path: point.to_path_buf(),
        source,
    })
}

/// What the sources name, in their order.
fn take(
    step: &CopyStep,
    tree: &Arc<Tree>,
    remote: Vec<Option<add::Fetched>>,
    cancel: &Cancel,
) -> Result<Vec<Taken>, StepError> {
    let exclude = matcher(&step.exclude)?;
    let mut taken = Vec::new();
    let mut patterns = Vec::new();
    let mut any = false;
    for (source, fetched) in step.sources.iter().zip(remote) {
        if cancel.is_set() {
            return Err(StepError::Cancelled);
        }
        match source {
            CopySource::Path {
                path,
                below,
                wildcard,
            } => {
                let mut selections = Vec::new();
                for found in resolve(tree, path)? {
                    let filter = Patterns {
                        include: below
                            .as_deref()
                            .map(|b| matcher(&[b.to_owned()]))
                            .transpose()?
                            .flatten(),
                        exclude: exclude.clone(),
                    };
                    let filter: &dyn Filter = if filter.include.is_none() && filter.exclude.is_none() {
                        &All
                    } else {
                        &filter
                    };
                    let contents_only = found.is_dir();
                    let entries = tree.list(&found, filter)?;
                    let literal_below = below
                        .as_deref()
                        .is_some_and(|b| !glob::has_wildcard(b) && !glob::has_wildcard(path));
                    if literal_below && entries.len() < 2 {
                        return Err(CopyError::NotFound {
                            path: format!("{path}/./{}", below.as_deref().unwrap_or_default()),
                            place: tree.name.clone(),
                        }
                        .into());
                    }
                    selections.push(Selection {
                        found,
                        entries,
                        contents_only,
                    });
                }
                any |= !selections.is_empty() || !wildcard;
                patterns.push(path.clone());
                taken.push(Taken {
                    tree: Arc::clone(tree),
                    selections,
                    unpack: step.unpack,
                });
            }
            CopySource::Url { unpack, .. } => {
                any = true;
                taken.extend(fetched.map(|f| f.taken(*unpack)).transpose()?);
            }
            CopySource::Git(_) | CopySource::Document { .. } => {
                any = true;
                taken.extend(fetched.map(|f| f.taken(false)).transpose()?);
            }
        }
    }
    if !any {
        let place = tree.name.clone();
        return Err(CopyError::NothingMatches {
            patterns: patterns.join(", "),
            place,
        }
        .into());
    }
    Ok(taken)
}

fn matcher(patterns: &[String]) -> Result<Option<Matcher>, StepError> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let cleaned = patterns
        .iter()
        .map(|p| p.trim_start_matches('/').to_owned())
        .collect::<Vec<_>>();
    Matcher::new(&cleaned).map(Some).map_err(|_| {
        CopyError::BadPattern {
            pattern: patterns.join(" "),
        }
        .into()
    })
}

fn apply(
    root: &Root,
    owner: Option<owner::Ids>,
    step: &CopyStep,
    taken: &[Taken],
    cancel: &Cancel,
) -> Result<(), StepError> {
    let destination = Destination {
        root,
        path: &step.destination,
        is_directory: step.destination_is_directory,
        owner,
        chmod: step.chmod.as_ref(),
    };
    for one in taken {
        for selection in &one.selections {
            if one.unpack && archive::unpack(&destination, &one.tree, selection, cancel)? {
                continue;
            }
            destination.copy(&one.tree, selection, cancel)?;
        }
    }
    Ok(())
}
