//! What layers mean: everything a tar can say arrives, and marks hide what they should. These need root.

use super::*;

#[test]
fn root_modes_owners_times_attributes_and_devices_arrive() {
    if !is_root("modes_owners_times") {
        return;
    }
    let bed = Bed::new();
    let time = Time {
        seconds: 1_000_000_000,
        nanos: 5,
    };
    let full = |path: &str, kind, mode| Header {
        mode,
        uid: 11,
        gid: 12,
        mtime: time,
        ..Header::new(path, kind)
    };
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    let xattrs = vec![
        (b"security.capability".to_vec(), capability.clone()),
        (b"user.note".to_vec(), b"hi".to_vec()),
        (b"trusted.overlay.redirect".to_vec(), b"/../../etc".to_vec()),
        (b"user.overlay.opaque".to_vec(), b"y".to_vec()),
    ];
    bed.unpack(
        Archive::new()
            .put(
                Header {
                    xattrs: vec![(b"trusted.overlay.opaque".to_vec(), b"y".to_vec())],
                    ..full("d", Kind::Directory, 0o2750)
                },
                b"",
            )
            .put(
                Header {
                    xattrs,
                    ..full("d/suid", Kind::File, 0o4755)
                },
                b"#!",
            )
            .put(
                Header {
                    device: (1, 3),
                    ..full("d/null", Kind::Char, 0o666)
                },
                b"",
            )
            .put(
                Header {
                    device: (7, 0),
                    ..full("d/loop", Kind::Block, 0o660)
                },
                b"",
            )
            .put(full("d/pipe", Kind::Fifo, 0o622), b"")
            .put(
                Header {
                    link: b"/nowhere".to_vec(),
                    ..full("d/link", Kind::Symlink, 0)
                },
                b"",
            ),
    )
    .unwrap();
    let tree = describe(&bed.layer);
    let expected_xattrs = format!("security.capability={} user.note=hi", capability.escape_ascii());
    assert_eq!(tree["d"], "Directory 2750 11:12");
    assert_eq!(
        tree["d/suid"],
        format!("RegularFile 4755 11:12 \"#!\" @1000000000.5 {expected_xattrs}")
    );
    assert_eq!(tree["d/null"], "CharacterDevice 666 11:12 103 @1000000000.5");
    assert_eq!(tree["d/loop"], "BlockDevice 660 11:12 700 @1000000000.5");
    assert_eq!(tree["d/pipe"], "Fifo 622 11:12 0 @1000000000.5");
    assert_eq!(tree["d/link"], "Symlink 777 11:12 -> \"/nowhere\" @1000000000.5");
    assert!(!bed.opaque("d"), "an archive cannot set overlay's own attributes");
    let modified = std::fs::metadata(bed.layer.join("d"))
        .unwrap()
        .modified()
        .unwrap();
    let since = modified.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(
        (since.as_secs(), since.subsec_nanos()),
        (1_000_000_000, 5),
        "set after its entries were made"
    );
}

#[test]
fn root_duplicates_replace_what_they_find() {
    if !is_root("duplicates_replace") {
        return;
    }
    let bed = Bed::new();
    bed.unpack(
        Archive::new()
            .file("x", "old")
            .file("x", "new")
            .dir("d")
            .file("d/kept", "1")
            .put(
                Header {
                    mode: 0o700,
                    ..Header::new("d", Kind::Directory)
                },
                b"",
            )
            .dir("gone")
            .file("gone/deep/er", "2")
            .file("gone", "now a file")
            .link("l", "x")
            .file("l", "not x"),
    )
    .unwrap();
    let tree = describe(&bed.layer);
    assert_eq!(tree.keys().collect::<Vec<_>>(), ["d", "d/kept", "gone", "l", "x"]);
    assert!(
        tree["x"].contains("new") && tree["l"].contains("not x") && tree["d"].contains("700"),
        "{tree:?}"
    );
}

