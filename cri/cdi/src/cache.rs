//! The folders of CDI files, read and kept. Knows which file wins; leaves what files mean to the
//! pure part.
//!
//! Folders are given lowest priority first (`/etc/cdi`, then `/var/run/cdi`). Among files of the
//! highest priority that define a device, exactly one may: two of them make it unusable until one
//! goes. A file that cannot be used affects only its own devices; its error is told when one of
//! its kind's devices is asked for. Every resolve looks at the folders' listings first (names,
//! inodes, sizes, times), so what tools write is seen at once, without watching; a miss reads
//! everything again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::annotations::AnnotationError;
use crate::edits::EditError;
use crate::name::{NameError, QualifiedName};
use crate::parse::ParseError;
use crate::types::{ContainerEdits, DeviceNode, Spec};
use crate::validate::ValidationError;

/// Where CDI files are by default, lowest priority first.
pub const DEFAULT_DIRS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// Largest file that is read; a spec of a node with many GPUs has some 100 KiB.
const MAX_FILE: u64 = 8 << 20;

/// Most files that are read in one folder.
const MAX_FILES: usize = 4096;

/// fcntl.h's, the same on every architecture that we are built for.
const O_NONBLOCK: i32 = 0o4000;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// It cannot be read.
    #[error("read it")]
    Read(#[from] io::Error),
    /// It is not a CDI file.
    #[error("parse it")]
    Parse(#[from] ParseError),
    /// It is not a valid one.
    #[error("validate it")]
    Invalid(#[from] ValidationError),
}

impl FileError {
    /// The whole chain on one line, for messages about devices.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(e) = source {
            text.push_str(": ");
            text.push_str(&e.to_string());
            source = e.source();
        }
        text
    }
}

