//! What lands in images.

use crate::lab::{BASE, Lab};

#[test]
fn a_run_leaves_no_trace_of_what_was_mounted_for_it() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN cat /etc/resolv.conf /etc/hosts > /dev/null; stat -c %Y /etc > /was\n"),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    let said = lab.look("t:1", "ls -a /etc; ls -d /was");
    assert!(said.contains("passwd") && said.contains("/was"), "{said}");
    // Those that are there now were mounted for this look; the image's own layers have none.
    let tar = lab.path("t.tar").display().to_string();
    lab.run(&["save", "-o", &tar, "t:1"]).ok();
    let list = std::process::Command::new("sh")
        .args(["-c", &format!("cd {} && mkdir x && tar xf t.tar -C x && for l in $(find x -type f); do tar tf $l 2>/dev/null; done", lab.path("").display())])
        .output()
        .unwrap();
    let list = String::from_utf8_lossy(&list.stdout);
    assert!(list.contains("was"), "{list}");
    assert!(
        !list.contains("resolv.conf") && !list.contains("etc/hosts"),
        "{list}"
    );
}

#[test]
fn stages_give_their_files_and_hard_links_owners_and_modes_come_along() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS make\nRUN mkdir /out && echo x > /out/a && ln /out/a /out/b && chown 5:6 /out/a && chmod 4711 /out/a && ln -s a /out/c\n\
             FROM {BASE}\nCOPY --from=make /out/ /got/\nCOPY --from=make --chown=app:root --chmod=640 /out/a /mine\n"
        ),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    let said = lab.look(
        "t:1",
        "stat -c '%n %u:%g %a %h' /got/a /got/b /mine; readlink /got/c",
    );
    assert_eq!(
        said,
        "/got/a 5:6 4711 2\n/got/b 5:6 4711 2\n/mine 1000:0 640 1\na\n"
    );
}

#[test]
fn a_working_directory_belongs_to_the_user_in_force_and_a_number_has_no_group() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nWORKDIR /first\nUSER app\nWORKDIR /second/third\nRUN id -u > me && id -g >> me && echo $HOME >> me\n\
             USER 1234\nRUN id -u; id -g; pwd\n"
        ),
    );
    let said = lab.build(&["-t", "t:1", &dir]).ok();
    assert!(
        said.out.contains("1234\n") && said.out.contains(" 0\n"),
        "{}",
        said.out
    );
    let said = lab.look(
        "t:1",
        "stat -c '%n %u:%g' /first /second /second/third; cat /second/third/me",
    );
    assert_eq!(
        said,
        "/first 0:0\n/second 1000:1001\n/second/third 1000:1001\n1000\n1001\n/home/app\n"
    );
}

#[test]
fn add_unpacks_archives_of_the_context_and_copy_does_not() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nADD a.tgz /added/\nCOPY a.tgz /copied/\nADD --unpack=false a.tgz /kept/\n"),
    );
    std::fs::create_dir_all(lab.path("c/d")).unwrap();
    lab.write("c/d/f", "text");
    let packed = std::process::Command::new("tar")
        .args(["czf", "a.tgz", "d"])
        .current_dir(lab.path("c"))
        .status()
        .unwrap();
    assert!(packed.success());
    lab.build(&["-t", "t:1", &dir]).ok();
    assert_eq!(
        lab.look("t:1", "cat /added/d/f; echo; ls /copied /kept"),
        "text\n/copied:\na.tgz\n\n/kept:\na.tgz\n"
    );
}

#[test]
fn many_layers_are_no_trouble() {
    let Some(lab) = Lab::new() else { return };
    let steps: String = (0..140).map(|n| format!("COPY f /d/{n}\n")).collect();
    let dir = lab.context("c", &format!("FROM {BASE}\n{steps}"));
    lab.write("c/f", "x");
    lab.build(&["-t", "t:1", &dir]).ok();
    assert_eq!(lab.look("t:1", "ls /d | wc -l").trim(), "140");
}

#[test]
fn mounts_of_a_run_come_and_go() {
    let Some(lab) = Lab::new() else { return };
    lab.write("c/req/file", "from the context");
    lab.write("c/ignored", "secret");
    lab.write("c/.dockerignore", "ignored\n");
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS other\nRUN echo from the stage > /made\n\
             FROM {BASE}\n\
             RUN --mount=type=bind,target=/ctx cat /ctx/req/file; ls /ctx; ! touch /ctx/x\n\
             RUN --mount=type=bind,target=/ctx,rw touch /ctx/req/new && ls /ctx/req\n\
             RUN --mount=from=other,source=/made,target=/m cat /m\n\
             RUN --mount=type=cache,target=/cache echo run >> /cache/log; wc -l < /cache/log > /n\n\
             RUN --mount=type=tmpfs,target=/tmp/fast touch /tmp/fast/x; grep -c /tmp/fast /proc/mounts\n"
        ),
    );
    let first = lab.build(&["-t", "t:1", &dir]).ok();
    for want in ["from the context", "from the stage"] {
        assert!(first.out.contains(want), "{want}: {}", first.out);
    }
    assert!(
        !first.out.lines().any(|l| l.ends_with(" ignored")),
        "{}",
        first.out
    );
    assert!(
        !lab.path("c/req/new").exists(),
        "writes to the context are thrown away"
    );
    lab.build(&["--no-cache", "-t", "t:1", &dir]).ok();
    assert_eq!(
        lab.look("t:1", "cat /n; ls -d /ctx /m /cache /tmp 2>/dev/null || true"),
        "2\n"
    );
    let pruned = lab.run(&["prune", "--format", "json"]).ok().out;
    let pruned: serde_json::Value = serde_json::from_str(&pruned).unwrap();
    assert_eq!(pruned["cache_mounts"], 1);
    assert!(lab.run(&["prune"]).ok().out.starts_with("freed 0 B"));
}

