//! WORKDIR: a directory that is there afterwards, owned by the user in force if it is new.

use std::path::Path;

use slipway_dockerfile::step::WorkdirStep;
use slipway_snapshot::Root;

use super::{StepContext, StepResult};
use crate::copy::owner::{self, Ids};
use crate::error::StepError;

pub(super) async fn execute(cx: &StepContext<'_>, step: &WorkdirStep) -> Result<StepResult, StepError> {
    let key = cx.build.scope(cx.stage).step(&cx.key, &cx.step.action, &[]);
    let step = step.clone();
    cx.cached_or(vec![key], async |point: &Path| {
        let point = point.to_path_buf();
        cx.blocking(move || make(&point, &step)).await
    })
    .await
}

fn make(point: &Path, step: &WorkdirStep) -> Result<(), StepError> {
    let io = |source| StepError::Io {
        act: "make the directory",
        path: step.path.clone().into(),
        source,
    };
    let root = Root::open(point).map_err(io)?;
    let owner = owner_of(&root, &step.user)?;
    root.mkdir_all(Path::new(&step.path), 0o755, owner).map_err(io)?;
    Ok(())
}

/// USER's numbers; `None` where there is no USER. As for --chown, a number alone is user and group.
fn owner_of(root: &Root, user: &str) -> Result<Option<Ids>, StepError> {
    if user.is_empty() {
        return Ok(None);
    }
    Ok(Some(owner::resolve(root, user)?))
}
