//! CDI devices in RUN: who gets them, who does not, and what is left of them.

use crate::lab::{BASE, Lab};

/// A device that no driver stands behind: who may open it is told so, who may not is told that.
const MAJOR: u32 = 241;

/// A machine with two devices, whose driver has a library, a link to it, and a place in the loader's cache.
fn devices(lab: &Lab) {
    lab.write("driver/libv.so.1", "the driver's");
    let library = lab.path("driver/libv.so.1").display().to_string();
    let hook = |args: &[&str]| {
        let args: Vec<&str> = ["nvidia-cdi-hook"].iter().chain(args).copied().collect();
        serde_json::json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": args})
    };
    let node = |minor: u32| serde_json::json!({"path": format!("/dev/v{minor}"), "type": "c", "major": MAJOR, "minor": minor, "fileMode": 0o660});
    let device = |name: &str, minors: &[u32]| {
        let nodes: Vec<_> = minors.iter().map(|m| node(*m)).collect();
        serde_json::json!({"name": name, "containerEdits": {"deviceNodes": nodes}})
    };
    let spec = serde_json::json!({
        "cdiVersion": "0.6.0", "kind": "v.com/gpu",
        "devices": [device("0", &[0]), device("1", &[1]), device("all", &[0, 1])],
        "containerEdits": {
            "env": ["V_DEVICES=void"],
            "mounts": [{ "hostPath": library, "containerPath": "/usr/lib/v/libv.so.1",
                         "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"] }],
            "hooks": [
                hook(&["create-symlinks", "--link", "libv.so.1::/usr/lib/v/libv.so"]),
                hook(&["update-ldcache", "--folder", "/usr/lib/v"]),
            ],
        },
    });
    lab.write("cdi/v.json", &spec.to_string());
}

/// What the commands of a build that went well wrote, without progress.
fn said(out: &str) -> Vec<&str> {
    out.lines()
        .filter_map(|l| l.split_once("] ")?.1.trim_start().split_once(' '))
        .filter(|(time, _)| time.parse::<f64>().is_ok())
        .map(|(_, text)| text)
        .collect()
}

const LOOK: &str = "ls /dev | grep '^v[0-9]' | tr '\\n' ' '; echo; for m in 0 1; do mknod /dev/own$m c 241 $m; cat /dev/own$m 2>&1; done; \
    cat /usr/lib/v/libv.so 2>&1; echo; echo env=$V_DEVICES; ls /etc/ld.so.cache 2>&1 || true";

#[test]
fn a_step_has_the_devices_it_asks_for_and_the_next_one_has_not() {
    let Some(lab) = Lab::new() else { return };
    devices(&lab);
    let dir = lab.context(
        "c",
        &format!(
            "FROM {BASE}\nRUN --device=v.com/gpu=0,required {LOOK}\nRUN {LOOK}\n\
             USER app\nRUN --device=v.com/gpu=1 ls -l /dev/v1 | cut -c1-30; cat /dev/v1 2>&1; cat /usr/lib/v/libv.so; echo\n"
        ),
    );
    let built = lab.build(&["--allow=device=v.com/gpu=*", "-t", "t:1", &dir]).ok();
    let none = "No such device or address";
    let denied = "Operation not permitted";
    assert_eq!(
        said(&built.out),
        [
            "v0 ",
            &format!("cat: can't open '/dev/own0': {none}"),
            &format!("cat: can't open '/dev/own1': {denied}"),
            "the driver's",
            "env=void",
            "/etc/ld.so.cache",
            "",
            &format!("cat: can't open '/dev/own0': {denied}"),
            &format!("cat: can't open '/dev/own1': {denied}"),
            "cat: can't open '/usr/lib/v/libv.so': No such file or directory",
            "",
            "env=",
            "ls: /etc/ld.so.cache: No such file or directory",
            // The user's own, since the file does not say whose it is.
            "crw-rw----    1 app      app  ",
            &format!("cat: can't open '/dev/v1': {none}"),
            "the driver's",
        ],
        "{}",
        built.out
    );
    let config = &lab.inspect("t:1")["config"];
    assert_eq!(config["Env"], serde_json::json!(["PATH=/bin"]));
}

