//! Where what is mounted into a command comes from, and what of it belongs to the step's key: of a stage the layers where
//! these are known, else the contents. Mounts nothing into a command.

use slipway_dockerfile::step::Source;
use slipway_image::Digest;

use super::StepContext;
use super::mounts::{drop_view, resolve_one, view};
use crate::cancel::Cancel;
use crate::copy::digest::{Selection, digest};
use crate::copy::tree::{All, Owners, Tree};
use crate::error::StepError;
use crate::layer::Tip;

/// What a mount contributes to the key.
pub(super) enum Content {
    /// What it holds.
    Known([u8; 32]),
    /// A path of a stage, which may have been executed just now.
    Stage { tip: Tip, source: String, name: String },
}

/// The layers of a root file system, where they are known by now.
pub(super) fn layers(tip: &Tip) -> Option<[u8; 32]> {
    let chain = tip.known()?;
    Some(*crate::key::image(chain.as_ref()).as_bytes())
}

/// Where the mounts of a step come from.
pub(super) struct Places(Vec<Place>);

enum Place {
    Known([u8; 32]),
    Stage(Tip),
}

impl Places {
    /// `None` where nothing comes from a stage.
    pub fn of(contents: &[Content]) -> Option<Places> {
        let place = |content: &Content| match content {
            Content::Known(content) => Place::Known(*content),
            Content::Stage { tip, .. } => Place::Stage(tip.clone()),
        };
        let places = Places(contents.iter().map(place).collect());
        (!places.tips().is_empty()).then_some(places)
    }

    /// The stages, whose layers may not be complete yet.
    pub fn tips(&self) -> Vec<Tip> {
        let tip = |place: &Place| match place {
            Place::Stage(tip) => Some(tip.clone()),
            Place::Known(_) => None,
        };
        self.0.iter().filter_map(tip).collect()
    }

    /// What they contribute to a key; `None` where it is not known yet.
    pub fn layers(&self) -> Option<Vec<[u8; 32]>> {
        let known = self.0.iter().map(|place| match place {
            Place::Known(content) => Some(*content),
            Place::Stage(tip) => layers(tip),
        });
        known.collect()
    }
}

impl Content {
    /// What it contributes to the step's own key.
    pub async fn digest(&self, cx: &StepContext<'_>) -> Result<[u8; 32], StepError> {
        match self {
            Content::Known(content) => Ok(*content),
            Content::Stage { tip, source, name } => digest_of(cx, tip, source, name).await,
        }
    }
}

/// The digest of what is at `source` in a root file system.
async fn digest_of(cx: &StepContext<'_>, tip: &Tip, source: &str, name: &str) -> Result<[u8; 32], StepError> {
    let (view, point) = view(cx, tip).await?;
    let (at, source, name, cancel) = (
        point.clone(),
        source.to_owned(),
        name.to_owned(),
        cx.build.cancel.clone(),
    );
    let digested = cx
        .blocking(move || {
            let tree = Tree::open(&at, None, Owners::Kept, &name)?;
            Ok(select(&tree, &source, &cancel)?.1)
        })
        .await;
    drop_view(cx, view, point).await?;
    digested
}

/// What is at `path`, whatever it is called, and its digest.
pub(super) fn select(tree: &Tree, path: &str, cancel: &Cancel) -> Result<(Selection, [u8; 32]), StepError> {
    let mut found = resolve_one(tree, path)?;
    let entries = tree.list(&found, &All)?;
    let contents_only = found.is_dir();
    found.name = "content".into();
    let selection = [Selection {
        found,
        entries,
        contents_only,
    }];
    let content = digest(tree, &selection, cancel)?;
    let [selection] = selection;
    Ok((selection, content))
}

/// What tells the caches that start as copies of this root file system from others.
pub(super) async fn start_key(cx: &StepContext<'_>, from: &Source) -> Result<Digest, StepError> {
    match from {
        Source::Stage(stage) => Ok(cx.build.stage_done(*stage).await?.key),
        _ => {
            let (tip, _) = tip_of(cx, from).await?;
            Ok(crate::key::image(tip.known().flatten().as_ref()))
        }
    }
}

pub(super) async fn tip_of(cx: &StepContext<'_>, from: &Source) -> Result<(Tip, String), StepError> {
    match from {
        Source::Stage(stage) => {
            let tip = cx.build.stage_result(*stage).await?;
            Ok((tip, format!("the stage {}", cx.build.stage_name(*stage))))
        }
        Source::Image(image) => {
            let base = cx
                .build
                .source_image(image, &cx.build.target_platform, cx.id)
                .await?;
            Ok((base.tip.clone(), format!("the image {image}")))
        }
        Source::Scratch => Ok((Tip::scratch(), "scratch".to_owned())),
        Source::Context => Err(StepError::Unsupported {
            what: "RUN --mount=type=cache from the build context".to_owned(),
        }),
        Source::Named(name) => Err(StepError::Unsupported {
            what: format!("RUN --mount from={name}, a named build context,"),
        }),
    }
}
