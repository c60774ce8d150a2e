//! SOURCE_DATE_EPOCH in a step's own files: nothing in them is newer, so that the files on the node and the layer's
//! tar tell the same times.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::error::StepError;

/// Sets every time after `epoch` below `dir` (itself included) to it.
///
/// # Errors
/// When the tree cannot be read or changed.
pub fn clamp(dir: &Path, epoch: i64) -> Result<(), StepError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| StepError::Io {
            act: "set the time of",
            path,
            source,
        }
    };
    let mut pending: Vec<PathBuf> = vec![dir.to_path_buf()];
    while let Some(path) = pending.pop() {
        for entry in std::fs::read_dir(&path).map_err(io(&path))? {
            let entry = entry.map_err(io(&path))?;
            let kind = entry.file_type().map_err(io(&path))?;
            if kind.is_dir() {
                pending.push(entry.path());
            } else {
                one(&entry.path(), epoch).map_err(io(&entry.path()))?;
            }
        }
        // After its entries were looked at: nothing here changes a directory's own time, but its parent's order
        // does not matter either.
        one(&path, epoch).map_err(io(&path))?;
    }
    Ok(())
}

fn one(path: &Path, epoch: i64) -> std::io::Result<()> {
    let stat = rustix::fs::lstat(path)?;
    let newer = stat.st_mtime > epoch || (stat.st_mtime == epoch && stat.st_mtime_nsec > 0);
    if !newer {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: epoch,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn newer_times_become_the_epoch_and_older_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        let old = std::fs::File::create(dir.path().join("d/old")).unwrap();
        let time = Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        rustix::fs::futimens(
            &old,
            &Timestamps {
                last_access: time,
                last_modification: time,
            },
        )
        .unwrap();
        std::fs::write(dir.path().join("d/new"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        clamp(dir.path(), 1000).unwrap();
        let mtime = |p: &str| dir.path().join(p).symlink_metadata().unwrap().mtime();
        assert_eq!(
            (
                mtime("d/old"),
                mtime("d/new"),
                mtime("d"),
                mtime("link"),
                mtime("")
            ),
            (5, 1000, 1000, 1000, 1000)
        );
    }
}
