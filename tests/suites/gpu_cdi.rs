//! Devices by CDI files, through CreateContainer: nodes, mounts, variables, hooks, and what stays out of reach. The files are
//! written by hand; the devices are ones that every kernel has, or numbers that no driver answers to.
#![forbid(unsafe_code)]

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::cri::{container_config, own_users, pod_config};
use harness::image::BUSYBOX;
use harness::{World, v1};

fn devices(c: &mut v1::ContainerConfig, names: &[&str]) {
    c.cdi_devices = names
        .iter()
        .map(|name| v1::CdiDevice {
            name: (*name).to_owned(),
        })
        .collect();
}

fn spec(w: &World, file: &str, devices: &serde_json::Value, edits: &serde_json::Value) -> Result<()> {
    let text = serde_json::json!({
        "cdiVersion": "0.7.0", "kind": "slipway.test/gpu", "devices": devices, "containerEdits": edits,
    });
    w.lab.write(file, text.to_string())?;
    Ok(())
}

/// Two devices without a driver (195:0 and 195:1), told apart by what opening them says: "No such device" where it is
/// allowed, "Operation not permitted" where it is not; and one that can be read (zeros) by another name.
fn two_and_zero(w: &World) -> Result<()> {
    w.lab.write("driver/libfake.so.1", "a driver's library\n")?;
    let node = |path: &str, major: u32, minor: u32| serde_json::json!({"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666});
    spec(
        w,
        "cdi-dynamic/gpu.json",
        &serde_json::json!([
            {"name": "0", "containerEdits": {"deviceNodes": [node("/dev/gpu0", 195, 0)], "env": ["GPU_0=yes"]}},
            {"name": "1", "containerEdits": {"deviceNodes": [node("/dev/gpu1", 195, 1)], "env": ["GPU_1=yes"]}},
            {"name": "zero", "containerEdits": {
                "deviceNodes": [{"path": "/dev/gpu-zero", "hostPath": "/dev/zero", "permissions": "r"}]}},
        ]),
        &serde_json::json!({
            "env": ["VISIBLE=void", "PATH=/bin:/usr/local/fake/bin"],
            "mounts": [{"hostPath": w.lab.join("driver/libfake.so.1"), "containerPath": "/usr/lib/fake/libfake.so.1",
                        "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]}],
        }),
    )
}

const LOOK: &str = "echo $VISIBLE $GPU_0$GPU_1 $PATH; cat /usr/lib/fake/libfake.so.1; \
    touch /usr/lib/fake/libfake.so.1 2>/dev/null || echo read-only; \
    ls /dev | grep gpu; head -c 4 /dev/gpu-zero | hexdump -e '4/1 \"%x\"'; echo; \
    cat /dev/gpu0 2>&1; mknod /dev/other c 195 1 && echo made; cat /dev/other 2>&1";

#[tokio::test]
async fn a_device_brings_its_node_mounts_and_variables_and_opens_no_other() -> Result<()> {
    let w = World::with_cdi("g-cdi").await?;
    two_and_zero(&w)?;
    let ask = |c: &mut v1::ContainerConfig| {
        devices(c, &["slipway.test/gpu=0", "slipway.test/gpu=zero"]);
        // Not among a container's capabilities by itself.
        let security = c
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        security.capabilities = Some(v1::Capability {
            add_capabilities: vec!["MKNOD".into()],
            ..Default::default()
        });
    };
    let (_, lines) = w.shell("cdi", ask, LOOK).await?;
    assert_eq!(
        lines,
        [
            "void yes /bin:/usr/local/fake/bin",
            "a driver's library",
            "read-only",
            "gpu-zero",
            "gpu0",
            "0000",
            "cat: can't open '/dev/gpu0': No such device or address",
            "made",
            "cat: can't open '/dev/other': Operation not permitted",
        ]
    );
    w.finish().await
}

#[tokio::test]
async fn annotations_of_the_container_name_devices_too_and_none_is_given_twice() -> Result<()> {
    let w = World::with_cdi("g-note").await?;
    two_and_zero(&w)?;
    let ask = |c: &mut v1::ContainerConfig| {
        devices(c, &["slipway.test/gpu=0"]);
        c.annotations = [(
            "cdi.k8s.io/plugin".to_owned(),
            "slipway.test/gpu=0,slipway.test/gpu=1".to_owned(),
        )]
        .into();
    };
    let (_, lines) = w
        .shell(
            "note",
            ask,
            "echo $GPU_0$GPU_1; ls /dev | grep gpu; grep -c libfake /proc/mounts",
        )
        .await?;
    assert_eq!(lines, ["yesyes", "gpu0", "gpu1", "1"]);

    let mut c = container_config("bad", BUSYBOX, &["true"]);
    c.annotations = [("cdi.k8s.io/plugin".to_owned(), "gpu0".to_owned())].into();
    let e = w
        .pod_with("bad", c)
        .await
        .expect_err("an annotation that names no device");
    assert_eq!(code(&e), Some(tonic::Code::InvalidArgument), "{e:#}");
    assert!(format!("{e:#}").contains("cdi.k8s.io/plugin"), "{e:#}");
    w.finish().await
}

fn code(e: &anyhow::Error) -> Option<tonic::Code> {
    e.downcast_ref::<tonic::Status>().map(tonic::Status::code)
}

#[tokio::test]
async fn an_unknown_device_fails_the_creation_with_its_name_and_is_found_when_its_file_comes() -> Result<()> {
    let w = World::with_cdi("g-miss").await?;
    w.lab.write(
        "cdi-static/bad.json",
        "{\"cdiVersion\": \"0.7.0\", \"kind\": \"slipway.test/gpu\", \"unknown\": 1}",
    )?;
    let big = std::fs::File::create(w.lab.join("cdi-static/big.json"))?;
    big.set_len(10 << 20)?;
    std::os::unix::fs::symlink("/dev/zero", w.lab.join("cdi-static/zero.yaml"))?;
    let pod_config = pod_config("miss", &w.lab, true);
    let pod = w.cri.run_pod(pod_config.clone()).await?;
    let mut c = container_config("miss", BUSYBOX, &["sleep", "1000"]);
    devices(&mut c, &["slipway.test/gpu=0"]);
    let e = w
        .cri
        .create(&pod, c.clone(), pod_config.clone())
        .await
        .expect_err("a device that no file defines");
    let text = format!("{e:#}");
    assert_eq!(code(&e), Some(tonic::Code::InvalidArgument), "{text}");
    for part in [
        "slipway.test/gpu=0",
        "cdi-static",
        "bad.json",
        "big.json",
        "zero.yaml",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(w.cri.containers().await?.is_empty());
    two_and_zero(&w)?;
    let id = w.cri.run(&pod, c, pod_config).await?;
    assert_eq!(w.cri.exec(&id, &["test", "-c", "/dev/gpu0"], 10).await?.0, 0);
    w.finish().await
}

#[tokio::test]
async fn a_file_that_leads_out_of_the_container_is_refused() -> Result<()> {
    let w = World::with_cdi("g-evil").await?;
    for (n, edits) in [
        serde_json::json!({"mounts": [{"hostPath": "/etc", "containerPath": "/x/../../../etc"}]}),
        serde_json::json!({"mounts": [{"hostPath": "/etc", "containerPath": "/"}]}),
        serde_json::json!({"deviceNodes": [{"path": "/dev/../../dev/evil", "hostPath": "/dev/zero"}]}),
    ]
    .into_iter()
    .enumerate()
    {
        let devices = serde_json::json!([{"name": format!("evil{n}"), "containerEdits": edits}]);
        spec(
            &w,
            &format!("cdi-dynamic/{n}.json"),
            &devices,
            &serde_json::json!({}),
        )?;
        let mut c = container_config("evil", BUSYBOX, &["true"]);
        self::devices(&mut c, &[&format!("slipway.test/gpu=evil{n}")]);
        let pod = format!("evil{n}");
        let e = w.pod_with(&pod, c).await.expect_err("a path that escapes");
        assert_eq!(code(&e), Some(tonic::Code::InvalidArgument), "{e:#}");
    }
    // A link in the image is followed inside the image only.
    w.lab.write("outside/file", "the host's\n")?;
    let edits = serde_json::json!({"mounts": [{"hostPath": w.lab.join("outside/file"), "containerPath": "/link/file", "options": ["ro", "bind"]}]});
    let devices = serde_json::json!([{"name": "link", "containerEdits": edits}]);
    spec(&w, "cdi-dynamic/link.json", &devices, &serde_json::json!({}))?;
    let dir = w.lab.join("evil-context");
    std::fs::create_dir_all(&dir)?;
    let target = w.lab.join("escaped");
    std::fs::write(
        dir.join("Dockerfile"),
        format!("FROM {BUSYBOX}\nRUN ln -s {} /link\n", target.display()),
    )?;
    harness::image::run_slipway(
        &w.lab,
        &["build", "-t", "slipway.test/evil:1", &dir.display().to_string()],
    )?
    .ok()?;
    let mut c = container_config("link", "slipway.test/evil:1", &["cat", "/link/file"]);
    self::devices(&mut c, &["slipway.test/gpu=link"]);
    let ran = w.pod_with("link", c).await;
    assert!(!target.exists(), "the mount was made outside the container");
    if let Ok((_, id)) = ran {
        w.cri.wait_exit(&id, Duration::from_secs(10)).await?;
    }
    w.finish().await
}

/// Writes `script` as an executable file of the lab; its path.
fn program(w: &World, name: &str, script: &str) -> Result<String> {
    let path = w.lab.write(name, format!("#!/bin/sh\n{script}\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path.display().to_string())
}

fn with_hook(w: &World, name: &str, hook: &serde_json::Value) -> Result<()> {
    let devices = serde_json::json!([{"name": name, "containerEdits": {"hooks": [hook]}}]);
    spec(
        w,
        &format!("cdi-dynamic/{name}.json"),
        &devices,
        &serde_json::json!({}),
    )
}

async fn run_with(w: &World, name: &str) -> Result<String> {
    let mut c = container_config(name, BUSYBOX, &["sleep", "1000"]);
    devices(&mut c, &[&format!("slipway.test/gpu={name}")]);
    c.envs = vec![v1::KeyValue {
        key: "LD_PRELOAD".into(),
        value: b"/evil.so".to_vec(),
    }];
    Ok(w.pod_with(name, c).await?.1)
}

/// CVE-2025-23266: nothing of the container's environment reaches a hook.
#[tokio::test]
async fn a_hook_runs_with_its_own_environment_only_and_the_state_on_its_stdin() -> Result<()> {
    let w = World::with_cdi("g-hook").await?;
    let out = w.lab.join("hook-out").display().to_string();
    let script = format!("env > {out}; cat >> {out}; echo >> {out}; echo $0 $1 >> {out}");
    for moment in ["createRuntime", "createContainer", "prestart"] {
        let path = program(&w, &format!("hooks/{moment}"), &script)?;
        let hook = serde_json::json!({"hookName": moment, "path": path, "args": ["zeroth", "first"], "env": ["ONLY=this"]});
        with_hook(&w, moment, &hook)?;
        let id = run_with(&w, moment).await?;
        assert_eq!(w.cri.exec(&id, &["true"], 10).await?.0, 0);
        let said = std::fs::read_to_string(&out).with_context(|| format!("{moment} did not run"))?;
        std::fs::remove_file(&out)?;
        assert!(
            said.contains("ONLY=this") && !said.contains("LD_PRELOAD"),
            "{said}"
        );
        let state = said.lines().find(|l| l.starts_with('{')).context("no state")?;
        let state: serde_json::Value = serde_json::from_str(state)?;
        assert!(state["bundle"].is_string() && state["id"].is_string(), "{state}");
        let allowed = ["ONLY", "PWD", "OLDPWD", "SHLVL", "_"];
        for line in said.lines().take_while(|l| !l.starts_with('{')) {
            let name = line.split('=').next().unwrap_or("");
            assert!(allowed.contains(&name), "{line}");
        }
        assert!(said.trim_end().ends_with("first"), "{said}");
    }
    w.finish().await
}

#[tokio::test]
async fn a_hook_that_fails_or_hangs_fails_the_container_with_what_it_said() -> Result<()> {
    let w = World::with_cdi("g-hookbad").await?;
    let fails = program(&w, "hooks/fails", "echo the driver is not loaded >&2; exit 9")?;
    with_hook(
        &w,
        "fails",
        &serde_json::json!({"hookName": "createContainer", "path": fails}),
    )?;
    let text = format!("{:#}", run_with(&w, "fails").await.expect_err("a failing hook"));
    assert!(
        text.contains("createContainer hook") && text.contains("exit code 9: the driver is not loaded"),
        "{text}"
    );
    let marker = format!("{}", 500_000_000 + std::process::id());
    let hangs = program(
        &w,
        "hooks/hangs",
        &format!("echo waiting for the driver >&2; sleep {marker}"),
    )?;
    with_hook(
        &w,
        "hangs",
        &serde_json::json!({"hookName": "createRuntime", "path": hangs, "timeout": 1}),
    )?;
    let began = Instant::now();
    let text = format!("{:#}", run_with(&w, "hangs").await.expect_err("a hanging hook"));
    assert!(
        text.contains("did not end within 1 s: waiting for the driver"),
        "{text}"
    );
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let left = harness::leftovers::processes_naming(std::path::Path::new(&format!("sleep {marker}")));
    assert!(left.is_empty(), "{left:?}");
    with_hook(
        &w,
        "absent",
        &serde_json::json!({"hookName": "createContainer", "path": "/no/such/hook"}),
    )?;
    let text = format!(
        "{:#}",
        run_with(&w, "absent")
            .await
            .expect_err("a hook that is not there")
    );
    assert!(text.contains("/no/such/hook"), "{text}");
    with_hook(
        &w,
        "late",
        &serde_json::json!({"hookName": "poststop", "path": "/bin/true"}),
    )?;
    let text = format!(
        "{:#}",
        run_with(&w, "late").await.expect_err("a hook that is never run")
    );
    assert!(text.contains("poststop"), "{text}");
    w.finish().await
}

/// A pod's configuration and its user namespace.
fn with_users(w: &World, name: &str) -> (v1::PodSandboxConfig, v1::UserNamespace) {
    let mut config = pod_config(name, &w.lab, false);
    let user = own_users(&mut config);
    (config, user)
}

/// The log of a container that runs `script` in a pod with users of its own.
async fn in_user_namespace(
    w: &World,
    name: &str,
    script: &str,
    change: impl FnOnce(&mut v1::ContainerConfig),
) -> Result<Vec<String>> {
    let (mut config, user) = with_users(w, name);
    let mut c = container_config(name, BUSYBOX, &["sh", "-c", script]);
    c.linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(user);
    change(&mut c);
    let privileged = |l: &v1::LinuxContainerConfig| l.security_context.as_ref().is_some_and(|s| s.privileged);
    if let Some(s) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
        s.privileged = c.linux.as_ref().is_some_and(privileged);
    }
    let pod = w.cri.run_pod(config.clone()).await?;
    let id = w.cri.run(&pod, c, config).await?;
    w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    Ok(w.log(name)?.into_iter().map(|l| l.text).collect())
}

#[tokio::test]
async fn in_a_user_namespace_a_device_is_the_one_that_was_asked_for() -> Result<()> {
    let w = World::with_cdi("g-userns").await?;
    two_and_zero(&w)?;
    // What the container sees by that name is zeros: not what the host has there.
    let edits = serde_json::json!({"deviceNodes": [{"path": "/dev/hwrng", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "gid": 44}]});
    let hook = program(&w, "hooks/fine", "exit 0")?;
    let hooks = serde_json::json!({"hooks": [{"hookName": "createContainer", "path": hook}]});
    let more = serde_json::json!([{"name": "named", "containerEdits": edits}, {"name": "hook", "containerEdits": hooks}]);
    spec(&w, "cdi-static/named.json", &more, &serde_json::json!({}))?;
    let script = "head -c 4 /dev/hwrng | hexdump -e '4/1 \"%x\"'; echo; stat -c '%u %g %a' /dev/hwrng; cat /dev/gpu0 2>&1; ls /dev | grep gpu; mknod /dev/other c 195 1 2>/dev/null || echo refused";
    let lines = in_user_namespace(&w, "userns", script, |c| {
        devices(
            c,
            &[
                "slipway.test/gpu=0",
                "slipway.test/gpu=named",
                "slipway.test/gpu=hook",
            ],
        );
    })
    .await?;
    assert_eq!(
        lines,
        [
            "0000",
            "0 44 640",
            "cat: can't open '/dev/gpu0': No such device or address",
            "gpu0",
            "refused"
        ]
    );
    w.finish().await
}

#[tokio::test]
async fn in_a_user_namespace_a_privileged_containers_devices_stay_the_hosts() -> Result<()> {
    let w = World::with_cdi("g-priv").await?;
    // Every container has those of its own: null, zero, full, random, urandom, tty, console.
    let script = "cd /dev; for d in $(find . -type c -o -type b); do [ $(stat -c %u $d) = 0 ] && echo $d; done | grep -vE '^./(null|zero|full|random|urandom|tty|console|ptmx|pts/.*)$'; ls | wc -l";
    let lines = in_user_namespace(&w, "priv", script, |c| {
        c.linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default()
            .privileged = true;
    })
    .await?;
    let owned = &lines[..lines.len().saturating_sub(1)];
    assert!(owned.is_empty(), "root of the pod owns {owned:?}");
    w.finish().await
}
