//! NVIDIA's hooks of CDI files, done by Slipway itself: the program that they name is not on this machine. A program in the
//! container loads `libcuda.so.1` by its name, whatever distribution its image is of.
#![forbid(unsafe_code)]

#[path = "gpu/families.rs"]
mod families;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::cri::{container_config, own_users, pod_config};
use harness::{World, v1};

use families::{ARCH, compile, families, image};

/// Where the driver's library is in the containers: no loader looks there by itself.
const FOLDER: &str = "/opt/driver/lib";

/// A libcuda whose name of the given version says whose it is.
fn library(out: &Path, whose: &str) -> Result<()> {
    std::fs::create_dir_all(out.parent().context("a folder")?)?;
    let whose = format!("-DWHOSE=\"{whose}\"");
    let args = [
        "-shared",
        "-fPIC",
        "-nostdlib",
        "-Wl,-soname,libcuda.so.1",
        &whose,
    ];
    compile("cc", &args, "library.c", out)
}

fn hook(args: &[&str]) -> serde_json::Value {
    let args: Vec<&str> = ["nvidia-cdi-hook"].iter().chain(args).copied().collect();
    serde_json::json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": args})
}

/// The hooks that NVIDIA's generator writes, with the driver's version.
fn usual(driver: &str) -> Vec<serde_json::Value> {
    vec![
        // By the name it has in itself, and by the one that programs are linked with.
        hook(&[
            "create-symlinks",
            "--link",
            &format!("libcuda.so.570.86.15::{FOLDER}/libcuda.so.1"),
            "--link",
            &format!("libcuda.so.1::{FOLDER}/libcuda.so"),
        ]),
        hook(&["enable-cuda-compat", &format!("--host-driver-version={driver}")]),
        hook(&["update-ldcache", "--folder", FOLDER]),
        hook(&["disable-device-node-modification"]),
        hook(&["update-application-profile"]),
    ]
}