#[test]
fn root_whiteouts_hide_what_is_below_and_never_what_the_layer_holds() {
    if !is_root("whiteouts_hide") {
        return;
    }
    let bed = Bed::new();
    bed.unpack(
        Archive::new()
            .file("dir/.wh.gone", "")
            .file("before", "kept")
            .file(".wh.before", "")
            .file(".wh.after", "")
            .file("after", "kept")
            .file(".wh.tree", "")
            .file("tree/new", "kept")
            .dir("tree2")
            .file("tree2/new", "kept")
            .file(".wh.tree2", "")
            .file("o/kept", "")
            .file("o/.wh..wh..opq", "")
            .file("o/kept2", ""),
    )
    .unwrap();
    assert!(bed.whiteout("dir/gone"));
    let tree = describe(&bed.layer);
    assert!(
        tree["before"].contains("kept") && tree["after"].contains("kept"),
        "{tree:?}"
    );
    assert!(bed.opaque("tree") && bed.opaque("tree2") && bed.opaque("o"));
    for path in ["tree/new", "tree2/new", "o/kept", "o/kept2"] {
        assert!(tree.contains_key(path), "{path}");
    }
}

#[test]
fn root_an_archive_in_overlays_own_form_deletes_too() {
    if !is_root("overlays_own_form") {
        return;
    }
    let bed = Bed::new();
    bed.unpack(
        Archive::new()
            .put(Header::new("gone", Kind::Char), b"")
            .dir("d")
            .put(Header::new("d", Kind::Char), b""),
    )
    .unwrap();
    assert!(bed.whiteout("gone"));
    assert!(bed.opaque("d"));
}

#[test]
fn root_a_plain_archive_goes_below_a_prefix_with_one_owner() {
    if !is_root("a_plain_archive") {
        return;
    }
    let bed = Bed::new();
    std::fs::create_dir_all(bed.layer.join("opt/app")).unwrap();
    std::os::unix::fs::symlink("/opt/app", bed.layer.join("app")).unwrap();
    let archive = Archive::new()
        .file("./.wh.x", "kept")
        .file("/sub/y", "1")
        .hard("sub/z", "/sub/y")
        .bytes();
    let options = Options {
        plain: true,
        absolute_names: true,
        prefix: "/app/",
        owner: Some((5, 6)),
        ..Options::default()
    };
    unpack(&bed.layer, &mut &archive[..], &options).unwrap();
    let tree = describe(&bed.layer);
    assert!(tree["opt/app/.wh.x"].contains("5:6"), "{tree:?}");
    assert!(tree["opt/app/sub/z"].ends_with("= opt/app/sub/y"), "{tree:?}");
    let missing = Archive::new().hard("a", "nothing").bytes();
    let error = unpack(&bed.layer, &mut &missing[..], &options).unwrap_err();
    assert!(matches!(error, UnpackError::Link { .. }), "{error}");
}