#[test]
fn a_layer_is_the_same_with_a_device_and_without() {
    let Some(lab) = Lab::new() else { return };
    devices(&lab);
    let base = lab.context("base2", &format!("FROM {BASE}\nRUN mkdir -p /usr/lib/v /etc/ld.so.conf.d && echo old > /etc/ld.so.cache && echo include /etc/ld.so.conf.d/\\*.conf > /etc/ld.so.conf && touch -d @1000000 /usr/lib/v /usr/lib /etc/ld.so.conf.d /etc\n"));
    lab.build(&["-t", "base:2", &base]).ok();
    for from in [BASE, "base:2"] {
        let text = format!(
            "FROM {from}\nWORKDIR /deep/er\nRUN echo x > /made; mkdir -p /etc/own; touch /etc/own/f; chown -R app /usr 2>/dev/null; chown -R root /usr 2>/dev/null; true\n"
        );
        let dir = lab.context("c", &text);
        let build = |name: &str, args: &[&str]| {
            let mut all = vec!["build", "--no-cache", "--progress", "plain", "-t", name];
            all.extend(args);
            all.push(&dir);
            let mut command = lab.command(&all);
            let said: crate::lab::Said = command
                .env("SOURCE_DATE_EPOCH", "1700000000")
                .output()
                .unwrap()
                .into();
            said.ok();
            lab.inspect(name)["layers"].clone()
        };
        let without = build("t:without", &[]);
        let with = build("t:with", &["--device", "v.com/gpu=all"]);
        assert!(without.as_array().is_some_and(|l| l.len() > 1), "{without}");
        assert_eq!(with, without, "{from}");
    }
    let found = lab.look(
        "t:with",
        "cat /etc/ld.so.cache; ls /usr/lib/v /etc/ld.so.conf.d; cat /made",
    );
    assert_eq!(found, "old\n/etc/ld.so.conf.d:\n\n/usr/lib/v:\nx\n");
}

#[test]
fn a_device_that_is_not_granted_or_not_there_is_refused_before_anything_runs() {
    let Some(lab) = Lab::new() else { return };
    devices(&lab);
    let cdi = lab.path("cdi").display().to_string();
    for (flags, line, want) in [
        (
            &[][..],
            "RUN --device=v.com/gpu=0 true",
            "c/Dockerfile:3: the device v.com/gpu=0 (RUN --device) is not granted to this build; give slipway build --allow=device=v.com/gpu=0",
        ),
        (
            &["--allow=device=v.com/gpu=1"],
            "RUN --device=v.com/gpu=0,required true",
            "is not granted",
        ),
        (
            &["--allow", "device"],
            "RUN --device=v.com/gpu=9,required true",
            "CDI device v.com/gpu=9 is not defined in",
        ),
        (
            &["--device", "v.com/gpu=9"],
            "RUN true",
            "CDI device v.com/gpu=9 is not defined in",
        ),
        (&["--device", "v.com/tpu"], "RUN true", &cdi),
        (
            &["--device", "/dev/fuse"],
            "RUN true",
            "--device=/dev/fuse: a device is given by its name in a CDI file",
        ),
        (
            &["--allow", "security.insecure"],
            "RUN true",
            "network.host and devices can be granted",
        ),
    ] {
        let dir = lab.context("c", &format!("FROM {BASE}\nRUN echo ran\n{line}\n"));
        let mut args = vec!["--no-cache"];
        args.extend(flags);
        args.push(&dir);
        let built = lab.build(&args).failed();
        assert!(built.err.contains(want), "{line}: {}", built.err);
        assert!(!built.out.contains("ran\n"), "{line}: {}", built.out);
        assert_eq!(lab.leftovers(), Vec::<String>::new());
    }
    // Nor does a base image get one by a trigger.
    let base = lab.context(
        "base2",
        &format!("FROM {BASE}\nONBUILD RUN --device=v.com/gpu=0 true\n"),
    );
    lab.build(&["-t", "trigger:1", &base]).ok();
    let dir = lab.context("c", "FROM trigger:1\n");
    let built = lab.build(&[&dir]).failed();
    assert!(
        built.err.contains("v.com/gpu=0 (RUN --device) is not granted"),
        "{}",
        built.err
    );
    lab.build(&["--allow=device", &dir]).ok();
}

