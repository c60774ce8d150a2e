//! `--secret` and `RUN --mount=type=secret`: who sees it, and where it never is. What BuildKit does, where nothing else is
//! said.

use std::path::Path;

use crate::lab::{BASE, Lab, Said};

const VALUE: &str = "hush-4711-very-secret";

/// Files below a directory that hold some bytes, a database and its log included.
fn holding(dir: &Path, needle: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).unwrap_or_default();
                if bytes.windows(needle.len()).any(|w| w == needle.as_bytes()) {
                    found.push(entry.path().display().to_string());
                }
            }
        }
    }
    found
}

/// A build with the secret `s`, from a file.
fn build(lab: &Lab, more: &[&str], dir: &str) -> Said {
    let file = lab.write("token", VALUE);
    let flag = format!("id=s,src={}", file.display());
    let mut args = vec!["--secret", &flag];
    args.extend(more);
    args.push(dir);
    lab.build(&args)
}

#[test]
fn a_secret_is_a_file_that_only_the_command_sees() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\n\
             RUN --mount=type=secret,id=s wc -c < /run/secrets/s; stat -c '%a %u:%g' /run/secrets/s; ! echo x > /run/secrets/s\n\
             RUN test ! -e /run/secrets && test ! -e /run\n\
             RUN --mount=type=secret,id=s,target=/etc/tok,mode=0440,uid=1000,gid=1001 stat -c 'at %a %u:%g' /etc/tok; test $(cat /etc/tok) = {VALUE_IN_PARTS}\n\
             USER app\n\
             RUN --mount=type=secret,id=s,uid=1000 test -s /run/secrets/s && echo read\n\
             RUN --mount=type=secret,id=s ! cat /run/secrets/s\n\
             RUN --mount=type=secret,target=/a/b/s test ! -r /a/b/s && ls /a/b\n",
            VALUE_IN_PARTS = "hush-4711\"\"-very-secret",
        ),
    );
    let said = build(&lab, &["-t", "t:1"], &dir).ok();
    for line in ["21", "400 0:0", "at 440 1000:1001", "read"] {
        assert!(
            said.out.lines().any(|l| l.ends_with(line)),
            "{line}: {}",
            said.out
        );
    }
    assert!(!said.out.contains(VALUE) && !said.err.contains(VALUE), "{said:?}");
    let left = "ls -d /run /a /etc/tok 2>/dev/null; true";
    assert_eq!(lab.look("t:1", left), "");
    let archive = lab.path("t.tar");
    lab.run(&["save", "-o", archive.to_str().unwrap(), "t:1"]).ok();
    lab.clean();
    std::fs::remove_file(lab.path("token")).unwrap();
    assert_eq!(holding(&lab.path(""), VALUE), [""; 0]);
}

