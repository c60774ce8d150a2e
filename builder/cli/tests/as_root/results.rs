//! Images, caches and messages.

use std::time::{Duration, Instant};

use crate::lab::{BASE, Lab};

#[test]
fn the_configuration_says_what_the_dockerfile_says() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nARG V=1\nENV A=x B=\"y z\"\nWORKDIR /app\nRUN true\nCOPY Dockerfile .\nEXPOSE 80\nLABEL l=m\n\
             ENTRYPOINT [ \"python\", \"-u\", \"x.py\" ]\nCMD [\"--steps\", \"1\"]\nUSER app\nSTOPSIGNAL SIGINT\n"
        ),
    );
    lab.build(&["-t", "t:1", "--label", "extra=1", &dir]).ok();
    let image = lab.inspect("t:1");
    let config = &image["config"];
    assert_eq!(config["Env"], serde_json::json!(["PATH=/bin", "A=x", "B=y z"]));
    assert_eq!(config["Entrypoint"], serde_json::json!(["python", "-u", "x.py"]));
    assert_eq!(config["Cmd"], serde_json::json!(["--steps", "1"]));
    assert_eq!(config["WorkingDir"], "/app");
    assert_eq!(
        (&config["User"], &config["StopSignal"]),
        (&"app".into(), &"SIGINT".into())
    );
    assert_eq!(config["Labels"], serde_json::json!({ "extra": "1", "l": "m" }));
    let history = image["history"].as_array().unwrap();
    let layers = history.iter().filter(|h| h["empty_layer"] != true).count();
    assert_eq!(layers, image["layers"].as_array().unwrap().len());
    assert_eq!(layers, 4, "base, WORKDIR, RUN and COPY");
    let by: Vec<&str> = history
        .iter()
        .map(|h| h["created_by"].as_str().unwrap())
        .collect();
    assert!(by.contains(&"ENV A=x B=y z"), "{by:?}");
    assert!(by.contains(&"COPY Dockerfile . # buildkit"), "{by:?}");
    assert!(history.iter().all(|h| h["created"].is_string()), "{history:?}");
}

#[test]
fn an_epoch_makes_the_same_image_on_two_roots() {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let Some(lab) = Lab::bare() else { return };
        let dir = lab.context(
            "c",
            "FROM scratch AS base\nCOPY bin /bin\n\
             FROM base AS make\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"mkdir /o; echo x > /o/f; /bin/busybox ln /o/f /o/g\"]\n\
             FROM base\nWORKDIR /w\nCOPY --from=make /o .\nCOPY f /sub/dir/\nRUN [\"/bin/busybox\", \"touch\", \"/new\", \"/bin/busybox\"]\nENV X=y\n",
        );
        lab.write("c/f", "text");
        std::fs::create_dir_all(lab.path("c/bin")).unwrap();
        std::fs::copy("/bin/busybox", lab.path("c/bin/busybox")).unwrap();
        let mut command = lab.command(&["build", "-q", &dir]);
        let output = command.env("SOURCE_DATE_EPOCH", "1700000000").output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let id = String::from_utf8(output.stdout).unwrap();
        let image = lab.inspect(id.trim());
        assert_eq!(image["created"], "2023-11-14T22:13:20Z");
        ids.push(id);
        std::thread::sleep(Duration::from_millis(1100));
    }
    assert_eq!(ids[0], ids[1]);
}

#[test]
fn files_of_a_stage_that_was_made_anew_are_taken_anew() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS a\nRUN cat /proc/sys/kernel/random/uuid > /a; echo same > /same\nFROM {BASE}\n\
             RUN --mount=from=a,source=/same,target=/m cat /proc/sys/kernel/random/uuid > /kept\nCOPY --from=a /a /copied\n\
             RUN --mount=from=a,source=/a,target=/m cat /m > /mounted\n"
        ),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    // With nothing new, nothing is done.
    let said = lab.build(&["-t", "t:again", &dir]).ok();
    assert_eq!(
        lab.inspect("t:again")["id"],
        lab.inspect("t:1")["id"],
        "{}",
        said.out
    );
    lab.build(&["--no-cache", "--target", "a", "-t", "a:1", &dir])
        .ok();
    lab.build(&["-t", "t:2", &dir]).ok();
    let made = lab.look("a:1", "cat /a");
    assert_eq!(made.lines().count(), 1, "{made}");
    assert_ne!(lab.look("t:1", "cat /copied"), made);
    assert_eq!(lab.look("t:2", "cat /copied"), made);
    assert_eq!(lab.look("t:2", "cat /mounted"), made);
    // It goes by what is mounted, not by all of the stage.
    let kept = |name: &str| lab.look(name, "cat /kept");
    assert_eq!(kept("t:1"), kept("t:2"));
}

