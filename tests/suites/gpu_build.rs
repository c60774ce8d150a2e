//! GPUs while an image is built: a RUN step sees the GPU, and the image has nothing of it.

use anyhow::{Context, Result, ensure};
use harness::Lab;
use harness::cmd::Output;

use super::{WITH_LIBC, world};

fn build(lab: &Lab, dockerfile: &str, args: &[&str]) -> Result<Output> {
    let context = lab.join("gpu-context");
    lab.write("gpu-context/Dockerfile", dockerfile)?;
    let (cdi, context) = (lab.join("cdi-dynamic"), context.display().to_string());
    let cdi = cdi.display().to_string();
    let mut all = vec!["build", "--progress", "plain", "--cdi-spec-dir", &cdi];
    all.extend(args);
    all.push(&context);
    harness::image::run_slipway(lab, &all)
}

/// What the commands of a build wrote.
fn said(output: &Output) -> Vec<&str> {
    output
        .stdout
        .lines()
        .filter_map(|l| l.split_once("] ")?.1.trim_start().split_once(' '))
        .filter(|(time, _)| time.parse::<f64>().is_ok())
        .map(|(_, text)| text)
        .collect()
}

fn cached(output: &Output) -> usize {
    output.stdout.matches("CACHED").count()
}

/// What a step has, loads and may open. The first card's minor number is 1.
const LOOK: &str = "ls /dev | grep nvidia | tr '\\n' ' '; echo; opens; echo $NVIDIA_VISIBLE_DEVICES; \
    for minor in 0 1; do mknod /dev/own$minor c 195 $minor; cat /dev/own$minor 2>&1; done; true";

const ABSENT: &str = "libcuda.so.1: cannot open shared object file: No such file or directory";

#[tokio::test]
async fn a_run_step_sees_the_gpu_that_its_build_gives_it_and_the_next_one_does_not() -> Result<()> {
    let (w, _driver, _) = world("gpu-build", "workstation").await?;
    let text = format!(
        "FROM {WITH_LIBC}\nRUN --device=nvidia.com/gpu=0,required {LOOK}\nRUN {LOOK}\n\
         USER appuser\nRUN --device=nvidia.com/gpu=all ls /dev | grep 'nvidia[0-9]' | tr '\\n' ' '; echo; opens; id -u; cat /dev/nvidia0 2>&1 || true\n"
    );
    let args = ["-t", "gpu/built:1", "--allow=device=nvidia.com/gpu=*"];
    let first = build(&w.lab, &text, &args)?.ok()?;
    let none = "No such device or address";
    let denied = |n| format!("cat: can't open '/dev/own{n}': Operation not permitted");
    let lines = said(&first);
    assert_eq!(
        lines,
        [
            "nvidia-modeset nvidia-uvm nvidia-uvm-tools nvidia1 nvidiactl ",
            "libcuda 580",
            "void",
            &denied(0),
            &format!("cat: can't open '/dev/own1': {none}"),
            "",
            ABSENT,
            "",
            &denied(0),
            &denied(1),
            "nvidia0 nvidia1 ",
            "libcuda 580",
            "1000",
            &format!("cat: can't open '/dev/nvidia0': {none}"),
        ],
        "{}",
        first.stdout
    );
    // The same again is in the cache; a node that has other devices of these names is not asked.
    let second = build(&w.lab, &text, &args)?.ok()?;
    assert_eq!(cached(&second), 3, "{}", second.stdout);
    // What was built runs, without the GPU.
    let set = |c: &mut harness::v1::ContainerConfig| {
        c.image = Some(harness::v1::ImageSpec {
            image: "gpu/built:1".into(),
            ..Default::default()
        });
    };
    let script = "opens; echo env=$NVIDIA_VISIBLE_DEVICES; find / -xdev -name '*nvidia*' -o -xdev -name 'libcuda*' -o -xdev -name 'ld.so.c*'";
    let (_, lines) = w.shell("after", set, script).await?;
    assert_eq!(lines, [ABSENT, "env="]);
    w.finish().await
}

#[tokio::test]
async fn every_run_step_has_the_devices_of_the_command_line_and_leaves_nothing_of_them() -> Result<()> {
    let (w, _driver, _) = world("gpu-build2", "h100x8").await?;
    let text = format!(
        "FROM {WITH_LIBC}\nRUN opens > /said; ls /dev | grep -c 'nvidia[0-9]' >> /said\nRUN cat /said; opens\n"
    );
    let build = |name: &str, more: &[&str]| -> Result<Output> {
        let mut args = vec!["--no-cache", "-t", name];
        args.extend(more);
        build(&w.lab, &text, &args)?.ok()
    };
    let with = build("gpu/with:1", &["--device", "nvidia.com/gpu=all"])?;
    assert_eq!(
        said(&with),
        ["libcuda 580", "8", "libcuda 580"],
        "{}",
        with.stdout
    );
    let names = layers(&w.lab, "gpu/with:1", 2)?;
    // The image has none of the three, and each container needs them.
    assert_eq!(names, ["dev/", "proc/", "said", "sys/"]);
    let one = build("gpu/one:1", &["--device", "nvidia.com/gpu=0"])?;
    assert_eq!(said(&one), ["libcuda 580", "1", "libcuda 580"], "{}", one.stdout);
    w.finish().await
}

