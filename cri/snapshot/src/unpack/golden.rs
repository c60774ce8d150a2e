//! Layers unpacked side by side, fixed up and mounted show the tree that applying them one after the other to one
//! plain directory gives. The layers are made at random, from a fixed seed.

use super::{Options, Unpacked, fix_up, unpack};
use crate::snapshotter::{Access, Snapshotter};
use crate::tar::{Header, Kind, Time};
use crate::testing::{Archive, describe, is_root};
use crate::{Overlay, SnapshotId, unmount};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

/// One entry of a layer in the making.
#[derive(Clone, Debug, PartialEq)]
enum Entry {
    Directory { mode: u32, uid: u32 },
    File { mode: u32, uid: u32, text: String },
    Symlink,
    HardLink { target: String },
}

#[derive(Clone, Debug, Default)]
struct Layer {
    entries: BTreeMap<String, Entry>,
    whiteouts: Vec<String>,
    opaque: Vec<String>,
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % below
    }

    fn path(&mut self) -> String {
        let depth = 1 + self.next(3);
        (0..depth)
            .map(|_| ["a", "b", "c", "d"][self.next(4)])
            .collect::<Vec<_>>()
            .join("/")
    }
}

fn related(a: &str, b: &str) -> bool {
    a == b || a.starts_with(&format!("{b}/")) || b.starts_with(&format!("{a}/"))
}

impl Layer {
    /// A random layer on a tree that has these files.
    fn random(random: &mut Random, number: usize, files_below: &[String]) -> Layer {
        let mut layer = Layer::default();
        for _ in 0..3 + random.next(8) {
            let path = random.path();
            match random.next(10) {
                0 | 1 => layer.whiteouts.push(path),
                2 => layer.opaque.push(path),
                kind => layer.add(path, kind, random, number),
            }
        }
        // What is put into something must be able to hold it.
        let holds = |layer: &Layer, path: &str| {
            layer.entries.iter().all(|(other, entry)| {
                matches!(entry, Entry::Directory { .. }) || !path.starts_with(&format!("{other}/"))
            })
        };
        let inside = layer.clone();
        layer.whiteouts.retain(|path| holds(&inside, path));
        layer.opaque.retain(|path| holds(&inside, &format!("{path}/x")));
        for target in files_below {
            let link = format!("link{}", random.next(3));
            let touched = layer
                .whiteouts
                .iter()
                .chain(&layer.opaque)
                .chain(layer.entries.keys());
            if random.next(4) == 0
                && !layer.entries.contains_key(&link)
                && !touched.clone().any(|p| related(p, target))
            {
                layer.entries.insert(
                    link,
                    Entry::HardLink {
                        target: target.clone(),
                    },
                );
            }
        }
        layer
    }

    fn add(&mut self, path: String, kind: usize, random: &mut Random, number: usize) {
        let mode = [0o755, 0o700, 0o1777][random.next(3)];
        let uid = u32::try_from(random.next(3)).unwrap();
        let entry = match kind {
            3..=5 => Entry::Directory { mode, uid },
            6 => Entry::Symlink,
            _ => Entry::File {
                mode,
                uid,
                text: format!("{path} of layer {number}"),
            },
        };
        let leaf = !matches!(entry, Entry::Directory { .. });
        let clashes = self.entries.iter().any(|(other, there)| {
            *other == path
                || (leaf && other.starts_with(&format!("{path}/")))
                || (!matches!(there, Entry::Directory { .. }) && path.starts_with(&format!("{other}/")))
        });
        if !clashes {
            self.entries.insert(path, entry);
        }
    }

    /// As an archive, in an order of its own.
    fn archive(&self, random: &mut Random) -> Archive {
        let header = |path: &str, kind, mode, uid| Header {
            mode,
            uid,
            mtime: Time {
                seconds: 1_000,
                nanos: 0,
            },
            ..Header::new(path, kind)
        };
        let mark = |path: &str| match path.rsplit_once('/') {
            Some((dir, name)) => format!("{dir}/.wh.{name}"),
            None => format!(".wh.{path}"),
        };
        let mut list: Vec<(Header, String)> = Vec::new();
        for (path, entry) in &self.entries {
            list.push(match entry {
                Entry::Directory { mode, uid } => (header(path, Kind::Directory, *mode, *uid), String::new()),
                Entry::File { mode, uid, text } => (header(path, Kind::File, *mode, *uid), text.clone()),
                Entry::Symlink => (
                    Header {
                        link: b"nowhere".to_vec(),
                        ..header(path, Kind::Symlink, 0, 0)
                    },
                    String::new(),
                ),
                Entry::HardLink { target } => (
                    Header {
                        link: target.clone().into(),
                        ..header(path, Kind::HardLink, 0, 0)
                    },
                    String::new(),
                ),
            });
        }
        list.extend(
            self.whiteouts
                .iter()
                .map(|p| (header(&mark(p), Kind::File, 0, 0), String::new())),
        );
        list.extend(self.opaque.iter().map(|p| {
            (
                header(&format!("{p}/.wh..wh..opq"), Kind::File, 0, 0),
                String::new(),
            )
        }));
        for at in (1..list.len()).rev() {
            list.swap(at, random.next(at + 1));
        }
        list.into_iter().fold(Archive::new(), |archive, (header, text)| {
            archive.put(header, text.as_bytes())
        })
    }