#[test]
fn an_id_is_no_place_to_push_to() {
    let Some(lab) = Lab::new() else { return };
    let id = lab.inspect(BASE)["id"].as_str().unwrap().to_owned();
    let digits = id.strip_prefix("sha256:").unwrap();
    let said = lab.run(&["push", &digits[..12]]).failed();
    let text = "is an image's id; give it a name with `slipway tag` first";
    assert!(said.err.contains(text), "{}", said.err);
    let said = lab.run(&["push", digits]).failed();
    assert!(said.err.contains("is an image id, not a name"), "{}", said.err);
}

#[test]
fn a_rebuild_from_the_cache_is_the_same_image() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS a\nRUN date +%N > /a\nFROM {BASE}\nCOPY --from=a /a /a\nRUN date +%N > /b\n"
        ),
    );
    let first = lab.run(&["build", "-q", &dir]).ok().out;
    assert_eq!(lab.run(&["build", "-q", &dir]).ok().out, first);
    let other = lab.run(&["build", "-q", "--no-cache", &dir]).ok().out;
    assert_ne!(other, first);
    assert_eq!(
        lab.run(&["build", "-q", &dir]).ok().out,
        other,
        "the newest result counts"
    );
}

#[test]
fn what_a_stage_changes_besides_the_files_taken_does_not_matter() {
    let Some(lab) = Lab::new() else { return };
    let text = |n: u32| {
        format!(
            "FROM {BASE} AS a\nRUN echo same > /taken; echo {n} > /other\nFROM {BASE}\nCOPY --from=a /taken /taken\nRUN echo after\n"
        )
    };
    let dir = lab.context("c", &text(1));
    lab.build(&[&dir]).ok();
    lab.context("c", &text(2));
    let said = lab.build(&[&dir]).ok();
    assert_eq!(
        said.out.matches("CACHED").count(),
        2,
        "the copy and what follows: {}",
        said.out
    );
}

#[test]
fn two_builds_at_once_make_a_step_once() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context("c", &format!("FROM {BASE}\nRUN sleep 1; date +%s%N > /stamp\n"));
    let builds: Vec<_> = ["o1", "o2", "o3"]
        .iter()
        .map(|out| lab.start(&["-t", out, &dir], out))
        .collect();
    for mut build in builds {
        assert!(build.wait().unwrap().success());
    }
    let ids: Vec<String> = ["o1", "o2", "o3"]
        .iter()
        .map(|name| lab.inspect(name)["id"].to_string())
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[test]
fn a_failure_stops_the_other_stages_and_says_where() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE} AS slow\nRUN sleep 60\nFROM {BASE}\nRUN echo the reason; exit 42\nCOPY --from=slow /x /\n"),
    );
    let began = Instant::now();
    let said = lab.build(&["-t", "t:1", &dir]).failed();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    for want in [
        "Dockerfile:4",
        "> 4 | RUN echo the reason; exit 42",
        "code 42",
        "the reason",
    ] {
        assert!(said.err.contains(want), "{want:?} is not in\n{}", said.err);
    }
    lab.run(&["inspect", "t:1"]).failed();
}

#[test]
fn finished_steps_of_a_failed_build_are_kept() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context("c", &format!("FROM {BASE}\nRUN date > /d\nRUN exit 1\n"));
    lab.build(&[&dir]).failed();
    lab.context("c", &format!("FROM {BASE}\nRUN date > /d\nRUN exit 0\n"));
    assert_eq!(lab.build(&[&dir]).ok().out.matches("CACHED").count(), 1);
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let Some(lab) = Lab::new() else { return };
    for (line, want) in [
        ("RUN true\nRUN --mount=type=ssh true", "type=ssh"),
        ("RUN true\nADD https://example.org/x /x", "https://example.org/x"),
        ("COPY missing /x", "missing: not found in the build context"),
        ("COPY nomatch* /x/", "nomatch*"),
        ("COPY --chown=nobody Dockerfile /x", "/etc/passwd has no nobody"),
        (
            "RUN --device=a.b/c=d,required true",
            "CDI device a.b/c=d is not defined in",
        ),
    ] {
        let dir = lab.context("c", &format!("FROM {BASE}\n{line}\n"));
        let said = lab.build(&["--no-cache", &dir]).failed();
        assert!(said.err.contains(want), "{line}: {}", said.err);
        assert!(!said.out.contains("RUN true\n"), "{line}: {}", said.out);
    }
    let said = lab.build(&[]).failed();
    assert!(said.err.contains("build context"), "{}", said.err);
    let said = lab.build(&["--build-arg", "=x", "."]).failed();
    assert!(said.err.contains("--build-arg"), "{}", said.err);
    let dir = lab.context("c", "FROM nowhere.invalid/none:1\n");
    let said = lab.build(&[&dir]).failed();
    assert!(
        said.err.contains("nowhere.invalid/none:1") && said.err.contains("Dockerfile:1"),
        "{}",
        said.err
    );
}