/// Why devices cannot be resolved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// Not a device's name.
    #[error("CDI device")]
    Name(#[from] NameError),
    /// No usable file defines it.
    #[error("CDI device {name} is not defined in {dirs}{hint}")]
    Unknown {
        /// The device.
        name: String,
        /// The folders looked at.
        dirs: String,
        /// Files that could not be used and might have.
        hint: String,
    },
    /// Several files of the same priority define it.
    #[error("CDI device {name} is defined by several files: {files}")]
    Conflict {
        /// The device.
        name: String,
        /// The files.
        files: String,
    },
    /// An annotation names something else.
    #[error("CDI devices by annotation")]
    Annotation(#[from] AnnotationError),
    /// Its device nodes are not there.
    #[error("CDI devices")]
    Edit(#[from] EditError),
}

/// A device that can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDevice {
    /// Its name.
    pub name: QualifiedName,
    /// What its file says of it to people and tools; of a key that both have, the device's own.
    pub annotations: BTreeMap<String, String>,
}

/// The CDI files of this host.
#[derive(Debug)]
pub struct Cache {
    dirs: Vec<PathBuf>,
    loaded: Mutex<Arc<Loaded>>,
}

impl Cache {
    /// A cache of these folders, lowest priority first. Nothing is read yet.
    pub fn new(dirs: Vec<PathBuf>) -> Cache {
        Cache {
            dirs,
            loaded: Mutex::default(),
        }
    }

    /// What a container needs that gets these devices, in the order it is to be applied: for each
    /// device its file's general edits (once a file), then its own. A device named twice is given once.
    /// Device nodes are completed through `lookup`, which is [`crate::host::lookup`] in real life.
    ///
    /// # Errors
    /// The first name that cannot be resolved, and why.
    pub fn resolve(
        &self,
        names: &[String],
        lookup: &dyn Fn(&Path) -> io::Result<DeviceNode>,
    ) -> Result<Vec<ContainerEdits>, ResolveError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut seen = HashSet::new();
        let names: Vec<QualifiedName> = names
            .iter()
            .filter(|n| seen.insert(n.as_str()))
            .map(|n| n.parse())
            .collect::<Result<_, _>>()?;
        let mut loaded = self.current();
        if names.iter().any(|n| !loaded.devices.contains_key(&n.to_string())) {
            loaded = self.refresh();
        }
        let mut general = HashSet::new();
        let mut edits = Vec::new();
        for name in &names {
            let file = loaded.find(name, &self.dirs)?;
            if general.insert(file) {
                edits.push(loaded.files[file].spec.container_edits.clone());
            }
            let own = loaded.files[file]
                .spec
                .devices
                .iter()
                .find(|d| d.name == name.device);
            edits.extend(own.map(|d| d.container_edits.clone()));
        }
        edits.retain(|e| !e.is_empty());
        for edit in &mut edits {
            edit.complete(lookup)?;
        }
        Ok(edits)
    }

    /// Reads all files again.
    pub fn refresh(&self) -> Arc<Loaded> {
        let fresh = Arc::new(Loaded::read(listing(&self.dirs), None));
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&fresh);
        fresh
    }

    /// All usable devices by their full names, sorted.
    pub fn devices(&self) -> Vec<String> {
        let loaded = self.current();
        let mut names: Vec<_> = loaded
            .devices
            .iter()
            .filter(|(_, files)| files.len() == 1)
            .map(|(n, _)| n.clone())
            .collect();
        names.sort();
        names
    }

    /// All usable devices, by name, with the annotations that their files have for them.
    pub fn listed(&self) -> Vec<ListedDevice> {
        let loaded = self.current();
        let mut listed: Vec<_> = loaded.listed().collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// That no file defines `name`: with the folders looked at, and the files that could not be used and might have. For
    /// callers that understand names of other forms than [`Cache::resolve`] does.
    pub fn unknown(&self, name: &str) -> ResolveError {
        self.current().unknown(name, &self.dirs)
    }

    /// Files that cannot be used, and why.
    pub fn errors(&self) -> Vec<(PathBuf, String)> {
        self.current()
            .errors
            .iter()
            .map(|(path, e)| (path.clone(), e.chain()))
            .collect()
    }

    /// What is loaded, read again where the folders have changed.
    fn current(&self) -> Arc<Loaded> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let listing = listing(&self.dirs);
        if listing != loaded.listing {
            *loaded = Arc::new(Loaded::read(listing, Some(&loaded)));
        }
        Arc::clone(&loaded)
    }
}

/// What tells one version of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Candidate files by path: with their folder's priority and, when they could be looked at, a stamp.
type Listing = BTreeMap<PathBuf, (usize, Option<Stamp>)>;

#[derive(Debug)]
struct File {
    path: PathBuf,
    priority: usize,
    spec: Arc<Spec>,
}

/// Everything read from the folders at one time.
#[derive(Debug, Default)]
pub struct Loaded {
    listing: Listing,
    files: Vec<File>,
    errors: Vec<(PathBuf, Arc<FileError>)>,
    /// Files (by index) that define a device at the highest priority at which any does.
    devices: HashMap<String, Vec<usize>>,
}

fn listing(dirs: &[PathBuf]) -> Listing {
    let mut found = Listing::new();
    for (priority, dir) in dirs.iter().enumerate() {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries.flatten().take(MAX_FILES) {
            let path = entry.path();
            let known = path.extension().is_some_and(|e| e == "json" || e == "yaml");
            if !known || entry.file_type().is_ok_and(|t| t.is_dir()) {
                continue;
            }
            let stamp = fs::metadata(&path)
                .ok()
                .filter(fs::Metadata::is_file)
                .map(|m| Stamp {
                    inode: m.ino(),
                    size: m.len(),
                    modified: (m.mtime(), m.mtime_nsec()),
                    changed: (m.ctime(), m.ctime_nsec()),
                });
            found.insert(path, (priority, stamp));
        }
    }
    found
}

