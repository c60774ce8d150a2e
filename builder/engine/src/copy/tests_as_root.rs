//! What COPY and ADD make of files, case by case. Needs root: owners are set.

use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use slipway_dockerfile::chmod::Chmod;
use slipway_dockerfile::ignore::Matcher;
use slipway_snapshot::Root;

use super::apply::Destination;
use super::digest::{Selection, digest};
use super::select::{Patterns, resolve};
use super::tree::{All, Owners, Tree};
use super::{CopyError, archive, owner};
use crate::cancel::Cancel;

/// A context and an image's root, both temporary.
struct Case {
    dir: tempfile::TempDir,
    ignore: Option<Matcher>,
}

impl Case {
    /// `None` where we are not root; says so.
    fn new() -> Option<Case> {
        if !rustix::process::geteuid().is_root() {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: copying sets owners, which only root can"
            );
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("context")).unwrap();
        std::fs::create_dir(dir.path().join("image")).unwrap();
        Some(Case { dir, ignore: None })
    }

    fn context(&self, path: &str) -> PathBuf {
        self.dir.path().join("context").join(path)
    }

    fn image(&self, path: &str) -> PathBuf {
        self.dir.path().join("image").join(path)
    }

    fn write(&self, path: &str, text: &str) {
        write(&self.context(path), text);
    }

    fn there(&self, path: &str, text: &str) {
        write(&self.image(path), text);
    }

    fn tree(&self) -> Tree {
        Tree::open(
            &self.context(""),
            self.ignore.clone(),
            Owners::Root,
            "the build context",
        )
        .unwrap()
    }

    fn select(&self, source: &str) -> Result<Vec<Selection>, CopyError> {
        let tree = self.tree();
        let found = resolve(&tree, source)?;
        found
            .into_iter()
            .map(|found| {
                let entries = tree.list(&found, &All)?;
                Ok(Selection {
                    contents_only: found.is_dir(),
                    found,
                    entries,
                })
            })
            .collect()
    }

    fn copy(&self, source: &str, to: &str) -> Result<(), CopyError> {
        self.copy_with(source, to, None, None)
    }

    fn copy_with(
        &self,
        source: &str,
        to: &str,
        chown: Option<&str>,
        chmod: Option<&Chmod>,
    ) -> Result<(), CopyError> {
        let root = Root::open(&self.image("")).unwrap();
        let destination = Destination {
            root: &root,
            path: to,
            is_directory: to.ends_with('/'),
            owner: chown
                .map(|c| owner::resolve(&root, owner::Asked::Chown(c)))
                .transpose()?,
            chmod,
        };
        for selection in self.select(source)? {
            destination.copy(&self.tree(), &selection, &Cancel::new())?;
        }
        Ok(())
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.image(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    fn meta(&self, path: &str) -> std::fs::Metadata {
        self.image(path)
            .symlink_metadata()
            .unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    fn digest(&self, source: &str) -> [u8; 32] {
        digest(&self.tree(), &self.select(source).unwrap(), &Cancel::new()).unwrap()
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_file_goes_into_a_directory_by_its_name_and_elsewhere_by_the_given_one() {
    let Some(case) = Case::new() else { return };
    case.write("f", "text");
    std::fs::create_dir(case.image("there")).unwrap();
    case.copy("/f", "/there").unwrap();
    case.copy("/f", "/new/").unwrap();
    case.copy("/f", "/a/b/name").unwrap();
    for path in ["there/f", "new/f", "a/b/name"] {
        assert_eq!(case.read(path), "text");
    }
    assert_eq!(case.meta("new").mode() & 0o7777, 0o755);
}

#[test]
fn a_directory_gives_its_contents_and_merges_with_what_is_there() {
    let Some(case) = Case::new() else { return };
    case.write("src/a/x", "new");
    case.write("src/top", "t");
    case.there("app/a/y", "old");
    case.there("app/a/x", "old");
    case.copy("/src", "/app").unwrap();
    assert_eq!(
        (case.read("app/a/x"), case.read("app/a/y"), case.read("app/top")),
        ("new".into(), "old".into(), "t".into())
    );
    case.copy("/src/", "/elsewhere").unwrap();
    assert_eq!(case.read("elsewhere/a/x"), "new");
}

#[test]
fn an_existing_directory_keeps_its_owner_and_mode_and_new_ones_take_chowns() {
    let Some(case) = Case::new() else { return };
    case.write("src/sub/f", "x");
    mode(&case.context("src/sub"), 0o700);
    std::fs::create_dir(case.image("app")).unwrap();
    std::os::unix::fs::chown(case.image("app"), Some(7), Some(8)).unwrap();
    mode(&case.image("app"), 0o751);
    case.copy_with("/src", "/app", Some("1000:1001"), None).unwrap();
    assert_eq!(
        (
            case.meta("app").uid(),
            case.meta("app").gid(),
            case.meta("app").mode() & 0o7777
        ),
        (7, 8, 0o751)
    );
    assert_eq!(
        (case.meta("app/sub").uid(), case.meta("app/sub").gid()),
        (1000, 1001)
    );
    assert_eq!(case.meta("app/sub").mode() & 0o7777, 0o700);
    case.copy_with("/src", "/x/y", Some("5"), None).unwrap();
    for path in ["x", "x/y", "x/y/sub", "x/y/sub/f"] {
        assert_eq!((case.meta(path).uid(), case.meta(path).gid()), (5, 5), "{path}");
    }
}

#[test]
fn the_contexts_owners_become_root_and_times_and_modes_stay() {
    let Some(case) = Case::new() else { return };
    case.write("f", "x");
    std::os::unix::fs::chown(case.context("f"), Some(1234), Some(1234)).unwrap();
    mode(&case.context("f"), 0o4750);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    std::fs::File::open(case.context("f"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    case.copy("/f", "/f").unwrap();
    let meta = case.meta("f");
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.mtime()),
        (0, 0, 0o4750, 1_000_000)
    );
}

#[test]
fn chmod_sets_files_and_directories_octal_and_symbolic() {
    let Some(case) = Case::new() else { return };
    case.write("src/f", "x");
    mode(&case.context("src/f"), 0o644);
    case.copy_with("/src", "/a", None, Some(&Chmod::Octal(0o711)))
        .unwrap();
    assert_eq!(
        (case.meta("a").mode() & 0o7777, case.meta("a/f").mode() & 0o7777),
        (0o711, 0o711)
    );
    let symbolic = Chmod::parse("go-r,u+x").unwrap();
    case.copy_with("/src", "/b", None, Some(&symbolic)).unwrap();
    assert_eq!(
        (case.meta("b").mode() & 0o7777, case.meta("b/f").mode() & 0o7777),
        (0o755, 0o700)
    );
}

#[test]
fn a_directory_over_a_link_is_refused_below_the_top_and_followed_at_it() {
    let Some(case) = Case::new() else { return };
    case.write("src/lib/f", "x");
    std::fs::create_dir_all(case.image("usr/lib")).unwrap();
    symlink("usr/lib", case.image("lib")).unwrap();
    let error = case.copy("/src", "/").unwrap_err();
    assert_eq!(error.to_string(), "cannot copy to non-directory: /lib");
    case.copy("/src/lib", "/lib").unwrap();
    assert_eq!(case.read("usr/lib/f"), "x");
}

#[test]
fn a_file_replaces_a_link_but_never_a_directory() {
    let Some(case) = Case::new() else { return };
    case.write("src/f", "new");
    case.there("target", "old");
    std::fs::create_dir(case.image("d")).unwrap();
    symlink("../target", case.image("d/f")).unwrap();
    case.copy("/src", "/d").unwrap();
    assert!(case.meta("d/f").is_file());
    assert_eq!(
        (case.read("d/f"), case.read("target")),
        ("new".into(), "old".into())
    );
    std::fs::create_dir_all(case.image("e/f")).unwrap();
    let error = case.copy("/src", "/e").unwrap_err();
    assert_eq!(error.to_string(), "cannot replace the directory /e/f with a file");
}

#[test]
fn a_destination_behind_links_stays_inside_the_image() {
    let Some(case) = Case::new() else { return };
    case.write("f", "x");
    let outside = case.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, case.image("absolute")).unwrap();
    symlink("../../../outside", case.image("relative")).unwrap();
    symlink("missing/file", case.image("dangling")).unwrap();
    std::fs::create_dir_all(case.image(outside.strip_prefix("/").unwrap().to_str().unwrap())).unwrap();
    case.copy("/f", "/absolute/").unwrap();
    case.copy("/f", "/relative/f").unwrap();
    case.copy("/f", "/dangling").unwrap();
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(case.read("outside/f"), "x");
    assert_eq!(case.read("missing/file"), "x");
    symlink("loop", case.image("loop")).unwrap();
    assert!(case.copy("/f", "/loop").is_err());
}

#[test]
fn a_source_that_is_a_link_is_followed_inside_its_root_and_links_below_stay_links() {
    let Some(case) = Case::new() else { return };
    case.write("real/f", "x");
    symlink("f", case.context("real/link")).unwrap();
    symlink("/real", case.context("dir")).unwrap();
    symlink("/etc/hostname", case.context("escape")).unwrap();
    case.copy("/dir", "/out").unwrap();
    assert_eq!(case.read("out/f"), "x");
    assert!(case.meta("out/link").is_symlink());
    assert!(matches!(
        case.copy("/escape", "/out/"),
        Err(CopyError::NotFound { .. })
    ));
}

#[test]
fn wildcards_match_where_paths_do_not_and_a_missing_literal_is_an_error() {
    let Some(case) = Case::new() else { return };
    case.write("models/small/a.bin", "a");
    case.write("models/small/b.bin", "b");
    case.write("models/small/deep/c.txt", "c");
    case.copy("/models/small/*", "/m/").unwrap();
    assert_eq!(
        (case.read("m/a.bin"), case.read("m/b.bin"), case.read("m/c.txt")),
        ("a".into(), "b".into(), "c".into())
    );
    assert_eq!(case.select("/models/*/[ab].bin").unwrap().len(), 2);
    assert_eq!(case.select("/models/small/nomatch*").unwrap().len(), 0);
    for missing in ["/nothing", "/models/large/*"] {
        assert!(
            matches!(case.select(missing), Err(CopyError::NotFound { .. })),
            "{missing}"
        );
    }
    assert!(matches!(
        case.select("/models/[a"),
        Err(CopyError::BadPattern { .. })
    ));
}

#[test]
fn what_is_ignored_is_not_there_unless_it_is_taken_back() {
    let Some(mut case) = Case::new() else { return };
    for path in ["a.log", "keep.log", "sub/x", "sub/keep", "other/x"] {
        case.write(path, path);
    }
    case.ignore = Some(Matcher::new(&["*.log", "!keep.log", "sub", "!sub/keep", "other"]).unwrap());
    case.copy("/", "/out").unwrap();
    let mut names: Vec<String> = walk(&case.image("out"));
    names.sort();
    assert_eq!(names, ["keep.log", "sub", "sub/keep"]);
    assert!(matches!(case.copy("/a.log", "/"), Err(CopyError::Ignored { .. })));
    assert!(matches!(case.copy("/other", "/"), Err(CopyError::Ignored { .. })));
    assert_eq!(case.select("/*.log").unwrap().len(), 1);
}

fn walk(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(at) = pending.pop() {
        for entry in std::fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            names.push(path.strip_prefix(dir).unwrap().display().to_string());
            if path.is_dir() && !path.is_symlink() {
                pending.push(path);
            }
        }
    }
    names
}

#[test]
fn parents_and_exclude_take_directories_along_only_where_something_is_taken() {
    let Some(case) = Case::new() else { return };
    for path in ["a/b/c/f.txt", "a/b/c/g.bin", "a/d/h.txt", "z/i.bin"] {
        case.write(path, path);
    }
    let tree = case.tree();
    let found = resolve(&tree, "/").unwrap().remove(0);
    let filter = Patterns {
        include: Some(Matcher::new(&["**/*.txt"]).unwrap()),
        exclude: Some(Matcher::new(&["a/d"]).unwrap()),
    };
    let entries = tree.list(&found, &filter).unwrap();
    let paths: Vec<String> = entries.iter().map(|e| e.path.display().to_string()).collect();
    assert_eq!(paths, ["", "a", "a/b", "a/b/c", "a/b/c/f.txt"]);
}

#[test]
fn special_files_are_copied_as_what_they_are_and_sockets_as_empty_files() {
    let Some(case) = Case::new() else { return };
    case.write("src/f", "x");
    std::fs::hard_link(case.context("src/f"), case.context("src/g")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(case.context("src/socket")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        case.context("src/pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    case.digest("/src");
    case.copy("/src", "/out").unwrap();
    assert!(case.meta("out/pipe").file_type().is_fifo());
    assert!(case.meta("out/socket").is_file());
    assert_eq!(case.meta("out/f").ino(), case.meta("out/g").ino());
}

#[test]
fn the_digest_knows_contents_modes_and_names_but_no_times() {
    let Some(case) = Case::new() else { return };
    case.write("src/f", "x");
    let first = case.digest("/src");
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(5);
    std::fs::File::open(case.context("src/f"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    assert_eq!(case.digest("/src"), first);
    std::os::unix::fs::chown(case.context("src/f"), Some(9), None).unwrap();
    assert_eq!(case.digest("/src"), first, "the context's owners do not count");
    mode(&case.context("src/f"), 0o755);
    let executable = case.digest("/src");
    assert_ne!(executable, first);
    case.write("src/f", "y");
    assert_ne!(case.digest("/src"), executable);
    let named = case.digest("/src/f");
    std::fs::rename(case.context("src/f"), case.context("src/g")).unwrap();
    assert_ne!(case.digest("/src/g"), named);
    case.write("src/f", "");
    symlink("f", case.context("src/link")).unwrap();
    let linked = case.digest("/src");
    std::fs::remove_file(case.context("src/link")).unwrap();
    symlink("g", case.context("src/link")).unwrap();
    assert_ne!(case.digest("/src"), linked);
}

#[test]
fn a_file_that_changes_between_listing_and_copying_is_an_error() {
    let Some(case) = Case::new() else { return };
    case.write("f", "first");
    let selection = case.select("/f").unwrap().remove(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    case.write("f", "other");
    let root = Root::open(&case.image("")).unwrap();
    let destination = Destination {
        root: &root,
        path: "/f",
        is_directory: false,
        owner: None,
        chmod: None,
    };
    let error = destination
        .copy(&case.tree(), &selection, &Cancel::new())
        .unwrap_err();
    assert!(matches!(error, CopyError::Changed { .. }), "{error}");
}

#[test]
fn owners_are_looked_up_in_the_image() {
    let Some(case) = Case::new() else { return };
    case.there(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\napp:x:100:200::/home/app:/bin/sh\n",
    );
    case.there("etc/group", "root:x:0:\nstaff:x:50:app\n");
    let root = Root::open(&case.image("")).unwrap();
    for (value, ids) in [
        ("app", (100, 200)),
        ("app:staff", (100, 50)),
        ("1:2", (1, 2)),
        ("7", (7, 7)),
        ("root", (0, 0)),
        ("7:staff", (7, 50)),
        ("app:0", (100, 0)),
    ] {
        assert_eq!(
            owner::resolve(&root, owner::Asked::Chown(value)).unwrap(),
            ids,
            "{value}"
        );
    }
    let error = owner::resolve(&root, owner::Asked::Chown("nobody"))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "--chown=nobody: the image's /etc/passwd has no nobody");
    assert!(owner::resolve(&root, owner::Asked::Chown("app:nogroup")).is_err());
    for out_of_range in ["2147483648", "4294967296", "99999999999999999999"] {
        assert!(matches!(
            owner::resolve(&root, owner::Asked::Chown(out_of_range)),
            Err(CopyError::BadOwner { .. })
        ));
    }
}

#[test]
fn archives_are_unpacked_by_content_and_others_are_copied() {
    let Some(case) = Case::new() else { return };
    let mut tar = Vec::new();
    {
        use slipway_snapshot::tar::{Header, Kind, Writer};
        let mut writer = Writer::new(&mut tar);
        let mut dir = Header::new("d/", Kind::Directory);
        dir.mode = 0o750;
        writer.entry(&dir).unwrap();
        let mut file = Header::new("d/f", Kind::File);
        (file.mode, file.uid, file.gid, file.size) = (0o640, 11, 12, 4);
        file.mtime.seconds = 1_000_000;
        writer.file(&file, &mut &b"text"[..]).unwrap();
        let mut link = Header::new("d/l", Kind::Symlink);
        link.link = b"../../../../etc".to_vec();
        writer.entry(&link).unwrap();
        let mut through = Header::new("d/l/through", Kind::File);
        through.mode = 0o600;
        writer.file(&through, &mut &b""[..]).unwrap();
        writer.finish().unwrap();
    }
    std::fs::write(case.context("a.tar"), &tar).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, &tar).unwrap();
    std::fs::write(case.context("no-suffix"), gz.finish().unwrap()).unwrap();
    let mut plain = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut plain, b"not a tar").unwrap();
    std::fs::write(case.context("text.gz"), plain.finish().unwrap()).unwrap();

    let root = Root::open(&case.image("")).unwrap();
    let unpack = |source: &str, to: &str, owner| {
        let destination = Destination {
            root: &root,
            path: to,
            is_directory: true,
            owner,
            chmod: None,
        };
        let selection = case.select(source).unwrap().remove(0);
        archive::unpack(&destination, &case.tree(), &selection, &Cancel::new())
    };
    assert!(unpack("/a.tar", "/plain/", None).unwrap());
    assert_eq!(case.read("plain/d/f"), "text");
    let meta = case.meta("plain/d/f");
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.mtime()),
        (11, 12, 0o640, 1_000_000)
    );
    assert_eq!(case.meta("plain/d").mode() & 0o7777, 0o750);
    assert!(
        case.image("plain/etc/through").exists(),
        "a link in the archive leads no further than the destination"
    );
    assert!(unpack("/no-suffix", "/packed", Some((3, 4))).unwrap());
    assert_eq!(
        (case.meta("packed/d/f").uid(), case.meta("packed/d/f").gid()),
        (3, 4)
    );
    assert!(!unpack("/text.gz", "/", None).unwrap());
}

/// A tar of one directory with one file in it, and whatever else `more` writes.
fn tar(more: impl FnOnce(&mut slipway_snapshot::tar::Writer<&mut Vec<u8>>)) -> Vec<u8> {
    use slipway_snapshot::tar::{Header, Kind, Writer};
    let mut tar = Vec::new();
    let mut writer = Writer::new(&mut tar);
    let mut dir = Header::new("d/", Kind::Directory);
    dir.mode = 0o755;
    writer.entry(&dir).unwrap();
    let mut file = Header::new("d/f", Kind::File);
    (file.mode, file.size) = (0o644, 4);
    writer.file(&file, &mut &b"text"[..]).unwrap();
    more(&mut writer);
    writer.finish().unwrap();
    tar
}

fn unpack(case: &Case, source: &str) -> Result<bool, CopyError> {
    let root = Root::open(&case.image("")).unwrap();
    let destination = Destination {
        root: &root,
        path: "/to/",
        is_directory: true,
        owner: None,
        chmod: None,
    };
    let selection = case.select(source).unwrap().remove(0);
    archive::unpack(&destination, &case.tree(), &selection, &Cancel::new())
}

/// Packs by a program or a library; `None`, loudly, where the program is not installed.
fn packed(how: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    use std::io::Write;
    match how {
        "gz" => {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gz.write_all(bytes).unwrap();
            return Some(gz.finish().unwrap());
        }
        "zst" => {
            let mut zst = zstd::Encoder::new(Vec::new(), 1).unwrap();
            zst.include_checksum(true).unwrap();
            zst.write_all(bytes).unwrap();
            return Some(zst.finish().unwrap());
        }
        _ => {}
    }
    let program = if how == "xz" { "xz" } else { "bzip2" };
    let child = std::process::Command::new(program)
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {program} is not installed");
        return None;
    };
    let (mut input, bytes) = (child.stdin.take().unwrap(), bytes.to_vec());
    let feeding = std::thread::spawn(move || input.write_all(&bytes));
    let out = child.wait_with_output().unwrap().stdout;
    feeding.join().unwrap().unwrap();
    Some(out)
}

#[test]
fn a_damaged_or_cut_archive_is_an_error_also_where_only_its_sum_says_so() {
    let Some(case) = Case::new() else { return };
    let whole = tar(|_| {});
    for how in ["gz", "zst", "xz", "bz2"] {
        let Some(good) = packed(how, &whole) else { continue };
        let name = format!("a.tar.{how}");
        std::fs::write(case.context(&name), &good).unwrap();
        assert!(unpack(&case, &format!("/{name}")).unwrap(), "{how}");
        // The sum in the tail does not fit, and the tail is not all there.
        let mut wrong = good.clone();
        let at = wrong.len() - if how == "xz" { 20 } else { 6 };
        wrong[at] ^= 0x55;
        let cut = good[..good.len() - 3].to_vec();
        for (what, bytes) in [("wrong", wrong), ("cut", cut)] {
            std::fs::write(case.context(&name), bytes).unwrap();
            // One block that is damaged gives nothing at all: then it is no archive, and is copied.
            match unpack(&case, &format!("/{name}")) {
                Err(CopyError::Archive { .. }) => {}
                Ok(false) if how != "gz" => {}
                other => panic!("{how} {what}: {other:?}"),
            }
        }
    }
    let mut long = vec![0; 3 << 20];
    let mut state = 1u32;
    for byte in &mut long {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_be_bytes()[0];
    }
    let whole = tar(|writer| {
        let mut file = slipway_snapshot::tar::Header::new("d/long", slipway_snapshot::tar::Kind::File);
        (file.mode, file.size) = (0o644, long.len() as u64);
        writer.file(&file, &mut &long[..]).unwrap();
    });
    for (how, by) in [("gz", ""), ("zst", ""), ("xz", "xz"), ("bz2", "")] {
        let Some(mut bytes) = packed(how, &whole) else {
            continue;
        };
        let at = bytes.len() - if how == "zst" { 2 } else { 6 };
        bytes[at] ^= 0x55;
        std::fs::write(case.context("long.tar"), bytes).unwrap();
        let error = unpack(&case, "/long.tar").unwrap_err();
        assert!(
            crate::chain(&error).to_string().contains(by),
            "{how}: {}",
            crate::chain(&error)
        );
    }
}

#[test]
fn what_overlay_would_take_for_its_own_marks_does_not_get_into_a_layer() {
    use slipway_snapshot::tar::{Header, Kind};
    let Some(case) = Case::new() else { return };
    let marked = tar(|writer| {
        let mut dir = Header::new("opaque/", Kind::Directory);
        dir.mode = 0o755;
        dir.xattrs = vec![
            (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
            (b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec()),
            (b"user.overlay.opaque".to_vec(), b"y".to_vec()),
            (b"user.kept".to_vec(), b"v".to_vec()),
        ];
        writer.entry(&dir).unwrap();
    });
    std::fs::write(case.context("marked.tar"), marked).unwrap();
    assert!(unpack(&case, "/marked.tar").unwrap());
    let mut names = vec![0u8; 4096];
    let size = rustix::fs::listxattr(case.image("to/opaque"), &mut names[..]).unwrap();
    let names = String::from_utf8_lossy(&names[..size]).into_owned();
    assert!(!names.contains("overlay"), "{names:?}");
    let device = tar(|writer| {
        let mut header = Header::new("d/gone", Kind::Char);
        (header.mode, header.device) = (0o600, (0, 0));
        writer.entry(&header).unwrap();
    });
    std::fs::write(case.context("device.tar"), device).unwrap();
    let error = unpack(&case, "/device.tar").unwrap_err();
    assert!(
        crate::chain(&error).to_string().contains("0:0"),
        "{}",
        crate::chain(&error)
    );
    let node = case.context("node");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &node,
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let error = case.copy("/node", "/to/").unwrap_err();
    assert!(
        crate::chain(&error).to_string().contains("0:0"),
        "{}",
        crate::chain(&error)
    );
}

#[test]
fn a_directory_of_an_archive_that_is_replaced_later_is_forgotten() {
    let Some(case) = Case::new() else { return };
    use slipway_snapshot::tar::{Header, Kind, Time};
    let entry = |path: &str, kind: Kind, link: &str| Header {
        mode: 0o755,
        link: link.into(),
        mtime: Time {
            seconds: 1_000_000_000,
            nanos: 0,
        },
        ..Header::new(path, kind)
    };
    // A directory, one inside it, and what takes its place: a file, a link to a directory that has its own time.
    for (n, (kind, link)) in [(Kind::File, ""), (Kind::Symlink, "../usr")]
        .into_iter()
        .enumerate()
    {
        let to = format!("to{n}");
        case.there(&format!("usr/{to}/x"), "");
        let before = case.meta("usr").modified().unwrap();
        let inside = case.meta(&format!("usr/{to}")).modified().unwrap();
        let bytes = tar(|writer| {
            for header in [
                entry("d", Kind::Directory, ""),
                entry(&format!("d/{to}"), Kind::Directory, ""),
                entry("d", kind, link),
                entry("alias", Kind::Symlink, "e"),
                entry("e", Kind::Directory, ""),
                entry("alias/f", Kind::Directory, ""),
                entry("e/f", Kind::File, ""),
                entry("g", Kind::Directory, ""),
            ] {
                writer.file(&header, &mut &b""[..]).unwrap();
            }
        });
        std::fs::write(case.context("a.tar"), bytes).unwrap();
        assert!(unpack(&case, "a.tar").unwrap());
        assert_eq!(case.meta("usr").modified().unwrap(), before);
        assert_eq!(case.meta(&format!("usr/{to}")).modified().unwrap(), inside);
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        assert_eq!(case.meta("to/g").modified().unwrap(), old);
    }
}

#[test]
fn what_is_ignored_cannot_be_reached_through_links() {
    let Some(mut case) = Case::new() else { return };
    case.write("hidden/secret", "s");
    case.write("open/file", "f");
    case.write("plain", "p");
    symlink("hidden", case.context("to-hidden")).unwrap();
    symlink("open", case.context("ignored-link")).unwrap();
    symlink("ignored-link", case.context("by-link")).unwrap();
    symlink("open", case.context("shown")).unwrap();
    symlink("/plain", case.context("absolute")).unwrap();
    let patterns = ["hidden", "ignored-link", "shown/file", "nothing/../open/none"].map(str::to_owned);
    case.ignore = Some(Matcher::new(&patterns).unwrap());
    let tree = case.tree();
    let find = |path: &str| tree.find(Path::new(path)).unwrap().is_some();
    for hidden in [
        "hidden/secret",
        "to-hidden",
        "to-hidden/secret",
        "ignored-link",
        "ignored-link/file",
        "by-link",
        "by-link/file",
        "shown/file",
        "shown/../by-link/file",
    ] {
        assert!(!find(hidden), "{hidden}");
        let error = resolve(&tree, hidden).unwrap_err();
        assert!(matches!(error, CopyError::Ignored { .. }), "{hidden}: {error}");
    }
    for there in [
        "open/file",
        "shown",
        "plain",
        "absolute",
        "/absolute",
        "shown/../plain",
    ] {
        assert!(find(there), "{there}");
    }
    // A wildcard names the links themselves.
    let names = resolve(&tree, "*").unwrap();
    let mut names: Vec<_> = names.iter().map(|found| found.name.to_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["absolute", "open", "plain", "shown"]);
}

#[test]
fn a_tree_of_endless_depth_is_refused() {
    let Some(case) = Case::new() else { return };
    let mut path = case.context("deep");
    for _ in 0..401 {
        path.push("d");
    }
    std::fs::create_dir_all(&path).unwrap();
    let tree = case.tree();
    let found = tree.find(Path::new("deep")).unwrap().unwrap();
    let error = tree.list(&found, &All).unwrap_err();
    assert!(matches!(error, CopyError::TooDeep { .. }), "{error}");
}
