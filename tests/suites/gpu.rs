//! Containers with GPUs: slipway-agent's CDI file, made of a fake driver, as slipwayd gives it to containers.
#![forbid(unsafe_code)]

mod gpu_build;

#[path = "gpu/families.rs"]
mod families;
#[path = "gpu/real.rs"]
mod real;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::containerd::Containerd;
use harness::cri::{container_config, own_users, pod_config};
use harness::image::BUSYBOX;
use harness::{World, lab, v1};
use slipway_fake_gpu::{Driver, FOLDER, Topology};

/// busybox with a C library, and `opens`, which loads libcuda by its name alone as every CUDA program does.
const WITH_LIBC: &str = "slipway.test/libc:1";

const OPENS: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
int main(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) { puts(dlerror()); return 1; }
  int (*version)(void) = (int (*)(void))dlsym(library, "libcuda_fake");
  printf("libcuda %d\n", version ? version() : -1);
  return 0;
}
"#;

fn cc(source: &str, to: &Path) -> Result<()> {
    let mut cc = Command::new("cc")
        .args(["-std=gnu11", "-x", "c", "-", "-o"])
        .arg(to)
        .stdin(Stdio::piped())
        .spawn()
        .context("starting cc (tests/setup/build-deps.sh installs it)")?;
    cc.stdin
        .take()
        .context("no stdin")?
        .write_all(source.as_bytes())?;
    ensure!(cc.wait()?.success(), "cc could not make {}", to.display());
    Ok(())
}

/// Makes [`WITH_LIBC`] with these programs, by name and source, and these of the machine's libraries where it has them.
fn image(w: &World, programs: &[(&str, &str)], libraries: &[&str]) -> Result<()> {
    let dir = w.lab.join("libc-context");
    let (bin, lib, loader) = ("rootfs/bin", "rootfs/lib/x86_64-linux-gnu", "rootfs/lib64");
    for d in [bin, lib, loader] {
        std::fs::create_dir_all(dir.join(d))?;
    }
    for (name, source) in programs {
        cc(source, &dir.join(bin).join(name))?;
    }
    std::fs::copy(
        "/lib64/ld-linux-x86-64.so.2",
        dir.join(loader).join("ld-linux-x86-64.so.2"),
    )?;
    let from = Path::new("/lib/x86_64-linux-gnu");
    std::fs::copy(from.join("libc.so.6"), dir.join(lib).join("libc.so.6"))?;
    for library in libraries.iter().filter(|l| from.join(l).exists()) {
        std::fs::copy(from.join(library), dir.join(lib).join(library))?;
    }
    std::fs::write(
        dir.join("Dockerfile"),
        format!("FROM {BUSYBOX}\nCOPY rootfs/ /\n"),
    )?;
    harness::image::run_slipway(&w.lab, &["build", "-t", WITH_LIBC, &dir.display().to_string()])?.ok()?;
    Ok(())
}

/// A world with a driver, and its CDI file made by slipway-agent.
async fn world(what: &str, topology: &str) -> Result<(World, Driver, Topology)> {
    let w = World::with_cdi(what).await?;
    image(&w, &[("opens", OPENS)], &[])?;
    let topology = Topology::named(topology)?;
    let driver = Driver::lay_out(&w.lab.join("driver"), &topology)?;
    let config = format!(
        "[driver]\nroot = {:?}\ndev = {:?}\n[paths]\nproc = {:?}\nsys = {:?}\n",
        driver.root(),
        driver.dev(),
        driver.proc(),
        driver.sys()
    );
    let config = w.lab.write("agent.toml", config)?;
    let out = Command::new(lab::bin("slipway-agent"))
        .arg("--config")
        .arg(config)
        .args(["cdi", "generate", "--output"])
        .arg(w.lab.join("cdi-dynamic"))
        .env(FOLDER, driver.nvml())
        .output()
        .context("starting slipway-agent (make build makes it)")?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok((w, driver, topology))
}