#[test]
fn a_step_that_can_do_without_its_device_is_told_to() {
    let Some(lab) = Lab::new() else { return };
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN --device=v.com/gpu=0 ls /dev/v0 2>&1 || true\n"),
    );
    let build = |args: &[&str]| {
        let mut all = vec!["-t", "t:1"];
        all.extend(args);
        all.push(&dir);
        lab.build(&all).ok()
    };
    let built = build(&[]);
    let all = format!("{}{}", built.out, built.err);
    assert!(
        all.contains("Dockerfile:2: RUN --device: CDI device v.com/gpu=0 is not defined in")
            && all.contains("the command runs without it"),
        "{all}"
    );
    assert_eq!(said(&built.out), ["ls: /dev/v0: No such file or directory"]);
    // With it, it is another step; and the same one again.
    devices(&lab);
    for (args, cached) in [
        (&["--allow", "device"][..], 0),
        (&["--device=v.com/gpu=0"], 1),
        (&["--allow", "device=v.com/gpu=1,alias=v.com/gpu=0"], 0),
        (&["--allow", "device"], 1),
    ] {
        let built = build(args);
        assert_eq!(
            built.out.matches("CACHED").count(),
            cached,
            "{args:?}: {}",
            built.out
        );
    }
    // The driver's version is no part of its name.
    lab.write(
        "cdi/v.json",
        &std::fs::read_to_string(lab.path("cdi/v.json"))
            .unwrap()
            .replace("void", "other"),
    );
    assert_eq!(build(&["--allow", "device"]).out.matches("CACHED").count(), 1);
}

#[test]
fn the_folders_of_devices_are_those_of_slipwayds_configuration() {
    let Some(lab) = Lab::new() else { return };
    let spec = r#"{"cdiVersion":"0.6.0","kind":"v.com/env","devices":[
        {"name":"x","annotations":{"org.mobyproject.buildkit.device.autoallow":"true"},"containerEdits":{"env":["X=here"]}}]}"#;
    lab.write("elsewhere/v.json", spec);
    let elsewhere = lab.path("elsewhere");
    let config = lab.write("config.toml", &format!("[cdi]\nspec_dirs = [{elsewhere:?}]\n"));
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN --device=v.com/env,required echo x=$X\n"),
    );
    let (root, state) = (lab.path("root"), lab.path("state"));
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_slipway"))
        .args(["build", "--progress", "plain", "--network", "host"])
        .arg("--root")
        .arg(root)
        .arg("--state")
        .arg(state)
        .arg("--config")
        .arg(config)
        .arg(dir)
        .output()
        .unwrap();
    let built = crate::lab::Said::from(out).ok();
    assert_eq!(said(&built.out), ["x=here"]);
}

#[test]
fn a_hook_that_fails_says_why_and_a_build_that_is_killed_with_a_device_is_undone() {
    let Some(lab) = Lab::new() else { return };
    devices(&lab);
    let hook = serde_json::json!({"hookName": "createContainer", "path": "/bin/sh",
        "args": ["sh", "-c", "echo no such card >&2; exit 3"]});
    let node = serde_json::json!({"path": "/dev/w0", "type": "c", "major": MAJOR, "minor": 9});
    let spec = serde_json::json!({"cdiVersion": "0.6.0", "kind": "w.com/card", "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [node], "hooks": [hook]}}]});
    lab.write("cdi/w.json", &spec.to_string());
    let dir = lab.context(
        "c",
        &format!("FROM {BASE}\nRUN --device=w.com/card,required true\n"),
    );
    let built = lab.build(&["--allow=device", &dir]).failed();
    let want = "createContainer hook /bin/sh ended with exit code 3: no such card";
    assert!(built.err.contains(want), "{}", built.err);
    lab.clean();

    let text = format!("FROM {BASE}\nRUN echo begun; sleep 600\n");
    let dir = lab.context("c2", &text);
    let mut build = lab.start(&["--device=v.com/gpu=*", &dir], "out");
    lab.wait_for("out", "begun");
    build.kill().unwrap();
    build.wait().unwrap();
    assert!(!lab.leftovers().is_empty());
    lab.run(&["images"]).ok();
    lab.clean();
}
