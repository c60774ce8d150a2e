//! `root::Root` against trees made to lead outside.
#![allow(clippy::unwrap_used)] // a failure is a failed test

use slipway_sys::root::Root;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

struct Tree {
    _dir: tempfile::TempDir,
    inside: PathBuf,
    outside: PathBuf,
}

fn tree() -> Tree {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("inside");
    let outside = dir.path().join("outside");
    fs::create_dir(&inside).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    Tree {
        inside,
        outside,
        _dir: dir,
    }
}

#[test]
fn a_link_to_an_absolute_path_stays_inside() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    symlink(&t.outside, t.inside.join("etc")).unwrap();
    symlink("/../../../../outside", t.inside.join("up")).unwrap();
    assert_eq!(root.read(Path::new("/etc/secret"), 100).unwrap(), None);
    assert_eq!(root.read(Path::new("up/secret"), 100).unwrap(), None);
    assert_eq!(root.read(Path::new("../outside/secret"), 100).unwrap(), None);
    fs::create_dir_all(t.inside.join("real/deep")).unwrap();
    fs::write(t.inside.join("real/deep/file"), "mine").unwrap();
    symlink("/real", t.inside.join("link")).unwrap();
    assert_eq!(
        root.read(Path::new("/link/deep/../deep/file"), 100)
            .unwrap()
            .unwrap(),
        b"mine"
    );
    assert_eq!(
        root.resolve(Path::new("/link/./deep/../deep/file")).unwrap(),
        Path::new("/real/deep/file")
    );
    assert_eq!(root.resolve(Path::new("/../..")).unwrap(), Path::new("/"));
}

#[test]
fn making_directories_follows_dangling_links_inside_only() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    symlink(t.outside.join("new"), t.inside.join("a")).unwrap();
    symlink("../../../run", t.inside.join("b")).unwrap();
    let made = root.mkdir_all(Path::new("/a/x"), 0o751, None).unwrap();
    let expected = t.outside.join("new").join("x");
    let expected: Vec<PathBuf> = expected
        .ancestors()
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .skip(1)
        .map(PathBuf::from)
        .collect();
    assert_eq!(
        made, expected,
        "the link's absolute target is made below the root"
    );
    assert!(!t.outside.join("new").exists());
    let made = root.mkdir_all(Path::new("b/lock"), 0o700, None).unwrap();
    assert_eq!(made, [PathBuf::from("/run"), PathBuf::from("/run/lock")]);
    let mode = fs::metadata(t.inside.join("run/lock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o700);
    assert!(
        root.mkdir_all(Path::new("/run/lock"), 0o755, None)
            .unwrap()
            .is_empty()
    );
    fs::write(t.inside.join("file"), "").unwrap();
    let e = root.mkdir_all(Path::new("/file/x"), 0o755, None).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::NotADirectory, "{e:?}");
    symlink("loop2", t.inside.join("loop1")).unwrap();
    symlink("loop1", t.inside.join("loop2")).unwrap();
    assert!(root.mkdir_all(Path::new("/loop1/x"), 0o755, None).is_err());
}

#[test]
fn creating_a_file_through_a_link_stays_inside_and_devices_are_refused() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    symlink(t.outside.join("secret"), t.inside.join("hosts")).unwrap();
    let e = root.create_file(Path::new("/hosts"), 0o644).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::NotFound, "{e:?}");
    symlink("/made", t.inside.join("resolv.conf")).unwrap();
    root.create_file(Path::new("resolv.conf"), 0o640)
        .unwrap()
        .write_all(b"x")
        .unwrap();
    assert_eq!(fs::read(t.inside.join("made")).unwrap(), b"x");
    drop(root.create_file(Path::new("resolv.conf"), 0o640).unwrap());
    assert_eq!(fs::metadata(t.inside.join("made")).unwrap().len(), 0);
    assert_eq!(fs::read(t.outside.join("secret")).unwrap(), b"secret");
    let fifo = std::ffi::CString::new(t.inside.join("fifo").to_str().unwrap()).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    assert!(
        root.create_file(Path::new("fifo"), 0o644).is_err(),
        "a FIFO would hang"
    );
    assert!(root.read(Path::new("fifo"), 10).is_err());
}

#[test]
fn what_is_too_large_is_an_error_and_not_cut() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    fs::write(t.inside.join("passwd"), vec![b'a'; 1001]).unwrap();
    assert!(root.read(Path::new("passwd"), 1000).is_err());
    assert_eq!(root.read(Path::new("passwd"), 1001).unwrap().unwrap().len(), 1001);
    assert_eq!(root.read(Path::new("nothing/here"), 1).unwrap(), None);
}

#[test]
fn magic_links_are_not_followed() {
    let root = Root::open(Path::new("/proc/self")).unwrap();
    assert!(
        root.open_file(Path::new("/root/etc/passwd"), rustix::fs::OFlags::RDONLY)
            .is_err()
    );
    assert!(
        root.open_file(Path::new("/cwd"), rustix::fs::OFlags::RDONLY)
            .is_err()
    );
}

#[test]
fn removing_never_follows_links_and_survives_deep_trees() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    fs::create_dir_all(t.inside.join("victim/sub/sub2")).unwrap();
    symlink(&t.outside, t.inside.join("victim/sub/out")).unwrap();
    symlink("/", t.inside.join("victim/root")).unwrap();
    fs::write(t.inside.join("victim/sub/sub2/f"), "").unwrap();
    root.remove_all(Path::new("victim")).unwrap();
    assert!(!t.inside.join("victim").exists());
    assert!(t.outside.join("secret").exists());
    root.remove_all(Path::new("victim")).unwrap();
    // 1500 levels: deeper than PATH_MAX allows in one path, and than the descriptors we may hold.
    let mut at = rustix::fs::openat(
        rustix::fs::CWD,
        &t.inside,
        rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::RDONLY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    for _ in 0..1500 {
        rustix::fs::mkdirat(&at, "dddd", rustix::fs::Mode::RWXU).unwrap();
        at = rustix::fs::openat(
            &at,
            "dddd",
            rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
    }
    root.remove_all(Path::new("/dddd")).unwrap();
    assert_eq!(fs::read_dir(&t.inside).unwrap().count(), 0);
}

#[test]
fn the_parent_of_an_entry_is_found_without_looking_at_the_entry() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    fs::create_dir(t.inside.join("d")).unwrap();
    symlink("/d", t.inside.join("l")).unwrap();
    let (fd, name) = root.parent(Path::new("/l/whatever")).unwrap();
    assert_eq!(name, "whatever");
    assert_eq!(
        rustix::fs::fstat(&fd).unwrap().st_ino,
        fs::metadata(t.inside.join("d")).unwrap().ino()
    );
    assert!(root.parent(Path::new("/")).is_err());
    assert!(root.parent(Path::new("/d/..")).is_err());
}

#[test]
fn a_directory_swapped_for_a_link_during_the_walk_leads_nowhere() {
    let t = tree();
    let root = Root::open(&t.inside).unwrap();
    fs::create_dir_all(t.inside.join("swap")).unwrap();
    symlink(&t.outside, t.inside.join("evil")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let (a, b) = (t.inside.join("swap"), t.inside.join("evil"));
                let _ = rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, flags);
            }
        });
        for n in 0..300 {
            let _ = root.mkdir_all(Path::new(&format!("swap/d{n}")), 0o755, None);
            let _ = root.create_file(Path::new(&format!("swap/f{n}")), 0o644);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let names: Vec<_> = fs::read_dir(&t.outside)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["secret"], "nothing was made outside");
}
