//! The canonical tar, made of real overlay mounts. These need root.

use super::*;
use crate::snapshotter::{Access, Snapshotter};
use crate::tar::Kind;
use crate::testing::{describe, entries, is_root, set, whiteout};
use crate::{Overlay, SnapshotId, unmount, unpack};
use std::os::unix::fs::{PermissionsExt, symlink};

struct Bed {
    dir: tempfile::TempDir,
    overlay: Overlay,
    layers: Vec<SnapshotId>,
}

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay::open(&dir.path().join("snapshots")).unwrap();
        std::fs::create_dir(dir.path().join("target")).unwrap();
        Bed {
            dir,
            overlay,
            layers: Vec::new(),
        }
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    fn parents(&self) -> Vec<PathBuf> {
        self.layers.iter().map(|id| self.overlay.fs_dir(id)).collect()
    }

    /// Lets `step` change the merged tree; its layer becomes the next parent. Returns the tar.
    fn step(&mut self, options: &DiffOptions<'_>, step: impl FnOnce(&Path)) -> (Vec<u8>, DiffStats) {
        let id = SnapshotId::new_random().unwrap();
        self.overlay.prepare(&id).unwrap();
        if let Some(below) = self.parents().first() {
            unpack::inherit_root(&self.overlay.fs_dir(&id), below).unwrap();
        }
        self.overlay
            .mounts(&id, &self.layers, Access::ReadWrite)
            .mount(&self.target())
            .unwrap();
        step(&self.target());
        unmount(&self.target()).unwrap();
        let parents = self.parents();
        let mut tar = Vec::new();
        let options = DiffOptions {
            lower: Lower::Layers(&parents),
            ..*options
        };
        let stats = write_tar(&self.overlay.fs_dir(&id), &options, &mut tar).unwrap();
        assert_eq!(stats.tar_bytes, tar.len() as u64);
        self.layers.insert(0, id);
        (tar, stats)
    }
}