#[test]
fn a_secret_can_be_a_variable_of_the_command() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nENV TOKEN=of-the-image\n\
             RUN --mount=type=secret,id=s,env=TOKEN test ${{#TOKEN}} = 21 && test ! -e /run/secrets\n\
             RUN --mount=type=secret,id=s,env=OTHER,target=/t test ${{#OTHER}} = 21 && test -s /t && echo $TOKEN\n\
             RUN --mount=type=secret,id=nobody,env=TOKEN echo still $TOKEN\n"
        ),
    );
    let said = build(&lab, &["-t", "t:1"], &dir).ok();
    assert!(said.out.contains("still of-the-image"), "{}", said.out);
    assert!(!said.out.contains(VALUE), "{}", said.out);
    let env = &lab.inspect("t:1")["config"]["Env"];
    assert_eq!(env, &serde_json::json!(["PATH=/bin", "TOKEN=of-the-image"]));
    lab.clean();
    std::fs::remove_file(lab.path("token")).unwrap();
    assert_eq!(holding(&lab.path(""), VALUE), [""; 0]);
    // A variable of the caller's, by its own name.
    let one = lab.context(
        "v",
        &format!("FROM {BASE}\nRUN --mount=type=secret,id=MY_TOKEN test -s /run/secrets/MY_TOKEN\n"),
    );
    let mut command = lab.command(&["build", "--secret", "id=MY_TOKEN", &one]);
    let said = Said::from(command.env("MY_TOKEN", "x").output().unwrap());
    said.ok();
}

#[test]
fn a_secret_that_is_missing_is_an_error_only_where_it_is_required_and_the_command_runs() {
    let Some(lab) = Lab::new() else { return };
    let optional = lab.context(
        "o",
        &format!("FROM {BASE}\nRUN --mount=type=secret,id=s test ! -e /run/secrets\n"),
    );
    lab.build(&[&optional]).ok();
    let required = lab.context(
        "r",
        &format!(
            "FROM {BASE}\nRUN --mount=type=secret,id=s,required test -s /run/secrets/s; date +%N > /n\n"
        ),
    );
    let said = lab.build(&[&required]).failed();
    assert!(said.err.contains("--secret id=s"), "{}", said.err);
    build(&lab, &["-t", "t:1"], &required).ok();
    // Neither its value nor its presence is in the key.
    lab.build(&["-t", "t:2", &required]).ok();
    let file = lab.write("other", "another value");
    lab.build(&[
        "-t",
        "t:3",
        "--secret",
        &format!("id=s,src={}", file.display()),
        &required,
    ])
    .ok();
    assert_eq!(lab.inspect("t:1")["id"], lab.inspect("t:2")["id"]);
    assert_eq!(lab.inspect("t:1")["id"], lab.inspect("t:3")["id"]);
    let said = lab
        .build(&["--secret", "id=s,src=/not/there", &required])
        .failed();
    assert!(said.err.contains("/not/there"), "{}", said.err);
    let large = lab.path("large");
    std::fs::write(&large, vec![b'x'; (500 << 10) + 1]).unwrap();
    let flag = format!("id=s,src={}", large.display());
    let said = lab.build(&["--secret", &flag, &required]).failed();
    assert!(said.err.contains("500 KiB"), "{}", said.err);
    // Bytes are a file, and no variable.
    std::fs::write(&large, [0, 255, 10]).unwrap();
    let bytes = |mount: &str| {
        let dir = lab.context(
            "b",
            &format!("FROM {BASE}\nRUN --mount=type=secret,id=s{mount}\n"),
        );
        lab.build(&["--secret", &flag, &dir])
    };
    bytes(" test $(wc -c < /run/secrets/s) = 3").ok();
    let said = bytes(",env=S true").failed();
    assert!(said.err.contains("as a file"), "{}", said.err);
}

#[test]
fn a_killed_builds_secret_is_in_memory_until_the_next_command_and_then_nowhere() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nRUN --mount=type=secret,id=s test -s /run/secrets/s && echo begun; sleep 600\n"
        ),
    );
    let file = lab.write("token", VALUE);
    let mut build = lab.start(
        &["--secret", &format!("id=s,src={}", file.display()), &dir],
        "out",
    );
    lab.wait_for("out", "begun");
    std::fs::remove_file(file).unwrap();
    assert_eq!(holding(&lab.path("root"), VALUE), [""; 0]);
    build.kill().unwrap();
    build.wait().unwrap();
    lab.run(&["images"]).ok();
    lab.clean();
    assert_eq!(holding(&lab.path(""), VALUE), [""; 0]);
}

#[test]
fn a_secret_that_is_a_variable_is_on_a_file_of_roots_while_the_command_runs() {
    use std::os::unix::fs::PermissionsExt;
    let Some(lab) = Lab::new() else { return };
    let file = lab.write("token", VALUE);
    let flag = format!("id=s,src={}", file.display());
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN --mount=type=secret,id=s,env=TOKEN echo begun; sleep 600\n"),
    );
    let mut build = lab.start(&["--secret", &flag, &dir], "out");
    lab.wait_for("out", "begun");
    let found = holding(&lab.path("state/builds"), VALUE);
    let mode = |path: &String| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let modes: Vec<u32> = found.iter().map(mode).collect();
    crate::lab::signal(&build, rustix::process::Signal::INT);
    build.wait().unwrap();
    assert_eq!(modes, [0o600], "{found:?}");
}
