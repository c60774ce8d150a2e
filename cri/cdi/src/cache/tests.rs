//! The folders as vendors' tools leave them.

use super::*;
use crate::types::DeviceKind;

struct Host {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        for name in ["etc", "run"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let cache = Cache::new(vec![
            dir.path().join("etc"),
            dir.path().join("run"),
            dir.path().join("absent"),
        ]);
        Host { dir, cache }
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.dir.path().join(file), text).unwrap();
    }

    /// A file with devices `d…` each setting the variable of its name to `value`.
    fn devices(&self, file: &str, names: &[&str], value: &str) {
        let devices: Vec<_> = names
            .iter()
            .map(|n| format!(r#"{{"name":"{n}","containerEdits":{{"env":["{n}={value}"]}}}}"#))
            .collect();
        self.write(
            file,
            &format!(
                r#"{{"cdiVersion":"0.6.0","kind":"v.com/c","containerEdits":{{"env":["FILE={file}"]}},"devices":[{}]}}"#,
                devices.join(",")
            ),
        );
    }

    fn env(&self, names: &[&str]) -> Result<Vec<String>, ResolveError> {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let edits = self
            .cache
            .resolve(&names, &|_| Err(io::ErrorKind::NotFound.into()))?;
        Ok(edits.into_iter().flat_map(|e| e.env).collect())
    }
}

#[test]
fn general_edits_come_once_before_the_first_device_of_their_file() {
    let host = Host::new();
    host.devices("etc/a.json", &["x", "y"], "1");
    assert_eq!(
        host.env(&["v.com/c=y", "v.com/c=x"]).unwrap(),
        ["FILE=etc/a.json", "y=1", "x=1"]
    );
    assert!(host.env(&[]).unwrap().is_empty());
}

#[test]
fn the_later_folder_wins_and_its_removal_brings_the_earlier_one_back() {
    let host = Host::new();
    host.devices("etc/a.json", &["x"], "static");
    host.devices("run/b.json", &["x"], "dynamic");
    assert_eq!(host.env(&["v.com/c=x"]).unwrap()[1], "x=dynamic");
    fs::remove_file(host.dir.path().join("run/b.json")).unwrap();
    assert_eq!(host.env(&["v.com/c=x"]).unwrap()[1], "x=static");
}

#[test]
fn two_files_of_one_folder_that_define_a_device_make_it_unusable() {
    let host = Host::new();
    host.devices("etc/a.json", &["x", "y"], "1");
    host.devices("etc/b.json", &["x"], "2");
    let error = host.env(&["v.com/c=x"]).unwrap_err().to_string();
    assert!(error.contains("a.json") && error.contains("b.json"), "{error}");
    assert_eq!(host.env(&["v.com/c=y"]).unwrap()[1], "y=1");
    assert_eq!(host.cache.devices(), ["v.com/c=y"]);
    // A file of higher priority settles it.
    host.devices("run/c.json", &["x"], "3");
    assert_eq!(host.env(&["v.com/c=x"]).unwrap()[1], "x=3");
}

#[test]
fn a_bad_file_affects_only_itself_and_is_told_when_its_devices_are_missed() {
    let host = Host::new();
    host.devices("etc/good.json", &["x"], "1");
    host.write("etc/bad.json", "{");
    host.write(
        "etc/worse.yaml",
        "cdiVersion: 9.9.9\nkind: v.com/c\ndevices: []\n",
    );
    fs::create_dir(host.dir.path().join("etc/folder.json")).unwrap();
    host.write("etc/README", "not looked at");
    assert_eq!(host.env(&["v.com/c=x"]).unwrap()[1], "x=1");
    let error = host.env(&["v.com/c=z"]).unwrap_err().to_string();
    assert!(
        error.contains("v.com/c=z is not defined in") && error.contains("bad.json cannot be used"),
        "{error}"
    );
    assert!(error.contains("9.9.9"), "{error}");
    assert_eq!(host.cache.errors().len(), 2);
}

#[test]
fn a_device_that_appears_is_found_at_once() {
    let host = Host::new();
    assert!(host.env(&["v.com/c=x"]).is_err());
    host.devices("run/a.json", &["x"], "1");
    assert!(host.env(&["v.com/c=x"]).is_ok());
}

#[test]
fn names_that_are_not_qualified_are_refused() {
    let host = Host::new();
    assert!(matches!(host.env(&["gpu0"]), Err(ResolveError::Name(_))));
}

#[test]
fn device_nodes_are_completed_from_the_host() {
    let host = Host::new();
    host.write(
        "run/a.yaml",
        "cdiVersion: 0.5.0\nkind: v.com/c\ndevices:\n- name: gpu0\n  containerEdits:\n    deviceNodes:\n    - path: /dev/gpu0\n      hostPath: /dev/host0\n",
    );
    let node = DeviceNode {
        kind: DeviceKind::Char,
        major: 195,
        minor: 3,
        mode: 0o660,
        uid: 0,
        gid: 44,
    };
    let lookup = |path: &Path| {
        assert_eq!(path, Path::new("/dev/host0"));
        Ok(node)
    };
    let edits = host.cache.resolve(&["v.com/c=gpu0".to_owned()], &lookup).unwrap();
    let got = &edits[0].device_nodes[0];
    assert_eq!(
        (got.kind.as_str(), got.major, got.minor, got.file_mode),
        ("c", 195, 3, Some(0o660))
    );

    let missing = |_: &Path| Err(io::ErrorKind::NotFound.into());
    let error = host
        .cache
        .resolve(&["v.com/c=gpu0".to_owned()], &missing)
        .unwrap_err();
    assert!(matches!(error, ResolveError::Edit(EditError::Lookup { .. })));
}

#[test]
fn files_that_are_not_files_do_not_hang_the_reader() {
    let host = Host::new();
    std::os::unix::fs::symlink("/dev/zero", host.dir.path().join("etc/zero.json")).unwrap();
    host.devices("etc/a.json", &["x"], "1");
    assert!(host.env(&["v.com/c=x"]).is_ok());
    assert!(host.cache.errors()[0].1.contains("not a regular file"));
}

#[test]
fn a_device_named_twice_is_given_once() {
    let host = Host::new();
    host.devices("etc/a.json", &["x"], "1");
    assert_eq!(
        host.env(&["v.com/c=x", "v.com/c=x"]).unwrap(),
        ["FILE=etc/a.json", "x=1"]
    );
}

#[test]
fn a_file_of_ten_megabytes_is_told_and_not_read() {
    let host = Host::new();
    host.devices("etc/a.json", &["x"], "1");
    let big = fs::File::create(host.dir.path().join("etc/big.json")).unwrap();
    big.set_len(10 << 20).unwrap();
    assert!(host.env(&["v.com/c=x"]).is_ok());
    let error = host.env(&["v.com/c=y"]).unwrap_err().to_string();
    assert!(
        error.contains("big.json cannot be used: read it: larger than 8 MiB"),
        "{error}"
    );
}

#[test]
fn a_fifo_in_a_files_place_is_not_waited_for() {
    let host = Host::new();
    let fifo = host.dir.path().join("etc/a.json");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let error = read_bounded(&fifo).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(host.env(&["v.com/c=x"]).is_err());
}

#[test]
fn deep_nesting_and_aliases_that_multiply_are_refused_quickly() {
    let host = Host::new();
    host.write("etc/deep.json", &"[".repeat(4 << 20));
    host.write("etc/deep.yaml", &format!("a: {}", "[".repeat(100_000)));
    host.write("etc/bomb.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n");
    host.devices("etc/good.json", &["x"], "1");
    assert!(host.env(&["v.com/c=x"]).is_ok());
    assert_eq!(host.cache.errors().len(), 3);
}

#[test]
fn the_devices_that_can_be_had_are_listed_with_their_files_annotations() {
    let host = Host::new();
    host.write(
        "etc/a.json",
        r#"{"cdiVersion":"0.6.0","kind":"v.com/c","annotations":{"k":"file","l":"file"},"devices":[
            {"name":"y","containerEdits":{"env":["A=1"]}},
            {"name":"x","annotations":{"k":"own"},"containerEdits":{"env":["A=1"]}}]}"#,
    );
    host.devices("etc/b.json", &["twice"], "1");
    host.devices("etc/c.json", &["twice"], "2");
    let listed = host.cache.listed();
    let names: Vec<_> = listed.iter().map(|d| d.name.to_string()).collect();
    assert_eq!(names, ["v.com/c=x", "v.com/c=y"]);
    let of = |n: usize| {
        listed[n]
            .annotations
            .values()
            .map(String::as_str)
            .collect::<Vec<_>>()
    };
    assert_eq!((of(0), of(1)), (vec!["own", "file"], vec!["file", "file"]));
    host.write("etc/bad.json", "{");
    let said = host.cache.unknown("v.com").to_string();
    assert!(
        said.starts_with("CDI device v.com is not defined in ") && said.contains("bad.json cannot be used"),
        "{said}"
    );
}
