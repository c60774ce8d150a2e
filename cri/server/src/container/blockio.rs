//! Classes of block IO on this machine: the file of them, and which devices their patterns mean.
//!
//! The file is read once, at start; devices are looked for at each creation, so that one that came later counts. What a
//! class means is `slipway_spec::blockio`'s; what the kernel does not have for it the shim says.

use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use slipway_spec::{BlockIoClasses, blockio};

use super::Container;
use crate::error::Error;
use crate::pod::Pod;

/// The largest file of classes that is read.
const FILE_LIMIT: u64 = 1 << 20;
/// Most paths that a pattern is taken to mean.
const MOST: usize = 4096;
/// Who has asked for a class that cannot be had.
const FIELD: &str = "config.annotations";

/// The classes that containers can be in.
#[derive(Debug, Default)]
pub struct Classes {
    file: Option<PathBuf>,
    classes: BlockIoClasses,
}

impl Classes {
    /// Reads the file that the configuration names.
    ///
    /// # Errors
    /// It cannot be read, or is no file of classes.
    pub fn load(file: Option<&Path>) -> Result<Classes, Error> {
        let Some(file) = file else {
            return Ok(Classes::default());
        };
        let mut text = String::new();
        std::fs::File::open(file)
            .and_then(|f| f.take(FILE_LIMIT + 1).read_to_string(&mut text))
            .and_then(|read| match read as u64 {
                // Half of it may well be a file of fewer classes.
                ..=FILE_LIMIT => Ok(()),
                _ => Err(std::io::Error::new(
                    std::io::ErrorKind::FileTooLarge,
                    format!("it is longer than {} MiB", FILE_LIMIT >> 20),
                )),
            })
            .map_err(Error::io("read the block IO classes in", file))?;
        let classes = BlockIoClasses::from_yaml(&text).map_err(|source| Error::BlockIo {
            path: file.to_owned(),
            source: Box::new(source),
        })?;
        Ok(Classes {
            file: Some(file.to_owned()),
            classes,
        })
    }

    /// What the container's class comes to here; `None`: it is in none.
    ///
    /// # Errors
    /// Its class is not in the file, or no file is configured.
    pub fn of(&self, container: &Container, pod: &Pod) -> Result<Option<slipway_spec::BlockIo>, Error> {
        let config = &container.record().config;
        let of_pod = &pod.record().config.annotations;
        let Some(class) = blockio::class_of(&config.metadata.name, &config.annotations, of_pod) else {
            return Ok(None);
        };
        let Some(file) = &self.file else {
            let reason = format!(
                "they ask for the block IO class {class:?}, and runtime.blockio_config_file names no file of classes"
            );
            return Err(Error::invalid(FIELD, reason));
        };
        let mut find = |pattern: &str| {
            let found = devices(pattern);
            if found.is_empty() {
                tracing::warn!(container = %container.id(), class, "no whole block device is {pattern}: it has no limits there");
            }
            found
        };
        let found = self.classes.resolve(class, &mut find);
        if found.is_none() {
            let names: Vec<&str> = self.classes.names().collect();
            let reason = format!(
                "the block IO class {class:?} is not in {}, which has {names:?}",
                file.display()
            );
            return Err(Error::invalid(FIELD, reason));
        }
        Ok(found)
    }
}

/// The numbers of the block devices that a pattern means, through links. Partitions are not among them: the kernel counts
/// and limits the IO of whole devices.
fn devices(pattern: &str) -> Vec<(u32, u32)> {
    let mut found: Vec<_> = paths(Path::new(pattern))
        .into_iter()
        .filter_map(|path| std::fs::metadata(path).ok())
        .filter(|meta| meta.file_type().is_block_device())
        .map(|meta| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())))
        .filter(|(major, minor)| !Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// The paths that a pattern means, part by part.
fn paths(pattern: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/")];
    for part in pattern.components() {
        let Component::Normal(part) = part else { continue };
        let part = part.to_string_lossy();
        let is_pattern = part.contains(['*', '?', '[', '\\']);
        let mut next = Vec::new();
        for dir in found {
            if !is_pattern {
                next.push(dir.join(&*part));
                continue;
            }
            let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            let names = entries.filter_map(|e| e.file_name().into_string().ok());
            let fits = |name: &String| blockio::matches(&part, name);
            next.extend(names.filter(fits).take(MOST).map(|name| dir.join(name)));
            if next.len() >= MOST {
                break;
            }
        }
        found = next;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_the_paths_that_a_shell_would_find() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["a1/x", "a1/y", "a2/x", "b1/x"] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let names = |pattern: &str| {
            let mut all: Vec<String> = paths(&dir.path().join(pattern))
                .iter()
                .map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string())
                .collect();
            all.sort();
            all
        };
        assert_eq!(names("a[0-9]/x"), ["a1/x", "a2/x"]);
        assert_eq!(names("a1/*"), ["a1/x", "a1/y"]);
        assert_eq!(names("b1/x"), ["b1/x"]);
        assert_eq!(names("c*"), Vec::<String>::new());
        // Neither a file nor a character device is a block device.
        assert_eq!(devices(&dir.path().join("a1/*").display().to_string()), []);
        assert_eq!(devices("/dev/null"), []);
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("blockio.yaml");
        assert!(
            Classes::load(Some(&file))
                .unwrap_err()
                .chain()
                .contains("blockio.yaml")
        );
        std::fs::write(&file, "Classes:\n  slow:\n  - Weight: 5\n").unwrap();
        let error = Classes::load(Some(&file)).unwrap_err().chain();
        assert!(
            error.contains("blockio.yaml") && error.contains("outside 10 to 1000"),
            "{error}"
        );
        let long = format!("Classes:\n  slow:\n  - Weight: 50\n{}", "#\n".repeat(1 << 19));
        std::fs::write(&file, long).unwrap();
        let error = Classes::load(Some(&file)).unwrap_err().chain();
        assert!(error.contains("longer than 1 MiB"), "{error}");
        std::fs::write(&file, "Classes:\n  slow:\n  - Weight: 50\n").unwrap();
        assert_eq!(Classes::load(Some(&file)).unwrap().classes.names().count(), 1);
        assert!(Classes::load(None).unwrap().file.is_none());
    }
}
