//! The Dockerfiles of the tutorials this project grew from, each on a base made for it: the file tree and the config
//! equal what BuildKit makes of them.
//!
//! What BuildKit makes is recorded in tests/fixtures/seeds/*/*.golden.json. `UPDATE=1` records it anew with a real
//! BuildKit (tests/setup/go-tools.sh buildkit runc containerd).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::image::{run_slipway, slipway};
use harness::oracle::{self, Image, Oracle};
use harness::registry::Registry;
use harness::{Lab, cmd, lab};

/// Every seed: its folder, its Dockerfile, the base's name in it.
const SEEDS: &[(&str, &str, &str)] = &[
    ("workshop", "Dockerfile", "tensorflow/tensorflow:1.4.0"),
    ("workshop", "Dockerfile.gpu", "tensorflow/tensorflow:1.4.0-gpu"),
    ("microservice", "Dockerfile", "python:3.7"),
    (
        "microservice",
        "Dockerfile.gpu",
        "pytorch/pytorch:1.5.1-cuda10.1-cudnn7-devel",
    ),
    (
        "mldocker",
        "Dockerfile",
        "nvcr.io/nvidia/tensorflow:21.02-tf2-py3",
    ),
    (
        "mldocker",
        "Dockerfile.user",
        "nvcr.io/nvidia/tensorflow:21.02-tf2-py3",
    ),
    ("mlops", "trainer.dockerfile", "python:3.7-slim"),
    ("oneatlas", "Dockerfile", "ubuntu:16.04"),
];

/// The base's name in the store.
const BASE: &str = "slipway.test/seed-base:1";

/// A copy of a seed's folder with modes and times that git does not keep.
fn context(lab: &Lab, seed: &str) -> Result<String> {
    let to = lab.join(format!("seed-{seed}"));
    if !to.exists() {
        let from = lab::repo().join("tests/fixtures/seeds").join(seed);
        cmd::sh(&format!(
            "cp -r {} {} && cd {} && rm -f *.golden.json && chmod -R u=rwX,go=rX .",
            from.display(),
            to.display(),
            to.display()
        ))?;
        if seed == "base" {
            cmd::sh(&format!(
                "mkdir -p {0}/rootfs/bin {0}/rootfs/lib64 {0}/rootfs/lib/x86_64-linux-gnu {0}/rootfs/tmp {0}/rootfs/root && chmod 1777 {0}/rootfs/tmp && cp $(readlink -f $(command -v busybox)) {0}/rootfs/bin/busybox && chmod 755 {0}/rootfs/bin/busybox && for a in cat cp echo grep id ls mkdir mv rm sed tr true chmod chown ln touch test env find sort; do ln -s busybox {0}/rootfs/bin/$a; done; cp -L /bin/dash {0}/rootfs/bin/sh && cp -L /lib64/ld-linux-x86-64.so.2 {0}/rootfs/lib64/ && cp -L /lib/x86_64-linux-gnu/libc.so.6 {0}/rootfs/lib/x86_64-linux-gnu/; printf '#!/bin/sh\\nexec /bin/sh \"$@\"\\n' > {0}/rootfs/bin/bash && chmod 755 {0}/rootfs/bin/bash {0}/bin/*",
                to.display()
            ))?;
        }
    }
    Ok(to.display().to_string())
}

fn arguments(seed: &str) -> Vec<String> {
    let p = lab::repo()
        .join("tests/fixtures/seeds")
        .join(seed)
        .join("args.json");
    std::fs::read(p)
        .ok()
        .and_then(|b| serde_json::from_slice(&b).ok())
        .unwrap_or_default()
}

fn build_base(lab: &Lab) -> Result<()> {
    let dir = context(lab, "base")?;
    run_slipway(lab, &["build", "--progress", "plain", "-t", BASE, &dir])?
        .ok()
        .context("building the base")?;
    Ok(())
}

fn ours(lab: &Lab, seed: &str, dockerfile: &str, base: &str) -> Result<Image> {
    run_slipway(lab, &["tag", BASE, base])?.ok()?;
    let dir = context(lab, seed)?;
    let (file, name) = (format!("{dir}/{dockerfile}"), "seed.test/out:1");
    let mut args = vec!["build", "--progress", "plain", "-f", &file, "-t", name];
    let more = arguments(seed);
    args.extend(more.iter().map(String::as_str));
    args.push(&dir);
    let mut c = slipway(&lab.join("root"), &lab.join("state"), &args);
    cmd::run(c.env("SOURCE_DATE_EPOCH", "1700000000"), Duration::from_secs(120))?.ok()?;
    let tar = lab.join("out.tar");
    run_slipway(
        lab,
        &["save", "--format", "oci", "-o", &tar.display().to_string(), name],
    )?
    .ok()?;
    oracle::read_oci(&tar)
}

fn golden(seed: &str, dockerfile: &str) -> std::path::PathBuf {
    lab::repo()
        .join("tests/fixtures/seeds")
        .join(seed)
        .join(format!("{dockerfile}.golden.json"))
}

fn without_base(mut image: Image, base: &Image) -> Image {
    // The base is busybox as this machine has it: only what the build added or changed is compared.
    image
        .tree
        .retain(|path, entry| base.tree.get(path) != Some(entry));
    image
        .config
        .history
        .drain(..base.config.history.len().min(image.config.history.len()));
    image
}