/// Makes the driver's library, and the device `slipway.test/gpu=NAME` with these hooks.
fn device(w: &World, name: &str, hooks: &[serde_json::Value]) -> Result<()> {
    let file = w.lab.join("driver/libcuda.so.570.86.15");
    if !file.exists() {
        library(&file, "the driver's")?;
    }
    let mount = serde_json::json!({"hostPath": file, "containerPath": format!("{FOLDER}/libcuda.so.570.86.15"),
        "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]});
    let edits = serde_json::json!({"mounts": [mount], "hooks": hooks});
    let file = serde_json::json!({"cdiVersion": "0.7.0", "kind": "slipway.test/gpu",
        "devices": [{"name": name, "containerEdits": edits}]});
    w.lab
        .write(format!("cdi-dynamic/{name}.json"), file.to_string())?;
    Ok(())
}

/// A container of the image that has the device and loads these libraries.
fn loads(name: &str, image: &str, device: &str, libraries: &[&str]) -> v1::ContainerConfig {
    let command: Vec<&str> = ["/opens"].iter().chain(libraries).copied().collect();
    let mut c = container_config(name, image, &command);
    c.cdi_devices = vec![v1::CdiDevice {
        name: format!("slipway.test/gpu={device}"),
    }];
    c
}

/// What the container wrote until its end.
async fn said(w: &World, name: &str, c: v1::ContainerConfig) -> Result<Vec<String>> {
    let (_, id) = w.pod_with(name, c).await?;
    w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    Ok(w.log(name)?.into_iter().map(|l| l.text).collect())
}

#[tokio::test]
async fn a_program_of_any_distribution_finds_libcuda_by_its_name() -> Result<()> {
    let w = World::with_cdi("g-families").await?;
    device(&w, "0", &usual("570.86.15"))?;
    for family in families() {
        let image = image(&w, &family, |_| Ok(()))?;
        let c = loads(family.name, &image, "0", &["libcuda.so.1", "libcuda.so"]);
        let lines = said(&w, family.name, c).await?;
        let wanted = ["libcuda.so.1: the driver's", "libcuda.so: the driver's"];
        assert_eq!(lines, wanted, "on {}", family.name);
    }
    w.finish().await
}

#[tokio::test]
async fn so_does_one_on_a_read_only_root_and_one_in_a_user_namespace() -> Result<()> {
    let w = World::with_cdi("g-hookroot").await?;
    device(&w, "0", &usual("570.86.15"))?;
    let [debian, ..] = families();
    let image = image(&w, &debian, |_| Ok(()))?;
    let mut c = loads("readonly", &image, "0", &["libcuda.so.1"]);
    let security = c
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    security.readonly_rootfs = true;
    assert_eq!(said(&w, "readonly", c).await?, ["libcuda.so.1: the driver's"]);

    let mut config = pod_config("users", &w.lab, false);
    let user = own_users(&mut config);
    let mut c = loads("users", &image, "0", &["libcuda.so.1"]);
    let security = c
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    security.namespace_options.get_or_insert_default().userns_options = Some(user);
    let pod = w.cri.run_pod(config.clone()).await?;
    let id = w.cri.run(&pod, c, config).await?;
    w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    let lines: Vec<String> = w.log("users")?.into_iter().map(|l| l.text).collect();
    assert_eq!(lines, ["libcuda.so.1: the driver's"]);
    w.finish().await
}

#[tokio::test]
async fn an_images_newer_libcuda_is_used_where_the_driver_is_older() -> Result<()> {
    let w = World::with_cdi("g-compat").await?;
    let [debian, ..] = families();
    let image = image(&w, &debian, |root| {
        library(
            &root.join("usr/local/cuda-13/compat/libcuda.so.580.10.1"),
            "the image's",
        )?;
        std::os::unix::fs::symlink("cuda-13", root.join("usr/local/cuda"))?;
        Ok(())
    })?;
    for (driver, wanted) in [("570.86.15", "the image's"), ("580.1.0", "the driver's")] {
        let name = format!("v{}", &driver[..3]);
        device(&w, &name, &usual(driver))?;
        let lines = said(&w, &name, loads(&name, &image, &name, &["libcuda.so.1"])).await?;
        assert_eq!(lines, [format!("libcuda.so.1: {wanted}")], "driver {driver}");
    }
    w.finish().await
}

/// CVE-2024-0132, CVE-2025-23267: what the image has links in place of leads nobody out of the container.
#[tokio::test]
async fn links_of_an_image_lead_no_hook_out_of_the_container() -> Result<()> {
    let w = World::with_cdi("g-hooklink").await?;
    let outside = w.lab.join("outside");
    std::fs::create_dir_all(&outside)?;
    std::fs::write(outside.join("ld.so.conf"), "the host's\n")?;
    let mut hooks = usual("570.86.15");
    hooks.push(hook(&["create-symlinks", "--link", "/evil::/through/link"]));
    hooks.push(hook(&["chmod", "--mode", "777", "--path", "/through/ld.so.conf"]));
    device(&w, "0", &hooks)?;
    let [mut debian, ..] = families();
    debian.files = &[];
    let away = outside.display().to_string();
    let image = image(&w, &debian, |root| {
        for name in ["etc", "through"] {
            std::os::unix::fs::symlink(&away, root.join(name))?;
        }
        std::os::unix::fs::symlink(format!("../../../../../../../..{away}"), root.join("usr"))?;
        Ok(())
    })?;
    // Whether it runs is the image's affair; what is outside is ours.
    let ran = w
        .pod_with("link", loads("link", &image, "0", &["libcuda.so.1"]))
        .await;
    if let Ok((_, id)) = ran {
        w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    }
    let there: Vec<_> = std::fs::read_dir(&outside)?
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert_eq!(there, ["ld.so.conf"]);
    let file = outside.join("ld.so.conf");
    assert_eq!(std::fs::read_to_string(&file)?, "the host's\n");
    use std::os::unix::fs::PermissionsExt as _;
    assert_ne!(file.metadata()?.permissions().mode() & 0o777, 0o777);
    w.finish().await
}

/// The kernel's files are writable until the container is confined, which comes after its hooks.
#[tokio::test]
async fn links_of_an_image_lead_no_hook_into_the_kernels_files() -> Result<()> {
    const FILE: &str = "/proc/sys/kernel/domainname";
    let w = World::with_cdi("g-hookproc").await?;
    let mut hooks = usual("570.86.15");
    hooks.push(hook(&["create-symlinks", "--link", "/evil::/links/evil"]));
    hooks.push(hook(&["chmod", "--mode", "600", "--path", "/etc/domainname"]));
    device(&w, "0", &hooks)?;
    let before = std::fs::read_to_string(FILE)?;
    let [debian, ..] = families();
    let image = image(&w, &debian, |root| {
        library(
            &root.join("usr/local/cuda/compat/libcuda.so.580.10.1"),
            "the image's",
        )?;
        let profiles = "etc/nvidia/nvidia-application-profiles-rc.d";
        std::fs::create_dir_all(root.join(profiles))?;
        for name in [
            "etc/ld.so.conf.d/00-compat-slipway.conf",
            "etc/ld.so.conf.d/00-nvcr-slipway.conf",
            "etc/ld.so.conf.d/zz-nvcr-slipway.conf",
            &format!("etc/ld-musl-{ARCH}.path"),
            &format!("{profiles}/10-container.conf"),
            "etc/domainname",
        ] {
            std::os::unix::fs::symlink(FILE, root.join(name))?;
        }
        std::fs::write(root.join("etc/alpine-release"), "3.23.0\n")?;
        // Endless, where it is read for what it includes.
        std::os::unix::fs::symlink("/proc/kmsg", root.join("etc/ld.so.conf.d/a.conf"))?;
        std::os::unix::fs::symlink("/proc/sys/kernel", root.join("links"))?;
        Ok(())
    })?;
    for network in [true, false] {
        let name = format!("proc{network}");
        let mut config = pod_config(&name, &w.lab, network);
        config.hostname = String::new();
        let pod = w.cri.run_pod(config.clone()).await?;
        let c = loads(&name, &image, "0", &["libcuda.so.1"]);
        // Whether it runs is the image's affair.
        if let Ok(id) = w.cri.run(&pod, c, config).await {
            w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
        }
        assert_eq!(std::fs::read_to_string(FILE)?, before);
    }
    let mode = std::fs::metadata(FILE)?.permissions();
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(mode.mode() & 0o777, 0o644);
    w.finish().await
}

#[tokio::test]
async fn a_hook_that_cannot_be_done_fails_the_container_and_an_unknown_one_is_not_skipped() -> Result<()> {
    let w = World::with_cdi("g-hookfail").await?;
    let [debian, ..] = families();
    let image = image(&w, &debian, |_| Ok(()))?;
    let link = format!("x::{FOLDER}");
    for (name, hook, wanted) in [
        (
            "inway",
            hook(&["create-symlinks", "--link", &link]),
            "make the link /opt/driver/lib to x",
        ),
        (
            "absent",
            hook(&["update-ldcache", "--ldconfig-path", "/no/such/ldconfig"]),
            "/no/such/ldconfig",
        ),
        // A verb that we do not know is its program's, which is not here.
        ("unknown", hook(&["make-coffee"]), "/usr/bin/nvidia-cdi-hook"),
    ] {
        device(&w, name, &[hook])?;
        let ran = w
            .pod_with(name, loads(name, &image, name, &["libcuda.so.1"]))
            .await;
        let text = format!("{:#}", ran.expect_err("a hook that cannot be done"));
        assert!(
            text.contains("createContainer hook") && text.contains(wanted),
            "{text}"
        );
    }
    w.finish().await
}

/// `apply-cuda-memory-limits` asks the driver's library, which no static program can: it is its own program's where a container
/// has both variables, refused where that is not there, and nothing at all where no limit is asked for.
#[tokio::test]
async fn a_limit_of_gpu_memory_is_set_by_its_program_or_refused_and_is_nothing_where_none_is_asked_for()
-> Result<()> {
    let w = World::with_cdi("g-hookmemory").await?;
    let [debian, ..] = families();
    let image = image(&w, &debian, |_| Ok(()))?;
    let limits = |program: &str| {
        serde_json::json!({"hookName": "createRuntime", "path": program,
            "args": ["nvidia-cdi-hook", "apply-cuda-memory-limits", "--driver-root", "/", "--gpu-id", "GPU-0-FAKE-UUID"]})
    };
    let with = |name: &str, device: &str, variables: &[&str]| {
        let mut c = loads(name, &image, device, &["libcuda.so.1"]);
        c.envs = variables
            .iter()
            .map(|v| v1::KeyValue {
                key: format!("NVIDIA_GPU_MEMORY_{v}"),
                value: b"1024".to_vec(),
            })
            .collect();
        c
    };
    // What that program reads: the container's environment in the bundle's config.json, and its process's cgroup.
    let out = w.lab.join("memory-limits");
    let script = format!(
        "#!/bin/sh\nstate=$(cat)\nof() {{ echo \"$state\" | sed -n \"s/.*\\\"$1\\\": *\\\"\\{{0,1\\}}\\([^,\\\"}}]*\\).*/\\1/p\"; }}\n\
         {{ echo $1 $5; grep -o 'NVIDIA_GPU_MEMORY_[A-Z]*=[0-9]*' \"$(of bundle)/config.json\"; cat /proc/$(of pid)/cgroup; }} > {}\n",
        out.display()
    );
    let program = w.lab.write("hooks/nvidia-cdi-hook", script)?;
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let mut hooks = usual("570.86.15");
    hooks.push(limits("/no/such/nvidia-cdi-hook"));
    device(&w, "absent", &hooks)?;
    hooks.pop();
    hooks.push(limits(&program.display().to_string()));
    device(&w, "there", &hooks)?;

    for (name, device, variables) in [
        ("none", "absent", &[][..]),
        ("half", "absent", &["LIMIT"]),
        ("idle", "there", &[]),
    ] {
        let lines = said(&w, name, with(name, device, variables)).await?;
        assert_eq!(lines, ["libcuda.so.1: the driver's"], "{name}");
        assert!(!out.exists(), "{name} asks for nothing");
    }
    let refused = w
        .pod_with("refused", with("refused", "absent", &["REQUEST", "LIMIT"]))
        .await;
    let text = format!("{:#}", refused.expect_err("it would run without its limit"));
    assert!(
        text.contains("NVIDIA_GPU_MEMORY_LIMIT") && text.contains("/no/such/nvidia-cdi-hook is not there"),
        "{text}"
    );
    let (_, id) = w
        .pod_with("limited", with("limited", "there", &["REQUEST", "LIMIT"]))
        .await?;
    w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    let read = std::fs::read_to_string(&out)?;
    for wanted in [
        "apply-cuda-memory-limits GPU-0-FAKE-UUID",
        "NVIDIA_GPU_MEMORY_REQUEST=1024",
        "NVIDIA_GPU_MEMORY_LIMIT=1024",
        &id,
    ] {
        assert!(read.contains(wanted), "no {wanted} in {read}");
    }
    w.finish().await
}