#[test]
fn a_misspelt_root_is_not_an_empty_store() {
    let Some(lab) = Lab::new() else { return };
    let wrong = lab.path("rooot");
    for args in [
        &["images"][..],
        &["prune"],
        &["inspect", BASE],
        &["rmi", BASE],
        &["push", BASE],
    ] {
        let said: super::lab::Said = lab.command_at(&wrong, args).output().unwrap().into();
        let said = said.failed();
        assert!(
            said.err.contains("there is no store at") && said.err.contains("rooot"),
            "{}",
            said.err
        );
    }
    assert!(!wrong.exists(), "nothing is made there");
}

#[test]
fn names_come_and_go_and_the_image_with_the_last() {
    let Some(lab) = Lab::new() else { return };
    lab.run(&["tag", BASE, "other/name:2"]).ok();
    let id = lab.inspect(BASE)["id"].as_str().unwrap().to_owned();
    assert_eq!(lab.inspect("other/name:2")["id"], id.as_str());
    assert!(lab.run(&["rmi", &id]).failed().err.contains("several names"));
    // Every column says what it is, and a prune that frees nothing says why.
    assert!(
        lab.run(&["images"])
            .ok()
            .out
            .lines()
            .next()
            .unwrap()
            .ends_with("STATE")
    );
    lab.run(&["prune"]).ok();
    let pruned = lab.run(&["prune"]).ok().out;
    assert!(
        pruned.starts_with("freed 0 B\n") && pruned.contains("belongs to images (1:"),
        "{pruned}"
    );
    lab.run(&["rmi", "other/name:2"]).ok();
    lab.run(&["rmi", BASE]).ok();
    let said = lab.run(&["inspect", BASE]).failed();
    assert!(said.err.contains("no image"), "{}", said.err);
    assert_eq!(lab.run(&["images", "-q"]).ok().out, "");
    lab.run(&["prune"]).ok();
    assert_eq!(
        std::fs::read_dir(lab.path("root/snapshots")).unwrap().count(),
        1,
        "only the empty one"
    );
}

#[test]
fn quiet_builds_print_the_id_and_archives_carry_the_image() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context("c", &format!("FROM {BASE}\nRUN echo x > /x\n"));
    let iid = lab.path("iid").display().to_string();
    let id = lab
        .run(&["build", "-q", "-t", "t:1", "--iidfile", &iid, &dir])
        .ok()
        .out;
    assert_eq!(std::fs::read_to_string(&iid).unwrap(), id.trim());
    for format in ["docker", "oci"] {
        let tar = lab.path(&format!("{format}.tar")).display().to_string();
        lab.run(&["save", "--format", format, "-o", &tar, "t:1"]).ok();
        let Some(other) = Lab::bare() else { return };
        assert!(other.run(&["load", "-i", &tar]).ok().out.contains("t:1"));
        assert_eq!(other.inspect("t:1")["id"], id.trim());
    }
}

#[test]
fn a_layer_that_cannot_be_made_stops_the_build_and_says_which_step() {
    let Some(lab) = Lab::new() else { return };
    for after in ["RUN echo next begun; sleep 60; echo next ended\n", ""] {
        let dir = lab.context(
            "c",
            &format!("FROM {BASE}\nRUN touch /ok\nRUN touch /.wh.bad\n{after}"),
        );
        let began = Instant::now();
        let said = lab.build(&["-t", "t:1", &dir]).failed();
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        for want in ["Dockerfile:3", "> 3 | RUN touch /.wh.bad", ".wh."] {
            assert!(said.err.contains(want), "{want:?} is not in\n{}", said.err);
        }
        lab.run(&["inspect", "t:1"]).failed();
    }
}