fn names(tar: &[u8]) -> Vec<String> {
    entries(tar).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn root_deleted_replaced_and_new_entries_take_their_canonical_form() {
    if !is_root("deleted_replaced_and_new") {
        return;
    }
    let mut bed = Bed::new();
    let (first, _) = bed.step(&DiffOptions::default(), |root| {
        for dir in ["etc", "old", "both/sub"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        for file in ["etc/a", "etc/b", "old/x", "both/sub/y", "z"] {
            std::fs::write(root.join(file), file).unwrap();
        }
        symlink("z", root.join("link")).unwrap();
        std::fs::hard_link(root.join("z"), root.join("hard")).unwrap();
        set(&root.join("etc/a"), "user.k", b"v");
    });
    let expected = [
        "both/",
        "both/sub/",
        "both/sub/y",
        "etc/",
        "etc/a",
        "etc/b",
        "hard",
        "link->z",
        "old/",
        "old/x",
        "z=hard",
    ];
    assert_eq!(names(&first), expected);
    assert_eq!(entries(&first)[4].1.xattrs, [(b"user.k".to_vec(), b"v".to_vec())]);
    let (second, _) = bed.step(&DiffOptions::default(), |root| {
        std::fs::remove_file(root.join("etc/a")).unwrap();
        std::fs::remove_dir_all(root.join("old")).unwrap();
        std::fs::remove_dir_all(root.join("both")).unwrap();
        std::fs::create_dir(root.join("both")).unwrap();
        std::fs::write(root.join("both/new"), "").unwrap();
        std::fs::write(root.join("made-and-gone"), "").unwrap();
        std::fs::remove_file(root.join("made-and-gone")).unwrap();
        std::fs::remove_file(root.join("z")).unwrap();
        std::fs::create_dir(root.join("z")).unwrap();
    });
    assert_eq!(
        names(&second),
        [
            ".wh.old",
            "both/",
            "both/.wh..wh..opq",
            "both/new",
            "etc/",
            "etc/.wh.a",
            "z/"
        ]
    );
    // Unpacked elsewhere, the layers give the same tree.
    let copy = Bed::new();
    let mut layers = Vec::new();
    for tar in [&first, &second] {
        let id = SnapshotId::new_random().unwrap();
        copy.overlay.prepare(&id).unwrap();
        let dir = copy.overlay.fs_dir(&id);
        let unpacked = unpack::unpack(&dir, &mut &tar[..], &unpack::Options::default()).unwrap();
        let parents: Vec<PathBuf> = layers.iter().map(|id| copy.overlay.fs_dir(id)).collect();
        unpack::fix_up(&dir, &parents, &unpacked.fix_ups).unwrap();
        layers.insert(0, id);
    }
    let seen = |bed: &Bed, layers: &[SnapshotId]| {
        bed.overlay
            .mounts(&layers[0], &layers[1..], Access::ReadOnly)
            .mount(&bed.target())
            .unwrap();
        let tree = describe(&bed.target());
        unmount(&bed.target()).unwrap();
        // A layer keeps whole seconds.
        tree.into_iter()
            .map(|(path, text)| (path, text.split('.').next().unwrap().to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(seen(&copy, &layers), seen(&bed, &bed.layers));
}

#[test]
fn root_copied_up_but_unchanged_entries_and_stubs_are_left_out() {
    if !is_root("copied_up_but_unchanged") {
        return;
    }
    let mut bed = Bed::new();
    bed.step(&DiffOptions::default(), |root| {
        std::fs::create_dir_all(root.join("dir/sub")).unwrap();
        std::fs::write(root.join("dir/same"), vec![7u8; 300_000]).unwrap();
        std::fs::write(root.join("dir/sub/touched"), "x").unwrap();
        std::fs::write(root.join("mode"), "x").unwrap();
    });
    let skip = [
        PathBuf::from("/etc/resolv.conf"),
        PathBuf::from("/etc"),
        PathBuf::from("/point-used"),
        PathBuf::from("mode"),
    ];
    let options = DiffOptions {
        skip: &skip,
        ..DiffOptions::default()
    };
    let open = |path: PathBuf| std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let (tar, stats) = bed.step(&options, |root| {
        drop(open(root.join("dir/same")));
        drop(open(root.join("dir/sub/touched")));
        std::fs::create_dir(root.join("etc")).unwrap();
        std::fs::write(root.join("etc/resolv.conf"), "").unwrap();
        std::fs::write(root.join("point-used"), "written to").unwrap();
        std::fs::set_permissions(root.join("mode"), PermissionsExt::from_mode(0o600)).unwrap();
        std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    });
    assert_eq!(names(&tar), ["mode", "point-used"]);
    assert_eq!(stats.sockets, 1);
    assert!(stats.unchanged >= 2, "{stats:?}");
    // The same, against a mounted view of the parents.
    let upper = bed.overlay.fs_dir(&bed.layers[0]);
    bed.overlay
        .mounts(&bed.layers[1], &bed.layers[2..], Access::ReadOnly)
        .mount(&bed.target())
        .unwrap();
    let mut mounted = Vec::new();
    let target = bed.target();
    write_tar(
        &upper,
        &DiffOptions {
            lower: Lower::Mounted(&target),
            ..options
        },
        &mut mounted,
    )
    .unwrap();
    unmount(&target).unwrap();
    assert_eq!(mounted, tar);
}

#[test]
fn root_a_changed_byte_with_the_old_time_and_size_is_a_change() {
    if !is_root("a_changed_byte") {
        return;
    }
    let mut bed = Bed::new();
    bed.step(&DiffOptions::default(), |root| {
        std::fs::write(root.join("f"), "aaaa").unwrap()
    });
    let (tar, _) = bed.step(&DiffOptions::default(), |root| {
        let time = std::fs::metadata(root.join("f")).unwrap().modified().unwrap();
        std::fs::write(root.join("f"), "aaab").unwrap();
        std::fs::File::options()
            .write(true)
            .open(root.join("f"))
            .unwrap()
            .set_modified(time)
            .unwrap();
    });
    assert_eq!(names(&tar), ["f"]);
}

#[test]
fn root_a_linked_pair_stays_a_pair_and_devices_and_modes_are_kept() {
    if !is_root("a_linked_pair") {
        return;
    }
    let mut bed = Bed::new();
    bed.step(&DiffOptions::default(), |root| {
        std::fs::write(root.join("below"), "x").unwrap()
    });
    let (tar, _) = bed.step(&DiffOptions::default(), |root| {
        std::fs::hard_link(root.join("below"), root.join("also")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o640);
        let device = rustix::fs::makedev(240, 300_000);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("dev"),
            rustix::fs::FileType::BlockDevice,
            mode,
            device,
        )
        .unwrap();
        std::fs::set_permissions(root.join("dev"), PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(root, Some(1), Some(2)).unwrap();
    });
    assert_eq!(names(&tar), ["./", "also", "below=also", "dev"]);
    let all = entries(&tar);
    assert_eq!((all[0].1.uid, all[0].1.gid), (1, 2));
    assert_eq!(
        (all[3].1.kind, all[3].1.device, all[3].1.mode),
        (Kind::Block, (240, 300_000), 0o640)
    );
}

#[test]
fn root_the_same_tree_gives_the_same_bytes_with_times_clamped() {
    if !is_root("the_same_tree") {
        return;
    }
    let make = |order: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        for name in order {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let mut tar = Vec::new();
        let options = DiffOptions {
            lower: Lower::Layers(&[]),
            clamp_mtime: Some(1_000),
            ..DiffOptions::default()
        };
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        write_tar(dir.path(), &options, &mut tar).unwrap();
        tar
    };
    let tar = make(&["b", "a", "c"]);
    assert_eq!(tar, make(&["c", "b", "a"]));
    assert!(
        entries(&tar)
            .iter()
            .all(|(_, header)| header.mtime.seconds == 1_000)
    );
}

#[test]
fn root_overlays_own_attributes_and_needless_whiteouts_are_stripped() {
    if !is_root("overlays_own_attributes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "").unwrap();
    for name in [
        "trusted.overlay.origin",
        "user.overlay.x",
        "trusted.overlay.overlay.opaque",
    ] {
        set(&dir.path().join("f"), name, b"y");
    }
    whiteout(&dir.path().join("never-was"));
    std::fs::create_dir(dir.path().join("d")).unwrap();
    set(&dir.path().join("d"), "trusted.overlay.opaque", b"y");
    let tar = |lower| {
        let mut tar = Vec::new();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        write_tar(
            dir.path(),
            &DiffOptions {
                lower,
                ..DiffOptions::default()
            },
            &mut tar,
        )
        .unwrap();
        tar
    };
    let known = tar(Lower::Layers(&[]));
    assert_eq!(names(&known), ["d/", "f"]);
    assert!(entries(&known)[1].1.xattrs.is_empty());
    // Not knowing what lies below, it keeps every mark.
    assert_eq!(
        names(&tar(Lower::None)),
        [".wh.never-was", "d/", "d/.wh..wh..opq", "f"]
    );
}

#[test]
fn root_a_name_that_would_delete_when_unpacked_is_an_error() {
    if !is_root("a_name_that_would_delete") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(".wh.passwd"), "").unwrap();
    let error = write_tar(dir.path(), &DiffOptions::default(), &mut Vec::new()).unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Diff {
                source: DiffError::Reserved { .. },
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn root_a_sink_that_fails_is_told_apart_from_a_file_that_cannot_be_read() {
    if !is_root("a_sink_that_fails") {
        return;
    }
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let error = write_tar(dir.path(), &DiffOptions::default(), &mut Full).unwrap_err();
    assert!(matches!(error, SnapshotError::DiskFull { .. }), "{error}");
}

#[test]
fn root_a_layer_is_the_same_on_a_parent_that_came_back_without_nanoseconds() {
    if !is_root("a_parent_that_came_back_without_nanoseconds") {
        return;
    }
    let mut bed = Bed::new();
    let (first, _) = bed.step(&DiffOptions::default(), |root| {
        std::fs::create_dir(root.join("d")).unwrap();
        std::fs::write(root.join("d/touched"), "same").unwrap();
        std::fs::write(root.join("d/changed"), "one").unwrap();
        symlink("changed", root.join("d/link")).unwrap();
    });
    let (second, stats) = bed.step(&DiffOptions::default(), |root| {
        // Copied up, and left as it was.
        let file = std::fs::OpenOptions::new()
            .append(true)
            .open(root.join("d/touched"));
        drop(file.unwrap());
        std::fs::write(root.join("d/changed"), "two").unwrap();
    });
    assert_eq!(names(&second), ["d/", "d/changed"]);
    assert!(stats.unchanged > 0, "{stats:?}");

    let pulled = bed.dir.path().join("pulled");
    std::fs::create_dir(&pulled).unwrap();
    unpack::unpack(&pulled, &mut first.as_slice(), &unpack::Options::default()).unwrap();
    let nanos = std::os::linux::fs::MetadataExt::st_mtime_nsec;
    let (before, after) = (bed.parents()[1].join("d/touched"), pulled.join("d/touched"));
    assert_ne!(
        nanos(&before.metadata().unwrap()),
        nanos(&after.metadata().unwrap())
    );
    let upper = bed.parents()[0].clone();
    let mut again = Vec::new();
    let options = DiffOptions {
        lower: Lower::Layers(&[pulled]),
        ..DiffOptions::default()
    };
    write_tar(&upper, &options, &mut again).unwrap();
    assert_eq!(names(&again), names(&second));
    assert!(again == second, "the same bytes");
}
