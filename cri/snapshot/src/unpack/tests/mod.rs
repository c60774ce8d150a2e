//! Hostile and odd archives, by hand. All of these need root: owners, devices and trusted attributes.

use super::*;
use crate::attributes::is_opaque;
use crate::tar::{Header, Kind, Time};
use crate::testing::{Archive, describe, is_root, paths, set};
use std::os::fd::AsFd;
use std::path::PathBuf;

mod layers;

/// A layer's directory inside an outer one with something worth attacking.
struct Bed {
    outer: tempfile::TempDir,
    layer: PathBuf,
}

impl Bed {
    fn new() -> Bed {
        let outer = tempfile::tempdir().unwrap();
        let layer = outer.path().join("layer");
        std::fs::create_dir(&layer).unwrap();
        std::fs::write(outer.path().join("secret"), "untouched").unwrap();
        Bed { outer, layer }
    }

    fn unpack(&self, archive: Archive) -> Result<Unpacked, UnpackError> {
        let result = unpack(&self.layer, &mut &archive.bytes()[..], &Options::default());
        // Whatever happened, nothing outside the layer did.
        assert_eq!(
            std::fs::read_to_string(self.outer.path().join("secret")).unwrap(),
            "untouched"
        );
        let mut outside: Vec<_> = std::fs::read_dir(self.outer.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        outside.sort();
        assert_eq!(outside, ["layer", "secret"]);
        result
    }

    fn paths(&self) -> Vec<String> {
        paths(&self.layer)
    }

    fn opaque(&self, path: &str) -> bool {
        is_opaque(std::fs::File::open(self.layer.join(path)).unwrap().as_fd()).unwrap()
    }

    fn whiteout(&self, path: &str) -> bool {
        describe(&self.layer)
            .get(path)
            .is_some_and(|text| text.starts_with("whiteout"))
    }
}

#[test]
fn root_names_that_lead_out_are_refused() {
    if !is_root("names_that_lead_out_are_refused") {
        return;
    }
    for name in [
        "../secret",
        "a/../../secret",
        "a/..",
        "..",
        "/etc/passwd",
        "/",
        "./../x",
        "a/b/../../../secret",
    ] {
        let bed = Bed::new();
        for archive in [
            Archive::new().file(name, "evil"),
            Archive::new().dir(name),
            Archive::new().link(name, "x"),
            Archive::new().file("victim", "x").hard("link", name),
            Archive::new().file("victim", "x").hard(name, "victim"),
        ] {
            let error = bed.unpack(archive).unwrap_err();
            assert!(matches!(error, UnpackError::Escape { .. }), "{name}: {error}");
        }
    }
}

#[test]
fn root_whiteouts_of_dots_are_refused_and_odd_ones_ignored() {
    if !is_root("whiteouts_of_dots") {
        return;
    }
    for name in [".wh.", ".wh..", ".wh...", "a/.wh...", "a/.wh.."] {
        let error = Bed::new().unpack(Archive::new().file(name, "")).unwrap_err();
        assert!(matches!(error, UnpackError::Escape { .. }), "{name}: {error}");
    }
    let bed = Bed::new();
    bed.unpack(
        Archive::new()
            .file(".wh..wh.plnk/1.2", "")
            .file(".wh..wh.aufs", "")
            .file("x", ""),
    )
    .unwrap();
    assert_eq!(bed.paths(), ["x"]);
}

#[test]
fn root_a_link_that_climbs_above_the_root_is_refused_and_one_inside_is_followed() {
    if !is_root("a_link_that_climbs") {
        return;
    }
    for target in ["..", "../", "../..", "a/../../..", "/..", "/../secret"] {
        let bed = Bed::new();
        let archive = Archive::new()
            .dir("a")
            .link("evil", target)
            .file("evil/secret", "evil");
        let error = bed.unpack(archive).unwrap_err();
        assert!(matches!(error, UnpackError::Escape { .. }), "{target}: {error}");
    }
    // What a process inside the container would get when it followed the link.
    let bed = Bed::new();
    bed.unpack(
        Archive::new()
            .dir("usr/lib")
            .link("lib", "usr/lib")
            .link("abs", "/usr/lib")
            .link("usr/back", "../usr/../abs")
            .file("lib/one", "1")
            .file("abs/two", "2")
            .file("usr/back/three", "3"),
    )
    .unwrap();
    let found = bed.paths();
    for path in ["usr/lib/one", "usr/lib/two", "usr/lib/three"] {
        assert!(found.iter().any(|p| p == path), "{path} is not in {found:?}");
    }
}

#[test]
fn root_an_absolute_link_writes_below_the_layer_and_nowhere_else() {
    if !is_root("an_absolute_link") {
        return;
    }
    let bed = Bed::new();
    let outside = bed.outer.path().to_str().unwrap().to_owned();
    bed.unpack(Archive::new().link("evil", &outside).file("evil/secret", "evil"))
        .unwrap();
    let inside = bed.layer.join(outside.trim_start_matches('/')).join("secret");
    assert_eq!(std::fs::read_to_string(inside).unwrap(), "evil");
}

#[test]
fn root_a_file_over_a_link_replaces_the_link_and_does_not_write_through_it() {
    if !is_root("a_file_over_a_link") {
        return;
    }
    let bed = Bed::new();
    let secret = bed.outer.path().join("secret");
    let secret = secret.to_str().unwrap();
    bed.unpack(
        Archive::new()
            .link("x", secret)
            .file("x", "mine")
            .link("y", secret)
            .dir("y")
            .link("z", secret)
            .hard("hard", "z")
            .put(
                Header {
                    mode: 0o4777,
                    uid: 7,
                    link: secret.into(),
                    ..Header::new("s", Kind::Symlink)
                },
                b"",
            ),
    )
    .unwrap();
    let tree = describe(&bed.layer);
    assert!(tree["x"].contains("\"mine\""), "{tree:?}");
    assert!(tree["y"].starts_with("Directory"), "{tree:?}");
    assert!(
        tree["hard"].starts_with("Symlink"),
        "a hard link to a link is the link: {tree:?}"
    );
    assert!(tree["s"].contains("7:0"), "{tree:?}");
}

#[test]
fn root_links_in_a_circle_and_through_files_are_errors() {
    if !is_root("links_in_a_circle") {
        return;
    }
    let circle = Archive::new().link("a", "b").link("b", "a").file("a/x", "");
    assert!(matches!(
        Bed::new().unpack(circle),
        Err(UnpackError::Escape { .. })
    ));
    let through = Archive::new().file("a", "").file("a/x", "");
    assert!(matches!(
        Bed::new().unpack(through),
        Err(UnpackError::NotADirectory { .. })
    ));
    // Each link names the one before twice: resolved naively, two to the power of their number.
    let mut bomb = Archive::new().dir("l0");
    for i in 1..60 {
        bomb = bomb.link(&format!("l{i}"), &format!("l{0}/../l{0}", i - 1));
    }
    assert!(matches!(
        Bed::new().unpack(bomb.file("l59/x", "")),
        Err(UnpackError::Escape { .. })
    ));
}

/// CVE-2021-32760.
#[test]
fn root_hard_links_need_a_file_and_carry_no_mode() {
    if !is_root("hard_links_need_a_file") {
        return;
    }
    let bed = Bed::new();
    bed.unpack(
        Archive::new()
            .file("a", "x")
            .put(
                Header {
                    mode: 0o4777,
                    uid: 9,
                    link: b"a".into(),
                    ..Header::new("b", Kind::HardLink)
                },
                b"",
            )
            .hard("a", "a"),
    )
    .unwrap();
    let tree = describe(&bed.layer);
    assert!(tree["a"].starts_with("RegularFile 644 0:0"), "{tree:?}");
    assert!(tree["b"].ends_with("= a"), "{tree:?}");
    let error = Bed::new()
        .unpack(Archive::new().dir("d").hard("h", "d"))
        .unwrap_err();
    assert!(matches!(error, UnpackError::Link { .. }), "{error}");
}

#[test]
fn root_whiteouts_through_links_stay_in_the_layer() {
    if !is_root("whiteouts_through_links") {
        return;
    }
    let bed = Bed::new();
    let outside = bed.outer.path().to_str().unwrap().to_owned();
    bed.unpack(
        Archive::new()
            .dir("real")
            .link("alias", "real")
            .file("alias/.wh.x", "")
            .link("out", &outside)
            .file("out/.wh.secret", ""),
    )
    .unwrap();
    assert!(bed.whiteout("real/x"));
    let error = bed
        .unpack(Archive::new().link("up", "..").file("up/.wh.secret", ""))
        .unwrap_err();
    assert!(matches!(error, UnpackError::Escape { .. }));
}

/// CVE-2026-95838.
#[test]
fn root_opaque_marks_repeated_a_hundred_thousand_times_take_linear_time() {
    if !is_root("opaque_marks_repeated") {
        return;
    }
    let bed = Bed::new();
    let mut archive = Archive::new().dir("d");
    for i in 0..2000 {
        archive = archive.file(&format!("d/{i}"), "");
    }
    let mut bytes = archive.bytes();
    bytes.truncate(bytes.len() - 1024);
    let marker = Archive::new().file("d/.wh..wh..opq", "").bytes();
    for _ in 0..100_000 {
        bytes.extend_from_slice(&marker[..512]);
    }
    let start = std::time::Instant::now();
    unpack(&bed.layer, &mut &bytes[..], &Options::default()).unwrap();
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    assert!(bed.opaque("d"));
}

#[test]
fn root_a_layer_that_holds_more_than_it_may_is_stopped() {
    if !is_root("a_layer_that_holds_more") {
        return;
    }
    let bed = Bed::new();
    let archive = Archive::new().file("a", "12345").file("b", "12345").bytes();
    let limited = |bytes, entries| Options {
        limits: Limits {
            bytes: Some(bytes),
            entries,
            ..Limits::default()
        },
        ..Options::default()
    };
    let error = unpack(&bed.layer, &mut &archive[..], &limited(9, 100)).unwrap_err();
    assert!(
        matches!(
            error,
            UnpackError::TooLarge {
                what: "bytes",
                limit: 9,
                ..
            }
        ),
        "{error}"
    );
    let error = unpack(&bed.layer, &mut &archive[..], &limited(100, 1)).unwrap_err();
    assert!(
        matches!(error, UnpackError::TooLarge { what: "entries", .. }),
        "{error}"
    );
    // A single entry that implies directories without end counts them, too.
    let deep = Archive::new().file(&"d/".repeat(1000), "").bytes();
    let error = unpack(&bed.layer, &mut &deep[..], &limited(100, 500));
    assert!(error.is_ok(), "checked at the next entry");
    let deep = Archive::new()
        .file(&format!("{}x", "e/".repeat(1000)), "")
        .file("y", "")
        .bytes();
    let error = unpack(&bed.layer, &mut &deep[..], &limited(100, 500)).unwrap_err();
    assert!(
        matches!(error, UnpackError::TooLarge { what: "entries", .. }),
        "{error}"
    );
}

#[test]
fn root_names_that_have_to_be_remembered_are_bounded_whatever_they_are() {
    if !is_root("names_that_have_to_be_remembered") {
        return;
    }
    let name = |i: usize| format!("{i:0>200}");
    let of = |put: &dyn Fn(Archive, String) -> Archive| (0..400).map(name).fold(Archive::new(), put).bytes();
    let implied = of(&|a, n| a.file(&format!("{n}/x"), ""));
    let directories = of(&|a, n| a.dir(&n));
    let deleted = of(&|a, n| a.file(&format!(".wh.{n}"), ""));
    let linked = of(&|a, n| a.hard(&n, "in/some/layer/below"));
    let deep = Archive::new().file(&format!("{}x", "d/".repeat(600)), "").bytes();
    for (what, archive) in [
        ("implied", &implied),
        ("directories", &directories),
        ("deleted", &deleted),
        ("linked", &linked),
        ("deep", &deep),
    ] {
        let options = |names| Options {
            limits: Limits {
                names,
                ..Limits::default()
            },
            ..Options::default()
        };
        let bed = Bed::new();
        let error = unpack(&bed.layer, &mut &archive[..], &options(100_000)).unwrap_err();
        assert!(
            matches!(error, UnpackError::TooLarge { limit: 100_000, .. }),
            "{what}: {error}"
        );
        assert!(error.to_string().contains("names"), "{what}: {error}");
        unpack(&Bed::new().layer, &mut &archive[..], &options(10_000_000)).unwrap();
        // What several layers remember counts together.
        let budget = NameBudget::new(500_000);
        let shared = Options {
            names: Some(&budget),
            ..Options::default()
        };
        let all = (0..6).try_for_each(|_| unpack(&Bed::new().layer, &mut &archive[..], &shared).map(drop));
        // Times are set, and forgotten, before the layers below are needed.
        assert_eq!(all.is_ok(), what == "directories", "{what}: {all:?}");
    }
}

#[test]
fn root_links_with_a_thousand_parts_are_too_many() {
    if !is_root("links_with_a_thousand_parts") {
        return;
    }
    let bed = Bed::new();
    let long = |to: &str| format!("{}{to}", "./a/../".repeat(180));
    let mut archive = Archive::new().dir("a").dir("b");
    for i in 0..8 {
        let to = if i == 0 {
            "b".to_owned()
        } else {
            format!("l{}", i - 1)
        };
        archive = archive.link(&format!("l{i}"), &long(&to));
    }
    let error = bed.unpack(archive.file("l7/x", "")).unwrap_err();
    assert!(matches!(error, UnpackError::Escape { .. }), "{error}");
}

#[test]
fn root_a_size_that_lies_and_a_cut_archive_are_errors() {
    if !is_root("a_size_that_lies") {
        return;
    }
    let bytes = Archive::new().file("a", &"x".repeat(5000)).bytes();
    for cut in [100, 512, 600, 5000] {
        let bed = Bed::new();
        let error = unpack(&bed.layer, &mut &bytes[..cut], &Options::default());
        match cut {
            0 => assert!(error.is_ok()),
            _ => assert!(
                matches!(error, Err(UnpackError::Tar(TarError::Truncated { .. }))),
                "{cut}: {error:?}"
            ),
        }
    }
}

#[test]
fn root_unusable_names_are_errors() {
    if !is_root("unusable_names") {
        return;
    }
    let long = "x".repeat(256);
    let longer = "y/".repeat(3000);
    for name in ["", long.as_str(), longer.as_str()] {
        let error = Bed::new().unpack(Archive::new().file(name, "")).unwrap_err();
        assert!(matches!(error, UnpackError::Name { .. }), "{error}");
    }
    let error = Bed::new().unpack(Archive::new().link("l", "")).unwrap_err();
    assert!(matches!(error, UnpackError::Name { .. }), "{error}");
}