#[test]
fn a_build_that_reads_stdin_can_be_interrupted() {
    let Some(lab) = Lab::new() else { return };
    let mut start = vec![0u8; 2048];
    start[..9].copy_from_slice(b"FROM none");
    start[257..262].copy_from_slice(b"ustar");
    start[148..156].fill(b' ');
    let sum: u32 = start[..512].iter().map(|byte| u32::from(*byte)).sum();
    start[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    for (args, input) in [
        (&["build", "-"][..], &b""[..]),
        (&["build", "-"], b"FROM scratch\n"),
        (&["build", "-"], &start),
        (&["build", "-f", "-", "."], b"FROM scratch\n"),
    ] {
        for sent in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
            let mut child = lab
                .command(args)
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdin = child.stdin.take().unwrap();
            std::io::Write::write_all(&mut stdin, input).unwrap();
            // It reads: its handlers are there, and nothing more comes.
            let caught = |pid: u32| {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                let mask = status
                    .lines()
                    .find_map(|l| l.strip_prefix("SigCgt:"))
                    .unwrap()
                    .trim();
                u64::from_str_radix(mask, 16).unwrap() & (1 << 14) != 0
            };
            let began = Instant::now();
            while !caught(child.id()) {
                assert!(began.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(10));
            }
            crate::lab::signal(&child, sent);
            let began = Instant::now();
            while child.try_wait().unwrap().is_none() {
                assert!(began.elapsed() < Duration::from_secs(20), "{args:?} does not end");
                std::thread::sleep(Duration::from_millis(20));
            }
            drop(stdin);
            let said = crate::lab::Said::from(child.wait_with_output().unwrap());
            assert_eq!(said.code, 130, "{}", said.err);
        }
    }
}

#[test]
fn nothing_of_an_image_or_a_dockerfile_speaks_to_the_terminal() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nENV X=\"\u{1b}[31mred\u{7}\"\nRUN echo ${{X}} \u{1b}]0;title\u{7} && exit 3\n"
        ),
    );
    let said = lab.build(&["--no-cache", &dir]).failed();
    for text in [&said.out, &said.err] {
        assert!(!text.contains(['\u{1b}', '\u{7}']), "{text:?}");
    }
    assert!(
        said.err.contains("exited with code") && said.out.contains("RUN echo"),
        "{}",
        said.err
    );
}

#[test]
fn an_interrupted_save_leaves_no_file() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN dd if=/dev/urandom of=/big bs=1M count=64\n"),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    let (out, tar) = (lab.path("out"), lab.path("out/t.tar").display().to_string());
    std::fs::create_dir(&out).unwrap();
    let mut save = lab.command(&["save", "-o", &tar, "t:1"]).spawn().unwrap();
    let began = Instant::now();
    while std::fs::read_dir(&out).unwrap().next().is_none() {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    crate::lab::signal(&save, rustix::process::Signal::INT);
    let ended = save.wait().unwrap();
    let left: Vec<_> = std::fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    match ended.code() {
        Some(0) => assert_eq!(left, ["t.tar"], "it was done before"),
        code => assert!(code == Some(130) && left.is_empty(), "{code:?}, {left:?}"),
    }
}

#[test]
fn a_save_that_nobody_reads_says_so() {
    let Some(lab) = Lab::new() else { return };
    for format in ["docker", "oci"] {
        let mut save = lab.command(&["save", "--format", format, BASE]);
        let (stdout, stderr) = (std::process::Stdio::piped(), std::process::Stdio::piped());
        let mut save = save.stdout(stdout).stderr(stderr).spawn().unwrap();
        drop(save.stdout.take());
        let out = save.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            !out.status.success() && said.contains("went away"),
            "{format}: {said}"
        );
    }
}

#[test]
fn a_stage_more_and_another_name_of_an_image_change_no_step_that_mounts_from_them() {
    let Some(lab) = Lab::new() else { return };
    lab.run(&["tag", BASE, "test/renamed:1"]).ok();
    let text = |first: &str, image: &str| {
        format!(
            "{first}FROM {BASE} AS a\nRUN echo same > /taken\nFROM {BASE}\n\
             RUN --mount=from=a,target=/m cat /m/taken\n\
             RUN --mount=from={image},target=/m ls /m\n\
             RUN --mount=type=cache,target=/m,from=a ls /m\n"
        )
    };
    lab.build(&[&lab.context("c", &text("", BASE))]).ok();
    let other = text(&format!("FROM {BASE} AS unrelated\nRUN true\n"), "test/renamed:1");
    let said = lab.build(&[&lab.context("c", &other)]).ok();
    assert_eq!(said.out.matches("CACHED").count(), 4, "{}", said.out);
}