fn base_image(lab: &Lab) -> Result<Image> {
    let tar = lab.join("base.tar");
    run_slipway(
        lab,
        &["save", "--format", "oci", "-o", &tar.display().to_string(), BASE],
    )?
    .ok()?;
    oracle::read_oci(&tar)
}

#[test]
fn every_seed_builds_to_the_tree_and_config_that_buildkit_makes() -> Result<()> {
    let lab = Lab::new("seeds")?;
    build_base(&lab)?;
    if std::env::var_os("UPDATE").is_some() {
        record(&lab)?;
    }
    let base = base_image(&lab)?;
    let mut wrong = Vec::new();
    for (seed, dockerfile, name) in SEEDS {
        let got = without_base(
            ours(&lab, seed, dockerfile, name).with_context(|| format!("{seed}/{dockerfile}"))?,
            &base,
        );
        let text = std::fs::read_to_string(golden(seed, dockerfile))
            .with_context(|| format!("{seed}/{dockerfile}: UPDATE=1 records it"))?;
        let want: Image = serde_json::from_str(&text)?;
        if got != want {
            wrong.push(format!(
                "{seed}/{dockerfile}:\n{}",
                oracle::differences(&want, &got)
            ));
        }
    }
    assert!(wrong.is_empty(), "unlike BuildKit:\n{}", wrong.join("\n"));
    lab.finish()
}

/// Has a real BuildKit build every seed and writes what it makes.
fn record(lab: &Lab) -> Result<()> {
    let registry = Registry::start(lab, None)?;
    let oracle = Oracle::start(lab, &registry.host())?;
    let base = format!("{}/seed-base:1", registry.host());
    run_slipway(lab, &["tag", BASE, &base])?.ok()?;
    run_slipway(lab, &["push", &base])?.ok()?;
    let base_tree = base_image(lab)?;
    for (seed, dockerfile, name) in SEEDS {
        let dir = context(lab, seed)?;
        let text = std::fs::read_to_string(Path::new(&dir).join(dockerfile))?;
        let changed = text.replacen(&format!("FROM {name}"), &format!("FROM {base}"), 1);
        anyhow::ensure!(changed != text, "{seed}/{dockerfile} has no FROM {name}");
        let file = format!("{dockerfile}.oracle");
        std::fs::write(Path::new(&dir).join(&file), changed)?;
        // The changed file must not be part of what COPY . copies.
        std::fs::rename(Path::new(&dir).join(&file), lab.join(&file))?;
        let args: BTreeMap<String, String> = arguments(seed)
            .windows(2)
            .filter(|w| w[0] == "--build-arg")
            .filter_map(|w| w[1].split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
            .collect();
        let tar = oracle.build(lab, &dir, &lab.join(&file), &args)?;
        let image = without_base(oracle::read_oci(&tar)?, &base_tree);
        std::fs::write(
            golden(seed, dockerfile),
            serde_json::to_string_pretty(&image)? + "\n",
        )?;
    }
    Ok(())
}

#[test]
fn the_seed_that_cannot_work_fails_with_the_reason() -> Result<()> {
    let lab = Lab::new("seeds-l4t")?;
    build_base(&lab)?;
    run_slipway(
        &lab,
        &["tag", BASE, "nvcr.io/nvidia/l4t-pytorch:r32.4.3-pth1.6-py3"],
    )?
    .ok()?;
    let dir = context(&lab, "microservice")?;
    // Its requirements file is never copied before pip is to read it; the real pip fails there.
    let tool = lab.join("seed-base/bin/pip3");
    std::fs::write(
        &tool,
        "#!/bin/sh\nfor a in \"$@\"; do case $a in *.txt) [ -e \"$a\" ] || { echo \"ERROR: Could not open requirements file: $a\" >&2; exit 1; };; esac; done\n",
    )?;
    build_base(&lab)?;
    run_slipway(
        &lab,
        &["tag", BASE, "nvcr.io/nvidia/l4t-pytorch:r32.4.3-pth1.6-py3"],
    )?
    .ok()?;
    let o = run_slipway(
        &lab,
        &[
            "build",
            "--progress",
            "plain",
            "-f",
            &format!("{dir}/Dockerfile.arm"),
            "-t",
            "x:1",
            &dir,
        ],
    )?;
    assert_ne!(o.code, 0);
    for want in [
        "pip3 install -r requirements-serve.txt",
        "Could not open requirements file",
        "Dockerfile.arm:16",
    ] {
        assert!(o.stderr.contains(want), "{want:?} is not in\n{}", o.stderr);
    }
    lab.finish()
}

#[test]
fn the_file_name_that_the_tutorial_gets_wrong_is_suggested() -> Result<()> {
    let lab = Lab::new("seeds-name")?;
    let dir = context(&lab, "mlops")?;
    let o = cmd::run(
        slipway(
            &lab.join("root"),
            &lab.join("state"),
            &["build", "-f", "train.dockerfile", ".", "-t", "trainer:latest"],
        )
        .current_dir(&dir),
        Duration::from_secs(30),
    )?;
    assert!(o.code != 0 && o.stderr.contains("trainer.dockerfile"), "{o:?}");
    lab.finish()
}