fn read_file(path: &Path, stamp: Option<&Stamp>) -> Result<Spec, FileError> {
    let stamp = stamp.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))?;
    let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, "larger than 8 MiB");
    if stamp.size > MAX_FILE {
        return Err(too_large().into());
    }
    let bytes = read_bounded(path)?.ok_or_else(too_large)?;
    let spec = if path.extension().is_some_and(|e| e == "yaml") {
        let text = String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Spec::from_yaml(&text)?
    } else {
        Spec::from_json(&bytes)?
    };
    spec.validate()?;
    Ok(spec)
}

/// The file's bytes; nothing when it is too large. What it was when it was listed it need not be now: a FIFO in its place
/// must not be waited for, nor may a file that grows be read to its end.
fn read_bounded(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= MAX_FILE).then_some(bytes))
}

impl Loaded {
    /// Reads what is listed, taking over from `old` the files that have not changed.
    fn read(listing: Listing, old: Option<&Loaded>) -> Loaded {
        let mut new = Loaded {
            listing: listing.clone(),
            ..Loaded::default()
        };
        for (path, (priority, stamp)) in listing {
            let same = |old: &&Loaded| old.listing.get(&path) == Some(&(priority, stamp.clone()));
            let kept = old
                .filter(same)
                .and_then(|o| o.files.iter().find(|f| f.path == path));
            let spec = match kept {
                Some(file) => Ok(Arc::clone(&file.spec)),
                None => read_file(&path, stamp.as_ref()).map(Arc::new),
            };
            match spec {
                Ok(spec) => new.files.push(File { path, priority, spec }),
                Err(e) => new.errors.push((path, Arc::new(e))),
            }
        }
        new.index();
        new
    }

    fn index(&mut self) {
        let mut order: Vec<usize> = (0..self.files.len()).collect();
        order.sort_by_key(|i| self.files[*i].priority);
        for i in order {
            let file = &self.files[i];
            for device in &file.spec.devices {
                let name = format!("{}={}", file.spec.kind, device.name);
                let holders = self.devices.entry(name).or_default();
                if holders
                    .last()
                    .is_some_and(|h| self.files[*h].priority < file.priority)
                {
                    holders.clear();
                }
                holders.push(i);
            }
        }
    }

    fn find(&self, name: &QualifiedName, dirs: &[PathBuf]) -> Result<usize, ResolveError> {
        let full = name.to_string();
        match self.devices.get(&full).map(Vec::as_slice) {
            Some([one]) => Ok(*one),
            Some([_, _, ..]) => {
                let holders = self.devices.get(&full).into_iter().flatten();
                let files: Vec<_> = holders
                    .map(|i| self.files[*i].path.display().to_string())
                    .collect();
                Err(ResolveError::Conflict {
                    name: full,
                    files: files.join(", "),
                })
            }
            _ => Err(self.unknown(&full, dirs)),
        }
    }

    fn unknown(&self, name: &str, dirs: &[PathBuf]) -> ResolveError {
        let dirs: Vec<_> = dirs.iter().map(|d| d.display().to_string()).collect();
        let hint: String = self
            .errors
            .iter()
            .take(4)
            .map(|(path, e)| format!("; {} cannot be used: {}", path.display(), e.chain()))
            .collect();
        ResolveError::Unknown {
            name: name.to_owned(),
            dirs: dirs.join(", "),
            hint,
        }
    }

    fn listed(&self) -> impl Iterator<Item = ListedDevice> {
        let usable = self.devices.iter().filter_map(|(name, files)| match files[..] {
            [one] => Some((name.parse().ok()?, &self.files[one].spec)),
            _ => None,
        });
        usable.map(|(name, spec): (QualifiedName, _)| {
            let mut annotations = spec.annotations.clone();
            let own = spec.devices.iter().find(|d| d.name == name.device);
            annotations.extend(own.into_iter().flat_map(|d| d.annotations.clone()));
            ListedDevice { name, annotations }
        })
    }
}

#[cfg(test)]
mod tests;