#[test]
fn a_linked_copy_does_not_look_at_what_is_below() {
    let Some(lab) = Lab::new() else { return };
    lab.write("c/f", "new");
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nRUN mkdir -p /real /there/sub && ln -s /real /link && echo old > /there/sub/g && chmod 700 /there\n\
             COPY --link --chown=app f /link/f\nCOPY --link f /there/sub/\nCOPY f /plain/\n"
        ),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    let said = lab.look("t:1", "ls /real; stat -c '%n %F %u' /link /link/f; ls /there/sub");
    assert_eq!(said, "/link directory 1000\n/link/f regular file 1000\nf\ng\n");
}

#[test]
fn parents_keep_their_directories_from_the_pivot_on() {
    let Some(lab) = Lab::new() else { return };
    for path in ["x/a/b/one.txt", "x/a/c/two.txt", "x/a/c/no.bin"] {
        lab.write(&format!("c/{path}"), path);
    }
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nCOPY --parents x/a/b/one.txt /whole/\nCOPY --parents x/./a/*/*.txt /pivot/\n\
             COPY --exclude=*.bin x/a/c /not/\n"
        ),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    let said = lab.look("t:1", "find /whole /pivot /not -type f | sort");
    assert_eq!(
        said,
        "/not/two.txt\n/pivot/a/b/one.txt\n/pivot/a/c/two.txt\n/whole/x/a/b/one.txt\n"
    );
    let dir = lab.context("c", &format!("FROM {BASE}\nCOPY --parents x/missing /p/\n"));
    assert!(lab.build(&[&dir]).failed().err.contains("x/missing"));
    let dir = lab.context("c", &format!("FROM {BASE}\nCOPY --parents x/missing* /p/\n"));
    lab.build(&[&dir]).ok();
}

#[test]
fn locked_caches_never_wait_for_each_other_in_a_circle() {
    let Some(lab) = Lab::new() else { return };
    let cache = |id: &str, at: &str| format!("--mount=type=cache,id={id},target={at},sharing=locked");
    let (a, b) = (cache("a", "/a"), cache("b", "/b"));
    let twice = cache("a", "/again");
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS one\nRUN {a} {b} sleep 0.3; echo 1 >> /a/log; touch /1\n\
             RUN {a} {b} sleep 0.3; echo 2 >> /a/log; touch /11\n\
             FROM {BASE} AS two\nRUN {b} {a} sleep 0.3; echo 3 >> /a/log; touch /2\n\
             RUN {b} {a} sleep 0.3; echo 4 >> /a/log; touch /22\n\
             FROM {BASE}\nCOPY --from=one /11 /\nCOPY --from=two /22 /\n\
             RUN {a} {twice} --mount=type=cache,id=a,target=/own,sharing=private touch /own/x; wc -l < /again/log; ls /a /own\n"
        ),
    );
    let mut build = lab.start(&[&dir], "out");
    let began = std::time::Instant::now();
    let status = loop {
        if let Some(status) = build.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > std::time::Duration::from_secs(60) {
            build.kill().unwrap();
            build.wait().unwrap();
            lab.run(&["images"]).ok();
            panic!("{}", std::fs::read_to_string(lab.path("out")).unwrap());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let out = std::fs::read_to_string(lab.path("out")).unwrap();
    assert!(status.success(), "{out}");
    assert!(out.lines().any(|l| l.ends_with(" 4")), "{out}");
}

#[test]
fn a_cache_of_another_owner_mode_or_source_is_another_cache() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE} AS first\nRUN mkdir /seed; echo first > /seed/f\n\
             FROM {BASE} AS second\nRUN mkdir /seed; echo second > /seed/f\n\
             FROM {BASE}\n\
             RUN --mount=type=cache,id=x,target=/c touch /c/root\n\
             RUN --mount=type=cache,id=x,target=/c,uid=1000,gid=1001,mode=0700 ls /c; stat -c %u:%g:%a /c\n\
             RUN --mount=type=cache,id=x,target=/c,from=first,source=/seed cat /c/f\n\
             RUN --mount=type=cache,id=x,target=/c,from=second,source=/seed cat /c/f\n\
             RUN --mount=type=cache,id=x,target=/c ls /c\n"
        ),
    );
    let out = lab.build(&[&dir]).ok().out;
    let said: Vec<&str> = out
        .lines()
        .filter(|l| l.contains("/8] ") || l.starts_with('['))
        .filter_map(|l| l.split("] ").nth(1)?.trim_start().split_once(' '))
        .filter(|(time, _)| time.parse::<f64>().is_ok())
        .map(|(_, text)| text)
        .collect();
    assert_eq!(said, ["1000:1001:700", "first", "second", "root"], "{out}");
}

#[test]
fn files_are_taken_from_the_image_of_the_targets_platform() {
    let Some(lab) = Lab::new() else { return };
    let other = if std::env::consts::ARCH == "x86_64" {
        "arm64"
    } else {
        "amd64"
    };
    let config = serde_json::json!({
        "architecture": other, "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": [] },
    });
    lab.write("other/config.json", &config.to_string());
    let manifest =
        serde_json::json!([{ "Config": "config.json", "RepoTags": ["test/other:1"], "Layers": [] }]);
    lab.write("other/manifest.json", &manifest.to_string());
    let (tar, from) = (lab.path("other.tar"), lab.path("other"));
    let packed = std::process::Command::new("tar")
        .arg("cf")
        .arg(&tar)
        .arg("-C")
        .arg(&from)
        .args(["config.json", "manifest.json"])
        .status();
    assert!(packed.unwrap().success());
    lab.run(&["load", "-i", &tar.display().to_string()]).ok();
    let dir = lab.context(
        "c",
        &format!("FROM --platform=linux/{other} test/other:1\nCOPY --from={BASE} /etc/passwd /taken\n"),
    );
    lab.build(&["-t", "t:1", &dir]).ok();
    assert_eq!(lab.inspect("t:1")["platform"], format!("linux/{other}"));
}

#[test]
fn mounts_lie_in_each_other_whatever_their_kinds_and_order() {
    let Some(lab) = Lab::new() else { return };
    lab.write("c/req.txt", "numpy");
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\n\
             RUN --mount=type=tmpfs,target=/tmp --mount=type=bind,source=req.txt,target=/tmp/req.txt cat /tmp/req.txt; touch /tmp/x\n\
             RUN --mount=type=bind,source=req.txt,target=/a/b/req.txt --mount=type=cache,target=/a/c --mount=type=tmpfs,target=/a \
             cat /a/b/req.txt; touch /a/c/kept /a/gone\n\
             RUN --mount=type=cache,target=/a/c ls /a/c /a\n"
        ),
    );
    let said = lab.build(&["-t", "t:1", &dir]).ok();
    assert_eq!(said.out.matches(" numpy").count(), 2, "{}", said.out);
    assert!(
        said.out.contains(" kept") && !said.out.contains(" gone"),
        "{}",
        said.out
    );
    assert_eq!(lab.look("t:1", "ls -d /tmp /a 2>/dev/null; true"), "");
}

#[test]
fn a_new_cache_is_filled_once_however_many_steps_and_builds_want_it_at_once() {
    let Some(lab) = Lab::new() else { return };
    let mut dockerfile = format!(
        "FROM {BASE} AS seed\nRUN mkdir /seed; i=0; while [ $i -lt 300 ]; do echo $i > /seed/$i; i=$((i+1)); done\n"
    );
    let mut last = String::from("FROM scratch\n");
    for n in 0..4 {
        dockerfile.push_str(&format!(
            "FROM {BASE} AS s{n}\nARG WHO\n\
             RUN --mount=type=cache,id=c,target=/c,from=seed,source=/seed test $(ls /c | grep -c '^[0-9]*$') = 300 && echo {n} > /c/by-$WHO-{n} && echo {n} > /o\n"
        ));
        last.push_str(&format!("COPY --from=s{n} /o /o{n}\n"));
    }
    dockerfile.push_str(&last);
    dockerfile.push_str(&format!(
        "FROM {BASE}\nCOPY --from={} / /all\nRUN --mount=type=cache,id=c,target=/c,from=seed,source=/seed ls /c | grep -c ^by-\n",
        4 + 1
    ));
    let dir = lab.context("c", &dockerfile);
    let whose = ["a", "b"];
    let mut builds: Vec<_> = whose
        .iter()
        .map(|who| lab.start(&["--build-arg", &format!("WHO={who}"), &dir], who))
        .collect();
    for (build, who) in builds.iter_mut().zip(whose) {
        let code = build.wait().unwrap();
        let said = std::fs::read_to_string(lab.path(who)).unwrap();
        assert!(code.success(), "{said}");
    }
    let mounts = std::fs::read_dir(lab.path("root/cache-mounts")).unwrap();
    let mounts: Vec<_> = mounts.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    let kept = std::fs::read_dir(mounts[0].join("fs")).unwrap().count();
    assert_eq!(kept, 300 + 8, "nobody wrote into a directory that was put away");
    let names: Vec<_> = std::fs::read_dir(&mounts[0])
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "the lock and what is mounted: {names:?}");
}
