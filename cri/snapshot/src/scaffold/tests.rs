//! Scaffolding in real overlay mounts. These need root.

use super::*;
use crate::snapshotter::{Access, Snapshotter};
use crate::testing::{describe, is_root};
use crate::{Overlay, SnapshotId, unmount};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

/// A mounted upper directory on a layer; what `make` makes in that first.
struct Bed {
    dir: tempfile::TempDir,
    mount: RootfsMount,
}

impl Bed {
    fn new(make: impl FnOnce(&Path)) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay::open(&dir.path().join("snapshots")).unwrap();
        let target = dir.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let (layer, upper) = (
            SnapshotId::new_random().unwrap(),
            SnapshotId::new_random().unwrap(),
        );
        for id in [&layer, &upper] {
            overlay.prepare(id).unwrap();
        }
        make(&overlay.fs_dir(&layer));
        let mount = overlay.mounts(&upper, &[layer], Access::ReadWrite);
        mount.mount(&target).unwrap();
        Bed { dir, mount }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    fn upper(&self) -> &Path {
        self.mount.upper().unwrap()
    }

    /// What is in the upper directory after scaffolding and command.
    fn left(self, scaffolding: impl FnOnce(&Path), command: impl FnOnce(&Path)) -> Bed {
        self.left_but(&[], scaffolding, command)
    }

    /// Where the command counts on links.
    fn left_but(self, named: &[&str], scaffolding: impl FnOnce(&Path), command: impl FnOnce(&Path)) -> Bed {
        let survey = Survey::of(self.upper()).unwrap();
        scaffolding(&self.root());
        let scaffold = survey.scaffold(self.upper()).unwrap();
        command(&self.root());
        unmount(&self.root()).unwrap();
        let named = named.iter().map(PathBuf::from).collect();
        scaffold.strike(&self.mount, &named).unwrap();
        self
    }
}

fn write(path: PathBuf, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn replace(path: PathBuf, text: &str) {
    let beside = path.with_extension("new");
    write(beside.clone(), text);
    std::fs::rename(beside, path).unwrap();
}

fn below(root: &Path) {
    write(root.join("etc/cache"), "old");
    write(root.join("etc/taken"), "old");
    write(root.join("etc/other"), "old");
    write(root.join("etc/deep/kept"), "old");
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    for path in ["etc/taken", "etc/deep", "etc", ""] {
        File::open(root.join(path))
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
    }
}

fn driver(root: &Path) {
    replace(root.join("etc/cache"), "with the driver");
    replace(root.join("etc/taken"), "with the driver");
    write(root.join("etc/parts/driver"), "a folder");
    write(root.join("etc/parts/alike"), "a folder");
    write(root.join("lib/lib.so.1"), "");
    symlink("lib.so.1", root.join("lib/lib.so")).unwrap();
    std::fs::remove_file(root.join("etc/deep/kept")).unwrap();
}

#[test]
fn root_scaffolding_goes_and_what_lies_below_shows_again() {
    if !is_root("scaffolding_goes") {
        return;
    }
    let bed = Bed::new(below).left(driver, |root| {
        assert_eq!(std::fs::read(root.join("etc/cache")).unwrap(), b"with the driver");
        write(root.join("made"), "by the command");
    });
    let left = describe(bed.upper());
    let names: Vec<_> = left.keys().map(String::as_str).collect();
    assert_eq!(names, ["etc", "etc/deep", "made"], "{left:?}");
    for dir in ["etc", "etc/deep"] {
        assert_eq!(bed.upper().join(dir).metadata().unwrap().mtime(), 1_000_000);
    }
}

#[test]
fn root_what_the_command_made_of_it_stays() {
    if !is_root("what_the_command_made_of_it") {
        return;
    }
    let bed = Bed::new(below).left(driver, |root| {
        replace(root.join("etc/cache"), "the command's");
        write(root.join("etc/parts/own"), "the command's");
        // As `chown -R` and `chmod -R` do.
        std::os::unix::fs::lchown(root.join("lib/lib.so.1"), Some(7), None).unwrap();
        std::fs::set_permissions(root.join("etc/taken"), PermissionsExt::from_mode(0o600)).unwrap();
        File::open(root.join("etc/parts/driver"))
            .unwrap()
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        replace(root.join("etc/parts/alike"), "a folder");
        write(root.join("etc/deep/kept"), "again");
    });
    let left = describe(bed.upper());
    let names: Vec<_> = left.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "etc",
            "etc/cache",
            "etc/deep",
            "etc/deep/kept",
            "etc/parts",
            "etc/parts/alike",
            "etc/parts/own",
            "etc/taken"
        ]
    );
    let read = |path: &str| std::fs::read_to_string(bed.upper().join(path)).unwrap();
    assert_eq!(
        (read("etc/cache"), read("etc/taken")),
        ("the command's".into(), "old".into())
    );
    let taken = bed.upper().join("etc/taken").metadata().unwrap();
    assert_eq!((taken.mode() & 0o777, taken.mtime()), (0o600, 1_000_000));
    let now = bed.upper().join("etc").metadata().unwrap().mtime();
    assert!(now > 1_000_000, "the command has changed it");
}

