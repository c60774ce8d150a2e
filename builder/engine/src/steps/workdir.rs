//! WORKDIR: a directory that is there afterwards, owned by the user in force if it is new.

use std::path::Path;

use slipway_dockerfile::step::WorkdirStep;
use slipway_snapshot::Root;

use super::{Keys, StepContext, StepResult};
use crate::copy::CopyError;
use crate::copy::owner::{self, Asked, Ids};
use crate::error::StepError;

pub(super) async fn execute(cx: &StepContext<'_>, step: &WorkdirStep) -> Result<StepResult, StepError> {
    let key = cx.build.scope(cx.stage).step(&cx.key, &cx.step.action, &[])?;
    let step = step.clone();
    cx.cached_or(Keys::only(key), async |point: &Path| {
        let point = point.to_path_buf();
        let remark = cx.blocking(move || make(&point, &step)).await?;
        remark.into_iter().for_each(|remark| cx.remark(remark));
        Ok(())
    })
    .await
}

/// Makes the directory; what is to be said about it.
fn make(point: &Path, step: &WorkdirStep) -> Result<Option<String>, StepError> {
    let io = |source| StepError::Io {
        act: "make the directory",
        path: step.path.clone().into(),
        source,
    };
    let root = Root::open(point).map_err(io)?;
    let (owner, unknown) = owner_of(&root, &step.user)?;
    let made = root.mkdir_all(Path::new(&step.path), 0o755, owner).map_err(io)?;
    Ok(unknown.filter(|_| !made.is_empty()))
}

/// USER's numbers; `None` where there is no USER. As for --chown, a number alone is user and group. A name that the image
/// does not know (yet) leaves the directory to root, as BuildKit does, and is worth a remark.
fn owner_of(root: &Root, user: &str) -> Result<(Option<Ids>, Option<String>), StepError> {
    if user.is_empty() {
        return Ok((None, None));
    }
    match owner::resolve(root, Asked::User(user)) {
        Ok(ids) => Ok((Some(ids), None)),
        Err(error @ CopyError::UnknownOwner { .. }) => {
            Ok((None, Some(format!("{error}: the new directory belongs to root"))))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_that_the_image_does_not_know_leaves_the_directory_to_root() {
        let image = tempfile::tempdir().unwrap();
        let step = |path: &str, user: &str| WorkdirStep {
            path: path.to_owned(),
            user: user.to_owned(),
        };
        let make = |step: &WorkdirStep| make(image.path(), step);
        let remark = make(&step("/work", "app:app")).unwrap().unwrap();
        assert_eq!(
            remark,
            "USER app:app: the image's /etc/passwd has no app: the new directory belongs to root"
        );
        let who = std::fs::metadata(image.path().join("work")).unwrap();
        let me = std::fs::metadata(image.path()).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!((who.uid(), who.gid()), (me.uid(), me.gid()));
        // Nothing is made, so there is nothing to remark.
        assert_eq!(make(&step("/work", "app")).unwrap(), None);
        let error = make(&step("/other", "4294967295")).unwrap_err().to_string();
        assert_eq!(error, "USER 4294967295: ids end at 2147483647");
    }
}