fn security(c: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    c.linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

fn with(c: &mut v1::ContainerConfig, device: &str) {
    c.image = Some(v1::ImageSpec {
        image: WITH_LIBC.into(),
        ..Default::default()
    });
    c.cdi_devices = vec![v1::CdiDevice {
        name: format!("nvidia.com/gpu={device}"),
    }];
    security(c).capabilities = Some(v1::Capability {
        add_capabilities: vec!["MKNOD".into()],
        ..Default::default()
    });
}

/// What a container has, loads, and may open. The devices have no driver: opening one that is allowed says so.
const LOOK: &str = "ls /dev | grep nvidia | tr '\\n' ' '; echo; opens; echo $NVIDIA_VISIBLE_DEVICES; for l in /dev/dri/by-path/*; do readlink $l; done; \
    cat /dev/nvidia1 2>&1; for minor in 0 2 3; do mknod /dev/other$minor c 195 $minor 2>/dev/null && cat /dev/other$minor 2>&1; done; \
    touch /usr/lib/x86_64-linux-gnu/libcuda.so.1 2>/dev/null || echo read-only";

/// The file's hooks are run there by containerd's runtimes: runc, and our shim, which does them itself.
#[tokio::test]
async fn containerd_gives_a_container_the_same_gpu_by_the_same_file() -> Result<()> {
    let (w, _driver, _) = world("gpu-ctrd", "workstation").await?;
    let tar = w.lab.join("image.tar").display().to_string();
    harness::image::run_slipway(&w.lab, &["save", "-o", &tar, WITH_LIBC])?.ok()?;
    let containerd = Containerd::start(&w.lab)?;
    containerd.ctr(&["images", "import", &tar])?.ok()?;
    let fifos = w.lab.join("fifos").display().to_string();
    let look = "opens; ls /dev | grep nvidia | tr '\\n' ' '; echo; grep -c libcuda.so.1 /etc/ld.so.cache; for l in /dev/dri/by-path/*; do readlink $l; done";
    for runtime in ["io.containerd.runc.v2", "io.containerd.slipway.v1"] {
        let cgroup = format!("{}/{runtime}", w.lab.cgroup());
        let run = [
            "run",
            "--rm",
            "--runtime",
            runtime,
            "--cgroup",
            &cgroup,
            "--fifo-dir",
            &fifos,
            "--device",
            "nvidia.com/gpu=0",
            WITH_LIBC,
            "gpu",
            "sh",
            "-c",
            look,
        ];
        let said = containerd
            .ctr_with_cdi(&w.lab.join("cdi-dynamic"), &run)?
            .ok()
            .context(runtime)?;
        let lines: Vec<&str> = said.stdout.lines().collect();
        let nodes = "nvidia-modeset nvidia-uvm nvidia-uvm-tools nvidia1 nvidiactl ";
        let wanted = ["libcuda 580", nodes, "1", "../card0", "../renderD128"];
        assert_eq!(lines, wanted, "{runtime}");
    }
    drop(containerd);
    w.finish().await
}

#[tokio::test]
async fn a_container_has_its_own_gpu_and_the_drivers_library_and_opens_no_other() -> Result<()> {
    let (w, _driver, topology) = world("gpu-one", "workstation").await?;
    // The first card's minor number is 1.
    let uuid = topology.gpus[0].uuid.clone();
    for read_only in [false, true] {
        let set = |c: &mut v1::ContainerConfig| {
            with(c, &uuid);
            security(c).readonly_rootfs = read_only;
        };
        let (_, lines) = w.shell(&format!("one{read_only}"), set, LOOK).await?;
        let denied = |n| format!("cat: can't open '/dev/other{n}': Operation not permitted");
        assert_eq!(
            lines,
            [
                "nvidia-modeset nvidia-uvm nvidia-uvm-tools nvidia1 nvidiactl ",
                "libcuda 580",
                "void",
                "../card0",
                "../renderD128",
                "cat: can't open '/dev/nvidia1': No such device or address",
                &denied(0),
                &denied(2),
                &denied(3),
                "read-only",
            ],
            "read-only root: {read_only}"
        );
    }
    w.finish().await
}

#[tokio::test]
async fn two_pods_on_two_slices_of_one_gpu_have_their_own_capabilities_only() -> Result<()> {
    let (w, _driver, topology) = world("gpu-mig", "a100x4-mig").await?;
    let slices = &topology.gpus[1].mig.as_ref().context("no MIG")?.devices;
    for slice in &slices[..2] {
        let caps = 3 + 135 + slice.gi * 9;
        let script = "ls /dev/nvidia-caps | tr '\\n' ' '; echo; ls /dev | grep 'nvidia[0-9]'; ls /dev/dri 2>/dev/null || echo no display";
        let name = format!("mig{}", slice.gi);
        let (_, lines) = w.shell(&name, |c| with(c, &slice.uuid), script).await?;
        assert_eq!(
            lines,
            [
                format!("nvidia-cap{caps} nvidia-cap{} ", caps + 1).as_str(),
                "nvidia1",
                "no display"
            ]
        );
    }
    w.finish().await
}

#[tokio::test]
async fn in_a_user_namespace_the_gpu_and_the_library_are_there_too() -> Result<()> {
    let (w, _driver, _) = world("gpu-user", "workstation").await?;
    let mut config = pod_config("user", &w.lab, false);
    let user = own_users(&mut config);
    let pod = w.cri.run_pod(config.clone()).await?;
    let script = "opens; cat /dev/nvidia1 2>&1; ls /dev | grep 'nvidia[0-9]'; for l in /dev/dri/by-path/*; do readlink $l; done";
    let mut c = container_config("user", WITH_LIBC, &["sh", "-c", script]);
    with(&mut c, "0");
    security(&mut c)
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(user);
    let id = w.cri.run(&pod, c, config).await?;
    w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    let lines: Vec<_> = w.log("user")?.into_iter().map(|l| l.text).collect();
    assert_eq!(
        lines,
        [
            "libcuda 580",
            "cat: can't open '/dev/nvidia1': No such device or address",
            "nvidia1",
            "../card0",
            "../renderD128"
        ]
    );
    w.finish().await
}

/// By the file as the agent makes it: where the driver's libraries lie on the node, no loader but Debian's looks by itself.
#[tokio::test]
async fn a_program_of_any_distribution_finds_libcuda_by_its_name_in_the_agents_own_file() -> Result<()> {
    let (w, _driver, topology) = world("gpu-families", "workstation").await?;
    let wanted =
        ["libcuda.so.1", "libcuda.so"].map(|name| format!("{name}: libcuda.so.{}", topology.driver_version));
    for family in families::families() {
        let image = families::image(&w, &family, |_| Ok(()))?;
        for kind in ["plain", "readonly", "users"] {
            let name = format!("{}-{kind}", family.name);
            let mut config = pod_config(&name, &w.lab, false);
            let mut c = container_config(&name, &image, &["/opens", "libcuda.so.1", "libcuda.so"]);
            c.cdi_devices = vec![v1::CdiDevice {
                name: "nvidia.com/gpu=0".into(),
            }];
            security(&mut c).readonly_rootfs = kind == "readonly";
            if kind == "users" {
                let users = Some(own_users(&mut config));
                let options = &mut security(&mut c).namespace_options;
                options.get_or_insert_default().userns_options = users;
            }
            let pod = w.cri.run_pod(config.clone()).await?;
            let id = w.cri.run(&pod, c, config).await?;
            w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
            let lines: Vec<_> = w.log(&name)?.into_iter().map(|l| l.text).collect();
            assert_eq!(lines, wanted, "{name}");
        }
    }
    w.finish().await
}