#[test]
fn root_what_the_command_has_remade_is_known() {
    if !is_root("what_the_command_has_remade") {
        return;
    }
    let bed = Bed::new(below);
    let survey = Survey::of(bed.upper()).unwrap();
    driver(&bed.root());
    let scaffold = survey.scaffold(bed.upper()).unwrap();
    let (cache, taken) = (Path::new("etc/cache"), Path::new("etc/taken"));
    let is_remade = |path: &Path| scaffold.is_remade(&bed.mount, path).unwrap();
    assert!(!is_remade(cache) && !is_remade(Path::new("no/thing")));
    replace(bed.root().join(cache), "the command's");
    assert!(is_remade(cache) && !is_remade(taken));
    let other = Path::new("etc/other");
    std::os::unix::fs::lchown(bed.root().join(other), Some(7), None).unwrap();
    assert!(!is_remade(other));
    write(bed.root().join(other), "new");
    assert!(is_remade(other));
    unmount(&bed.root()).unwrap();
    scaffold.strike(&bed.mount, &BTreeSet::new()).unwrap();
    let left = describe(bed.upper());
    let names: Vec<_> = left.keys().map(String::as_str).collect();
    assert_eq!(names, ["etc", "etc/cache", "etc/deep", "etc/other"], "{left:?}");
    assert_eq!(
        bed.upper().join("etc/deep").metadata().unwrap().mtime(),
        1_000_000
    );
}

/// What a loader's program makes: a link to the newest version.
fn link(root: &Path, name: &str, target: &str) {
    let path = root.join(name);
    if std::fs::read_link(&path).is_ok_and(|there| there == Path::new(target)) {
        return;
    }
    let _ = std::fs::remove_file(&path);
    symlink(target, path).unwrap();
}

#[test]
fn root_a_link_that_the_command_counts_on_stays_where_its_file_does() {
    if !is_root("a_link_that_the_command_counts_on") {
        return;
    }
    let base = |root: &Path| {
        for file in ["liba.so.1.2", "libb.so.1.1", "libb.so.1.2", "libc.so.1.0"] {
            write(root.join("lib").join(file), file);
        }
        link(root, "lib/libb.so.1", "libb.so.1.1");
        link(root, "lib/libc.so.1", "libc.so.1.0");
    };
    let driver = |root: &Path| {
        write(root.join("lib/libc.so.1.9"), "");
        write(root.join("opt/d/libd.so.1.9"), "");
        for (name, target) in [
            ("lib/liba.so.1", "liba.so.1.2"),
            ("lib/libb.so.1", "libb.so.1.2"),
            ("lib/libc.so.1", "libc.so.1.9"),
            ("opt/d/libd.so.1", "libd.so.1.9"),
            ("lib/libe.so", "liba.so.1.2"),
            ("lib/libf.so", "../lib/liba.so.1.2"),
        ] {
            link(root, name, target);
        }
    };
    let named = [
        "lib/liba.so.1",
        "lib/libb.so.1",
        "lib/libc.so.1",
        "lib/libf.so",
        "opt/d/libd.so.1",
    ];
    let bed = Bed::new(base).left_but(&named, driver, |_| {});
    let left = describe(bed.upper());
    let names: Vec<_> = left.keys().map(String::as_str).collect();
    // The image's own link to its libc.so.1.0 shows again.
    assert_eq!(names, ["lib", "lib/liba.so.1", "lib/libb.so.1"], "{left:?}");
}

#[test]
fn root_a_link_or_an_empty_file_that_the_command_makes_anew_stays() {
    if !is_root("a_link_or_an_empty_file") {
        return;
    }
    let bed = Bed::new(below).left(driver, |root| {
        for name in ["lib/lib.so", "lib/lib.so.1"] {
            std::fs::remove_file(root.join(name)).unwrap();
        }
        symlink("lib.so.1", root.join("lib/lib.so")).unwrap();
        write(root.join("lib/lib.so.1"), "");
    });
    let left = describe(bed.upper());
    assert!(
        left.contains_key("lib/lib.so") && left.contains_key("lib/lib.so.1"),
        "{left:?}"
    );
}

#[test]
fn root_of_a_file_that_the_command_appends_to_only_that_stays() {
    if !is_root("of_a_file_that_the_command_appends_to") {
        return;
    }
    let append = |root: &Path, name: &str, text: &str| {
        let file = std::fs::OpenOptions::new().append(true).open(root.join(name));
        io::Write::write_all(&mut file.unwrap(), text.as_bytes()).unwrap();
    };
    let bed = Bed::new(below).left(
        |root| {
            driver(root);
            append(root, "etc/other", "+driver's");
            write(root.join("etc/edited"), "driver's");
        },
        |root| {
            for name in ["etc/other", "etc/cache", "etc/parts/driver"] {
                append(root, name, "+own");
            }
            write(root.join("etc/edited"), "own, of its own length");
        },
    );
    let read = |path: &str| std::fs::read_to_string(bed.upper().join(path)).unwrap();
    assert_eq!(read("etc/other"), "old+own");
    assert_eq!(read("etc/cache"), "old+own");
    assert_eq!(read("etc/parts/driver"), "+own");
    assert_eq!(read("etc/edited"), "own, of its own length");
}

#[test]
fn root_a_directory_that_the_command_gives_away_stays() {
    if !is_root("a_directory_that_the_command_gives_away") {
        return;
    }
    let bed = Bed::new(below).left(
        |root| {
            write(root.join("opt/a/lib.so.1"), "");
            write(root.join("opt/b/lib.so.1"), "");
        },
        |root| std::os::unix::fs::lchown(root.join("opt/a"), Some(7), None).unwrap(),
    );
    let left = describe(bed.upper());
    assert_eq!(left.keys().collect::<Vec<_>>(), ["opt", "opt/a"], "{left:?}");
}

#[test]
fn root_what_was_there_before_the_scaffolding_is_none() {
    if !is_root("what_was_there_before") {
        return;
    }
    let bed = Bed::new(|_| {});
    std::fs::create_dir(bed.root().join("app")).unwrap();
    let bed = bed.left(
        |root| {
            write(root.join("app/point"), "");
            write(root.join("dev/point"), "");
        },
        |_| {},
    );
    let left = describe(bed.upper());
    assert_eq!(left.keys().collect::<Vec<_>>(), ["app"]);
}