#[test]
fn root_implied_directories_take_after_those_below_and_links_bring_their_file_up() {
    if !is_root("implied_directories") {
        return;
    }
    let below = Bed::new();
    below
        .unpack(
            Archive::new()
                .put(
                    Header {
                        mode: 0o1777,
                        uid: 3,
                        gid: 4,
                        mtime: Time {
                            seconds: 77,
                            nanos: 0,
                        },
                        ..Header::new("a", Kind::Directory)
                    },
                    b"",
                )
                .put(
                    Header {
                        mode: 0o750,
                        uid: 5,
                        ..Header::new("a/b", Kind::Directory)
                    },
                    b"",
                )
                .put(
                    Header {
                        mode: 0o640,
                        uid: 8,
                        xattrs: vec![(b"user.k".to_vec(), b"v".to_vec())],
                        ..Header::new("a/b/target", Kind::File)
                    },
                    b"data",
                )
                .link("alias", "/a/b")
                .file("deleted", "bye")
                .dir("cut"),
        )
        .unwrap();
    set(&below.layer.join("a"), "user.dir", b"1");
    let bed = Bed::new();
    let unpacked = bed
        .unpack(
            Archive::new()
                .file("a/b/c/new", "")
                .hard("one", "a/b/target")
                .hard("two", "alias/target")
                .hard("undead", "deleted")
                .file(".wh.deleted", "")
                .file(".wh.cut", "")
                .file("cut/new", ""),
        )
        .unwrap();
    fix_up(&bed.layer, std::slice::from_ref(&below.layer), &unpacked.fix_ups).unwrap();
    let tree = describe(&bed.layer);
    assert_eq!(tree["a"], "Directory 1777 3:4 user.dir=1");
    assert_eq!(tree["a/b"], "Directory 750 5:0");
    assert_eq!(tree["a/b/c"], "Directory 755 0:0");
    assert!(
        tree["a/b/target"].contains("640 8:0 \"data\"") && tree["a/b/target"].contains("user.k=v"),
        "{tree:?}"
    );
    assert!(
        tree["one"].contains("= a/b/target") && tree["two"].contains("= a/b/target"),
        "{tree:?}"
    );
    assert!(tree["undead"].contains("bye"));
    assert!(bed.whiteout("deleted") && bed.opaque("cut"));
    let seconds = |path: &str| {
        let time = std::fs::metadata(bed.layer.join(path))
            .unwrap()
            .modified()
            .unwrap();
        time.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
    };
    assert_eq!((seconds("a"), seconds("a/b/c"), seconds("cut")), (77, 0, 0));
    let nowhere = Bed::new();
    let unpacked = nowhere.unpack(Archive::new().hard("x", "not/here")).unwrap();
    let error = fix_up(
        &nowhere.layer,
        std::slice::from_ref(&below.layer),
        &unpacked.fix_ups,
    )
    .unwrap_err();
    assert!(matches!(error, UnpackError::Link { .. }), "{error}");
}

#[test]
fn root_an_opaque_root_hides_every_name_below() {
    if !is_root("an_opaque_root") {
        return;
    }
    let below = Bed::new();
    below
        .unpack(
            Archive::new()
                .file("f", "")
                .dir("shared")
                .file("shared/old", "")
                .dir("d"),
        )
        .unwrap();
    let bed = Bed::new();
    let unpacked = bed
        .unpack(
            Archive::new()
                .file(".wh..wh..opq", "")
                .file("f", "mine")
                .file("shared/new", ""),
        )
        .unwrap();
    fix_up(&bed.layer, std::slice::from_ref(&below.layer), &unpacked.fix_ups).unwrap();
    assert!(bed.whiteout("d") && bed.opaque("shared"));
    assert!(describe(&bed.layer)["f"].contains("mine"));
}

#[test]
fn root_what_depends_on_deep_layers_below_takes_no_longer_than_its_directories() {
    if !is_root("what_depends_on_deep_layers_below") {
        return;
    }
    // Looked up from the root each, these are six hundred million names.
    let deep = "d/".repeat(1000);
    let (below, bed) = (Bed::new(), Bed::new());
    below
        .unpack(Archive::new().file(&format!("{deep}old"), ""))
        .unwrap();
    let mut archive = Archive::new().file(&format!("{deep}new"), "");
    for i in 0..200 {
        archive = archive.file(&format!("{deep}.wh.{i}"), "");
    }
    archive = archive
        .file(&format!("{deep}.wh.old"), "")
        .hard("link", &format!("{deep}old"));
    let unpacked = bed.unpack(archive).unwrap();
    let start = std::time::Instant::now();
    fix_up(&bed.layer, std::slice::from_ref(&below.layer), &unpacked.fix_ups).unwrap();
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    let at = |name: &str| {
        let root = slipway_sys::root::Root::open(&bed.layer).unwrap();
        root.symlink_metadata(Path::new(&format!("{deep}{name}")))
            .unwrap()
    };
    assert!(at("old").is_some(), "deleted: there is something to hide");
    assert!(at("7").is_none(), "nothing to hide");
}
