//! Mount points that a RUN needs and the image lacks: made before, removed after, with the times of the directories
//! around them as the command left them, so that no layer ever tells of a mount.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Stat, Timespec, Timestamps};
use slipway_snapshot::Root;

use crate::copy::apply::final_target;
use crate::error::StepError;

/// What a mount point is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// An empty file.
    File,
    /// An empty directory.
    Directory,
}

/// The mount points that were made.
#[derive(Debug, Default)]
pub struct MountPoints {
    /// Real paths in the image, parents first.
    made: Vec<PathBuf>,
}

impl MountPoints {
    /// Makes sure there is something to mount on at `path`; where that really is.
    ///
    /// # Errors
    /// When it cannot be made, or is there and of the other kind.
    pub fn ensure(&mut self, root: &Root, path: &Path, point: Point) -> Result<PathBuf, StepError> {
        let io = |act: &'static str, source| StepError::Io {
            act,
            path: path.to_path_buf(),
            source,
        };
        let target = final_target(root, path)?;
        if let Some(there) = root.symlink_metadata(&target).map_err(|e| io("look up", e))? {
            let is_directory = FileType::from_raw_mode(there.st_mode) == FileType::Directory;
            let wrong = match (point, is_directory) {
                (Point::File, true) => {
                    Some((ErrorKind::IsADirectory, "a file cannot be mounted on a directory"))
                }
                (Point::Directory, false) => Some((
                    ErrorKind::NotADirectory,
                    "a directory cannot be mounted on a file",
                )),
                _ => None,
            };
            return match wrong {
                Some((kind, why)) => Err(io("mount on", std::io::Error::new(kind, why))),
                None => Ok(target),
            };
        }
        let parent = target.parent().unwrap_or(Path::new("/"));
        // The first directory that is there already gets its time back.
        let mut there = parent;
        while root
            .symlink_metadata(there)
            .map_err(|e| io("look up", e))?
            .is_none()
        {
            let Some(up) = there.parent() else { break };
            there = up;
        }
        let before = root.metadata(there).map_err(|e| io("look up", e))?;
        self.made.extend(
            root.mkdir_all(parent, 0o755, None)
                .map_err(|e| io("make the directory of", e))?,
        );
        match point {
            Point::File => {
                root.create_file(&target, 0o644).map_err(|e| io("make", e))?;
                self.made.push(target.clone());
            }
            Point::Directory => {
                self.made
                    .extend(root.mkdir_all(&target, 0o755, None).map_err(|e| io("make", e))?);
            }
        }
        if let Some(before) = before {
            set_times(root, there, &before).map_err(|e| io("restore the time around", e))?;
        }
        Ok(target)
    }

    /// Removes the mount points that are still empty. One that the command filled is its own business.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn remove(self, root: &Root) -> Result<(), StepError> {
        for path in self.made.iter().rev() {
            let io = |source| StepError::Io {
                act: "remove the mount point",
                path: path.clone(),
                source,
            };
            let Some(stat) = root.symlink_metadata(path).map_err(io)? else {
                continue;
            };
            let directory = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => true,
                FileType::RegularFile if stat.st_size == 0 => false,
                _ => continue,
            };
            let (parent, name) = root.parent(path).map_err(io)?;
            if directory && !is_empty(&parent, &name).map_err(io)? {
                continue;
            }
            let up = path.parent().unwrap_or(Path::new("/"));
            let before = root.metadata(up).map_err(io)?;
            let flags = if directory {
                AtFlags::REMOVEDIR
            } else {
                AtFlags::empty()
            };
            rustix::fs::unlinkat(&parent, &name, flags).map_err(|e| io(e.into()))?;
            if let Some(before) = before {
                set_times(root, up, &before).map_err(io)?;
            }
        }
        Ok(())
    }
}

fn is_empty(parent: impl AsFd, name: &std::ffi::OsStr) -> std::io::Result<bool> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn set_times(root: &Root, path: &Path, stat: &Stat) -> std::io::Result<()> {
    use rustix::fs::OFlags;
    let dir = root.open_file(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC)?;
    let at = |sec: i64, nsec: u64| Timespec {
        tv_sec: sec,
        tv_nsec: i64::try_from(nsec).unwrap_or(0),
    };
    let times = Timestamps {
        last_access: at(stat.st_atime, stat.st_atime_nsec),
        last_modification: at(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::futimens(&dir, &times)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn mount_points_go_without_a_trace_unless_something_was_put_into_them() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        let long_ago = Timespec {
            tv_sec: 1_000_000,
            tv_nsec: 5,
        };
        let times = Timestamps {
            last_access: long_ago,
            last_modification: long_ago,
        };
        let etc = std::fs::File::open(dir.path().join("etc")).unwrap();
        rustix::fs::futimens(&etc, &times).unwrap();

        let mut points = MountPoints::default();
        points
            .ensure(&root, Path::new("/etc/resolv.conf"), Point::File)
            .unwrap();
        points
            .ensure(&root, Path::new("/a/b/c"), Point::Directory)
            .unwrap();
        points.ensure(&root, Path::new("/d/e"), Point::Directory).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        std::fs::write(dir.path().join("d/file"), "kept").unwrap();
        points.remove(&root).unwrap();

        assert!(!dir.path().join("a").exists());
        assert!(!dir.path().join("d/e").exists());
        assert!(dir.path().join("d/file").exists());
        assert!(!dir.path().join("etc/resolv.conf").exists());
        assert_eq!(dir.path().join("etc").metadata().unwrap().mtime(), 1_000_000);
    }

    #[test]
    fn what_is_there_has_to_be_of_the_kind_that_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        std::os::unix::fs::symlink("dir", dir.path().join("link")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        let mut points = MountPoints::default();
        let mut ensure = |path: &str, point| points.ensure(&root, Path::new(path), point);
        for (path, right, wrong) in [
            ("/dir", Point::Directory, Point::File),
            ("/link", Point::Directory, Point::File),
            ("/file", Point::File, Point::Directory),
        ] {
            ensure(path, right).unwrap();
            let error = crate::chain(&ensure(path, wrong).unwrap_err()).to_string();
            assert!(
                error.starts_with(&format!("cannot mount on {path}: a ")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_stub_behind_a_dangling_link_is_made_where_the_link_leads() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("../run/resolve/stub.conf", dir.path().join("etc/resolv.conf")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        let mut points = MountPoints::default();
        let real = points
            .ensure(&root, Path::new("/etc/resolv.conf"), Point::File)
            .unwrap();
        assert_eq!(real, Path::new("/run/resolve/stub.conf"));
        points.remove(&root).unwrap();
        assert!(!dir.path().join("run").exists());
        assert!(dir.path().join("etc/resolv.conf").is_symlink());
    }
}
