//! What the tests of this crate share: archives made entry by entry, trees described so that they can be compared.

use crate::attributes::{is_whiteout, kind, xattrs_at};
use crate::tar::{Header, Kind, Writer};
use rustix::fs::{AtFlags, FileType};
use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::Path;

/// Whether the test may run; says so loudly when not.
pub(crate) fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: it needs root");
    }
    root
}

/// An archive in the making.
#[derive(Default)]
pub(crate) struct Archive(Vec<(Header, Vec<u8>)>);

impl Archive {
    pub(crate) fn new() -> Archive {
        Archive::default()
    }

    pub(crate) fn put(mut self, header: Header, contents: &[u8]) -> Archive {
        let header = Header {
            size: contents.len() as u64,
            ..header
        };
        self.0.push((header, contents.to_vec()));
        self
    }

    pub(crate) fn dir(self, path: &str) -> Archive {
        self.put(
            Header {
                mode: 0o755,
                ..Header::new(path, Kind::Directory)
            },
            b"",
        )
    }

    pub(crate) fn file(self, path: &str, contents: &str) -> Archive {
        self.put(
            Header {
                mode: 0o644,
                ..Header::new(path, Kind::File)
            },
            contents.as_bytes(),
        )
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Archive {
        self.put(
            Header {
                link: target.into(),
                ..Header::new(path, Kind::Symlink)
            },
            b"",
        )
    }

    pub(crate) fn hard(self, path: &str, target: &str) -> Archive {
        self.put(
            Header {
                link: target.into(),
                ..Header::new(path, Kind::HardLink)
            },
            b"",
        )
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (header, contents) in &self.0 {
            writer.file(header, &mut &contents[..]).unwrap();
        }
        writer.finish().unwrap().0
    }
}

/// Every entry of a tree by path, as text: type, mode, owner, contents or target, attributes, and for files with
/// several names the first of them.
pub(crate) fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    describe_dir(root, "", &mut found, &mut HashMap::new());
    found
}

fn describe_dir(
    dir: &Path,
    prefix: &str,
    found: &mut BTreeMap<String, String>,
    inodes: &mut HashMap<u64, String>,
) {
    let handle = std::fs::File::open(dir).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    for name in names {
        let path = format!("{prefix}{}", name.to_string_lossy());
        let stat = rustix::fs::statat(&handle, &name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let mut text = format!(
            "{:?} {:o} {}:{}",
            kind(&stat),
            stat.st_mode & 0o7777,
            stat.st_uid,
            stat.st_gid
        );
        match kind(&stat) {
            FileType::RegularFile => {
                let contents = std::fs::read(dir.join(&name)).unwrap();
                text += &format!(
                    " {:?}",
                    String::from_utf8_lossy(&contents[..contents.len().min(60)])
                );
            }
            FileType::Symlink => text += &format!(" -> {:?}", std::fs::read_link(dir.join(&name)).unwrap()),
            _ if is_whiteout(&stat) => text = "whiteout".to_owned(),
            FileType::Directory => {}
            _ => text += &format!(" {:x}", stat.st_rdev),
        }
        if kind(&stat) != FileType::Directory {
            text += &format!(" @{}.{}", stat.st_mtime, stat.st_mtime_nsec);
            if stat.st_nlink > 1 {
                let first = inodes.entry(stat.st_ino).or_insert_with(|| path.clone());
                if *first != path {
                    text += &format!(" = {first}");
                }
            }
        }
        for (name, value) in xattrs_at(handle.as_fd(), &name).unwrap() {
            text += &format!(" {}={}", name.escape_ascii(), value.escape_ascii());
        }
        found.insert(path.clone(), text);
        if kind(&stat) == FileType::Directory {
            describe_dir(&dir.join(&name), &format!("{path}/"), found, inodes);
        }
    }
}

/// The paths of a tree.
pub(crate) fn paths(root: &Path) -> Vec<String> {
    describe(root).into_keys().collect()
}

/// Sets an attribute of a path.
pub(crate) fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// Makes overlay's form of a deleted entry.
pub(crate) fn whiteout(path: &Path) {
    let mode = rustix::fs::Mode::empty();
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, mode, 0).unwrap();
}

/// The entries of an archive: name (links with their target) and header.
pub(crate) fn entries(archive: &[u8]) -> Vec<(String, Header)> {
    let mut reader = crate::tar::Reader::new(archive);
    let mut entries = Vec::new();
    while let Some(header) = reader.next_entry().unwrap() {
        let mut name = String::from_utf8_lossy(&header.path).into_owned();
        if !header.link.is_empty() {
            let arrow = if header.kind == Kind::HardLink { "=" } else { "->" };
            name += &format!("{arrow}{}", String::from_utf8_lossy(&header.link));
        }
        entries.push((name, header));
    }
    entries
}