#[tokio::test]
async fn a_gpu_that_is_not_there_or_not_granted_is_refused_and_nothing_is_left() -> Result<()> {
    let (w, driver, _) = world("gpu-build3", "workstation").await?;
    let cdi = w.lab.join("cdi-dynamic").display().to_string();
    let unknown = format!("CDI device nvidia.com/gpu=7 is not defined in {cdi}");
    let ask = |device: &str| format!("FROM {WITH_LIBC}\nRUN echo begun\nRUN --device={device} opens\n");
    for (device, args, want) in [
        (
            "nvidia.com/gpu=7,required",
            &["--allow", "device"][..],
            unknown.as_str(),
        ),
        ("nvidia.com/gpu=0", &["--device", "nvidia.com/gpu=7"], &unknown),
        (
            "nvidia.com/gpu=all",
            &[],
            "give slipway build --allow=device=nvidia.com/gpu=all",
        ),
        ("/dev/nvidia0", &[], "a device is given by its name in a CDI file"),
        ("nvidia.com/gpu=0,requird", &[], "did you mean required?"),
    ] {
        let output = build(&w.lab, &ask(device), args)?;
        ensure!(output.code != 0, "{device}: {output:?}");
        assert!(output.stderr.contains(want), "{device}: {}", output.stderr);
        assert!(!output.stdout.contains("begun\n"), "{device}: {}", output.stdout);
    }
    // A driver that has gone since its file was written.
    std::fs::remove_dir_all(driver.root())?;
    let output = build(&w.lab, &ask("nvidia.com/gpu=0"), &["--allow", "device"])?;
    ensure!(output.code != 0, "{output:?}");
    let want = format!("device names {}", driver.root().display());
    assert!(output.stderr.contains(&want), "{}", output.stderr);
    let want = "No such file or directory";
    assert!(output.stderr.contains(want), "{}", output.stderr);
    assert!(!output.stdout.contains("begun\n"), "{}", output.stdout);
    let images = harness::image::run_slipway(&w.lab, &["images", "-q"])?.ok()?;
    assert_eq!(images.stdout.lines().count(), 2, "{}", images.stdout);
    let builds = w.lab.join("state/builds");
    let left = std::fs::read_dir(&builds).map_or(0, Iterator::count);
    assert_eq!(left, 0, "{}", builds.display());
    w.finish().await
}

#[tokio::test]
async fn a_loaders_cache_that_the_command_makes_names_nothing_of_the_driver() -> Result<()> {
    let (w, _driver, _) = world("gpu-build4", "workstation").await?;
    // As a package's installation does.
    ldconfig(&w.lab)?;
    let base = format!("FROM {WITH_LIBC}\nCOPY ldconfig /sbin/ldconfig\n");
    build(&w.lab, &base, &["-t", "gpu/ldconfig:1"])?.ok()?;
    let look = "for l in libcuda.so.1 libc.so.6; do grep -c $l /etc/ld.so.cache; done; true";
    let text = format!(
        "FROM gpu/ldconfig:1\nRUN --device=nvidia.com/gpu=0 /sbin/ldconfig; {look}; touch /etc/own\nRUN {look}\n"
    );
    let built = build(&w.lab, &text, &["-t", "gpu/cache:1", "--allow", "device"])?.ok()?;
    assert_eq!(said(&built), ["1", "1", "0", "1"], "{}", built.stdout);
    let names = layers(&w.lab, "gpu/cache:1", 2)?;
    let etc: Vec<_> = names.iter().filter(|n| n.starts_with("etc/")).collect();
    assert_eq!(etc, ["etc/", "etc/ld.so.cache", "etc/own"], "{names:?}");
    let of_driver = names.iter().find(|n| n.contains("nv") || n.contains("cuda"));
    assert_eq!(of_driver, None);
    w.finish().await
}