    /// Applied to a plain directory, as the image spec says it in words.
    fn apply(&self, root: &Path) {
        let links: Vec<(PathBuf, PathBuf)> = self
            .entries
            .iter()
            .filter_map(|(path, entry)| match entry {
                Entry::HardLink { target } => Some((root.join(path), root.join(target))),
                _ => None,
            })
            .collect();
        // From the outside in: what an outer mark deletes, an inner one implies again.
        let mut marks: Vec<(&String, bool)> = self.whiteouts.iter().map(|path| (path, false)).collect();
        marks.extend(self.opaque.iter().map(|path| (path, true)));
        marks.sort();
        for (path, opaque) in marks {
            make_dirs(root, Path::new(path).parent().unwrap());
            if opaque {
                make_dirs(root, Path::new(path));
                fs::read_dir(root.join(path))
                    .unwrap()
                    .for_each(|child| remove(&child.unwrap().path()));
            } else {
                remove(&root.join(path));
            }
        }
        for (path, entry) in &self.entries {
            let full = root.join(path);
            make_dirs(root, Path::new(path).parent().unwrap());
            match entry {
                Entry::Directory { mode, uid } => {
                    if !is_dir(&full) {
                        remove(&full);
                        fs::create_dir(&full).unwrap();
                    }
                    set(&full, *mode, *uid);
                }
                Entry::File { mode, uid, text } => {
                    remove(&full);
                    fs::write(&full, text).unwrap();
                    set(&full, *mode, *uid);
                    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000);
                    fs::File::open(&full).unwrap().set_modified(time).unwrap();
                }
                Entry::Symlink => {
                    remove(&full);
                    symlink("nowhere", &full).unwrap();
                    lchown(&full, Some(0), Some(0)).unwrap();
                }
                Entry::HardLink { .. } => {}
            }
        }
        for (link, target) in links {
            remove(&link);
            fs::hard_link(target, link).unwrap();
        }
    }
}

fn is_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

fn remove(path: &Path) {
    let _ = if is_dir(path) {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
}

fn set(path: &Path, mode: u32, uid: u32) {
    chown(path, Some(uid), Some(0)).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

fn make_dirs(root: &Path, path: &Path) {
    let mut full = root.to_path_buf();
    for part in path {
        full.push(part);
        if !is_dir(&full) {
            remove(&full);
            fs::create_dir(&full).unwrap();
            set(&full, 0o755, 0);
        }
    }
}

/// The described tree, without the times of symbolic links (the plain directory has the time of the test) and without
/// which names are one file: overlayfs parts names of different layers.
fn comparable(root: &Path) -> BTreeMap<String, String> {
    let strip = |text: String| {
        let end = if text.starts_with("Symlink") { " @" } else { " = " };
        text.split(end).next().unwrap().to_owned()
    };
    describe(root)
        .into_iter()
        .map(|(path, text)| (path, strip(text)))
        .collect()
}

#[test]
fn root_layers_unpacked_in_parallel_show_the_tree_of_layers_applied_in_order() {
    if !is_root("layers_unpacked_in_parallel") {
        return;
    }
    for seed in 1..=40u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let dir = tempfile::tempdir().unwrap();
        let (plain, target) = (dir.path().join("plain"), dir.path().join("target"));
        fs::create_dir(&plain).unwrap();
        fs::create_dir(&target).unwrap();
        let mut layers = Vec::new();
        for number in 0..4 {
            let files: Vec<String> = comparable(&plain)
                .into_iter()
                .filter(|(path, text)| text.starts_with("RegularFile") && !path.starts_with("link"))
                .map(|(path, _)| path)
                .collect();
            let layer = Layer::random(&mut random, number, &files);
            layer.apply(&plain);
            layers.push(layer);
        }
        let overlay = Overlay::open(&dir.path().join("snapshots")).unwrap();
        let archives: Vec<Vec<u8>> = layers
            .iter()
            .map(|layer| layer.archive(&mut random).bytes())
            .collect();
        let ids: Vec<SnapshotId> = (0..archives.len())
            .map(|n| SnapshotId::new(format!("l{n}")).unwrap())
            .collect();
        let unpacked: Vec<Unpacked> = std::thread::scope(|scope| {
            let work: Vec<_> = archives
                .iter()
                .zip(&ids)
                .map(|(archive, id)| {
                    overlay.prepare(id).unwrap();
                    let dir = overlay.fs_dir(id);
                    scope.spawn(move || unpack(&dir, &mut &archive[..], &Options::default()))
                })
                .collect();
            work.into_iter().map(|one| one.join().unwrap().unwrap()).collect()
        });
        let mut below: Vec<SnapshotId> = Vec::new();
        for (id, unpacked) in ids.iter().zip(&unpacked) {
            let parents: Vec<PathBuf> = below.iter().map(|id| overlay.fs_dir(id)).collect();
            fix_up(&overlay.fs_dir(id), &parents, &unpacked.fix_ups).unwrap();
            below.insert(0, id.clone());
        }
        overlay
            .mounts(&below[0], &below[1..], Access::ReadOnly)
            .mount(&target)
            .unwrap();
        let (merged, expected) = (comparable(&target), comparable(&plain));
        unmount(&target).unwrap();
        assert_eq!(merged, expected, "seed {seed}: {layers:#?}");
    }
}
