//! The contract of a snapshotter, on the overlay one.

use super::*;
use crate::testing::{describe, is_root, set};
use crate::unmount;

fn store() -> (tempfile::TempDir, Overlay) {
    let dir = tempfile::tempdir().unwrap();
    let overlay = Overlay::open(&dir.path().join("snapshots")).unwrap();
    (dir, overlay)
}

fn id(name: &str) -> SnapshotId {
    SnapshotId::new(name).unwrap()
}

#[test]
fn a_snapshot_is_prepared_once_and_removed_any_number_of_times() {
    let (_dir, overlay) = store();
    overlay.prepare(&id("a")).unwrap();
    assert!(matches!(
        overlay.prepare(&id("a")),
        Err(SnapshotError::Exists { .. })
    ));
    assert_eq!(overlay.ids().unwrap(), [id("a")]);
    overlay.remove(&id("a")).unwrap();
    overlay.remove(&id("a")).unwrap();
    assert!(overlay.ids().unwrap().is_empty());
    assert!(matches!(
        overlay.usage(&id("a")),
        Err(SnapshotError::NotFound { .. })
    ));
    assert!(matches!(
        overlay.commit(&id("a")),
        Err(SnapshotError::NotFound { .. })
    ));
}

#[test]
fn only_a_whole_marker_makes_a_snapshot_committed() {
    let (_dir, overlay) = store();
    overlay.prepare(&id("a")).unwrap();
    std::fs::write(overlay.fs_dir(&id("a")).join("file"), vec![1; 10_000]).unwrap();
    assert_eq!(overlay.committed(&id("a")).unwrap(), None);
    let usage = overlay.commit(&id("a")).unwrap();
    assert_eq!(overlay.committed(&id("a")).unwrap(), Some(usage));
    assert!(usage.bytes >= 10_000 && usage.inodes == 2, "{usage:?}");
    let marker = overlay.home(&id("a")).join(MARKER);
    assert!(!overlay.home(&id("a")).join("work").exists());
    let text = std::fs::read(&marker).unwrap();
    for torn in [0, 1, text.len() - 2] {
        std::fs::write(&marker, &text[..torn]).unwrap();
        assert_eq!(
            overlay.committed(&id("a")).unwrap(),
            None,
            "a marker of {torn} bytes"
        );
    }
    std::fs::write(&marker, &text).unwrap();
    std::fs::remove_dir_all(overlay.fs_dir(&id("a"))).unwrap();
    assert_eq!(overlay.committed(&id("a")).unwrap(), None);
}

#[test]
fn an_interrupted_removal_is_finished_by_the_sweep() {
    let (_dir, overlay) = store();
    overlay.prepare(&id("a")).unwrap();
    std::fs::rename(overlay.home(&id("a")), overlay.dir.join(".gone-a")).unwrap();
    assert!(overlay.ids().unwrap().is_empty());
    assert_eq!(overlay.sweep().unwrap(), 1);
    assert_eq!(overlay.sweep().unwrap(), 0);
}

#[test]
fn root_layers_stack_and_writes_land_in_the_upper_directory() {
    if !is_root("layers_stack") {
        return;
    }
    let (dir, overlay) = store();
    let target = dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    let mut layers = Vec::new();
    for (n, name) in ["one", "two", "three"].into_iter().enumerate() {
        let snapshot = id(name);
        overlay.prepare(&snapshot).unwrap();
        overlay
            .mounts(&snapshot, &layers, Access::ReadWrite)
            .mount(&target)
            .unwrap();
        std::fs::write(target.join(name), name).unwrap();
        std::fs::write(target.join("last"), name).unwrap();
        if n == 2 {
            std::fs::remove_file(target.join("one")).unwrap();
        }
        unmount(&target).unwrap();
        overlay.commit(&snapshot).unwrap();
        layers.insert(0, snapshot);
    }
    let view = overlay.mounts(&layers[0], &layers[1..], Access::ReadOnly);
    assert!(view.read_only());
    view.mount(&target).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("last")).unwrap(), "three");
    assert_eq!(
        describe(&target).into_keys().collect::<Vec<_>>(),
        ["last", "three", "two"]
    );
    assert!(std::fs::write(target.join("x"), "").is_err());
    unmount(&target).unwrap();
    unmount(&target).unwrap();
    assert_eq!(
        describe(&overlay.fs_dir(&id("three")))["one"].split(' ').next(),
        Some("whiteout")
    );
}

#[test]
fn root_a_single_layer_and_150_layers_mount() {
    if !is_root("a_single_layer_and_150") {
        return;
    }
    let (dir, overlay) = store();
    let target = dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    let mut layers = Vec::new();
    for n in 0..150 {
        let snapshot = id(&format!("layer{n}"));
        overlay.prepare(&snapshot).unwrap();
        std::fs::write(overlay.fs_dir(&snapshot).join(format!("file{n}")), "").unwrap();
        layers.insert(0, snapshot);
    }
    overlay
        .mounts(&layers[0], &[], Access::ReadOnly)
        .mount(&target)
        .unwrap();
    assert_eq!(describe(&target).len(), 1);
    unmount(&target).unwrap();
    overlay
        .mounts(&layers[0], &layers[1..], Access::ReadWrite)
        .mount(&target)
        .unwrap();
    assert_eq!(describe(&target).len(), 150);
    unmount(&target).unwrap();
}

#[test]
fn root_a_new_tree_takes_after_its_parents_root() {
    if !is_root("a_new_tree_takes_after") {
        return;
    }
    let (_dir, overlay) = store();
    for name in ["a", "b"] {
        overlay.prepare(&id(name)).unwrap();
    }
    let (a, b) = (overlay.fs_dir(&id("a")), overlay.fs_dir(&id("b")));
    std::fs::set_permissions(&a, Permissions::from_mode(0o1555)).unwrap();
    std::os::unix::fs::chown(&a, Some(3), Some(4)).unwrap();
    set(&a, "user.x", b"1");
    crate::unpack::inherit_root(&b, &a).unwrap();
    let described = describe(b.parent().unwrap());
    assert_eq!(described["fs"], "Directory 1555 3:4 user.x=1");
}