#[tokio::test]
async fn what_a_commands_ldconfig_finds_and_counts_on_stays_in_the_image() -> Result<()> {
    let (w, _driver, _) = world("gpu-build5", "workstation").await?;
    ldconfig(&w.lab)?;
    for (library, soname) in [
        ("liba.so.1.2", "liba.so.1"),
        ("libb.so.1.1", "libb.so.1"),
        ("libb.so.1.2", "libb.so.1"),
        ("libd.so.1.0", "libd.so.1"),
    ] {
        let to = w.lab.join("gpu-context").join(library).display().to_string();
        harness::cmd::sh(&format!(
            "echo | cc -shared -nostdlib -x c - -Wl,-soname,{soname} -o {to}"
        ))?;
    }
    // The device's own ldconfig has made the links before the command's looks for them; no configuration names /opt/d.
    let text = format!(
        "FROM {WITH_LIBC}\nCOPY ldconfig /sbin/ldconfig\nCOPY liba.so.1.2 libb.so.1.1 /usr/lib/\nCOPY libd.so.1.0 /opt/d/\n\
         RUN ln -s libb.so.1.1 /usr/lib/libb.so.1; mkdir -p /var/cache\nCOPY libb.so.1.2 /usr/lib/\n\
         RUN --device=nvidia.com/gpu=0 /sbin/ldconfig /opt/d && echo /opt/own >> /etc/ld.so.conf && chmod 0 /sbin/ldconfig\n\
         RUN for l in /usr/lib/liba.so.1 /usr/lib/libb.so.1 /opt/d/libd.so.1; do readlink $l; grep -c $l /etc/ld.so.cache; done; \
         grep -c -e libcuda -e libnvidia /etc/ld.so.cache; cat /etc/ld.so.conf; find /var/cache\n"
    );
    let built = build(&w.lab, &text, &["-t", "gpu/links:1", "--allow", "device"])?.ok()?;
    assert_eq!(
        said(&built),
        [
            "liba.so.1.2",
            "1",
            "libb.so.1.2",
            "1",
            "libd.so.1.0",
            "1",
            "0",
            "/opt/own",
            "/var/cache",
            "/var/cache/ldconfig"
        ],
        "{}",
        built.stdout
    );
    w.finish().await
}

#[tokio::test]
async fn a_cache_mount_and_a_device_are_not_mixed() -> Result<()> {
    let (w, _driver, _) = world("gpu-build6", "workstation").await?;
    let library = w.lab.write("libv.so.1", "a library")?;
    let file = format!(
        r#"{{"cdiVersion":"0.6.0","kind":"v.com/gpu","devices":[{{"name":"0","containerEdits":{{"mounts":[
            {{"hostPath":"{}","containerPath":"/usr/lib/v/libv.so.1","options":["ro","bind"]}}]}}}}]}}"#,
        library.display()
    );
    w.lab.write("cdi-dynamic/v.json", file)?;
    let ask = |target: &str| {
        format!(
            "FROM {WITH_LIBC}\nRUN --device=v.com/gpu=0 --mount=type=cache,target={target} ls {target}; \
             cat /usr/lib/v/libv.so.1; echo; touch {target}/kept\nRUN --mount=type=cache,target={target} ls {target}\n"
        )
    };
    let output = build(&w.lab, &ask("/usr/lib/v"), &["--allow", "device"])?;
    ensure!(output.code != 0, "{output:?}");
    let want = "/usr/lib/v/libv.so.1 inside the cache mount /usr/lib/v,";
    assert!(output.stderr.contains(want), "{}", output.stderr);
    let output = build(
        &w.lab,
        &ask("/cache"),
        &["--allow=device", "--allow=device=v.com/gpu=7"],
    )?
    .ok()?;
    assert_eq!(said(&output), ["a library", "kept"], "{}", output.stdout);
    // A grant of nothing is told.
    let told = "--allow=device=v.com/gpu=7: CDI device v.com/gpu=7 is not defined in";
    assert!(output.stdout.contains(told), "{output:?}");
    w.finish().await
}

/// A program that makes the loader's cache, for images to copy.
fn ldconfig(lab: &Lab) -> Result<()> {
    let ldconfig = ["/sbin/ldconfig.real", "/sbin/ldconfig"];
    let ldconfig = ldconfig.into_iter().find(|p| std::path::Path::new(p).exists());
    std::fs::create_dir_all(lab.join("gpu-context"))?;
    std::fs::copy(ldconfig.context("no ldconfig")?, lab.join("gpu-context/ldconfig"))?;
    Ok(())
}

/// What is in an image's last layers.
fn layers(lab: &Lab, image: &str, count: usize) -> Result<Vec<String>> {
    let tar = lab.join("image.tar").display().to_string();
    harness::image::run_slipway(lab, &["save", "-o", &tar, image])?.ok()?;
    let out = lab.join("image").display().to_string();
    harness::cmd::sh(&format!("mkdir {out} && tar -C {out} -xf {tar}"))?;
    let names = harness::cmd::sh(&format!(
        "cd {out}; for l in $(grep -o '[0-9a-f]*/layer.tar' manifest.json | tail -{count}); do tar -tf $l; done"
    ))?;
    Ok(names.lines().map(str::to_owned).collect())
}
