//! Pull and unpack of an image of about 1 GB in several layers, from a registry on the same machine.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::image::run_slipway;
use harness::registry::Registry;
use harness::{Lab, cmd, v1};

use crate::peers::Peer;
use crate::table::Table;

/// Files of this machine, a layer each, until there is about this much.
const BYTES: u64 = 1_000_000_000;

/// Fills the pull rows.
pub async fn measure(table: &mut Table, lab: &Lab, ours: &Peer, theirs: &Peer, rounds: usize) -> Result<()> {
    let registry = Registry::start(lab, None)?;
    let name = format!("{}/bench/big:1", registry.host());
    make_image(lab, &name)?;
    run_slipway(lab, &["push", &name])?.ok()?;
    // Docker's own schema for peers: plain HTTP on loopback needs no configuration.
    let _ = run_slipway(lab, &["rmi", &name])?;
    run_slipway(lab, &["prune"])
        .and_then(cmd::Output::ok)
        .context("emptying the store")?;
    harness::image::busybox(lab)?;
    let (mut wall, mut cpu) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..rounds {
        for (n, p) in [ours, theirs].into_iter().enumerate() {
            cmd::sh("sync")?;
            let (began, used) = (Instant::now(), p.cpu());
            p.cri.pull(&name).await?;
            wall[n].push(began.elapsed());
            cpu[n].push(p.cpu() - used);
            let r = v1::RemoveImageRequest {
                image: Some(v1::ImageSpec {
                    image: name.clone(),
                    ..Default::default()
                }),
            };
            p.cri.image.clone().remove_image(r).await?;
            if n == 0 {
                run_slipway(lab, &["prune"])?.ok()?;
            }
            // The file system's own cleaning after a removal is no part of the next pull.
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }
    table.times("pull, wall", &wall[0], &wall[1]);
    table.row(
        "pull, CPU",
        crate::table::median(&cpu[0]),
        crate::table::median(&cpu[1]),
        "s",
    );
    Ok(())
}

fn make_image(lab: &Lab, name: &str) -> Result<()> {
    let context = lab.join("big");
    std::fs::create_dir_all(&context)?;
    let mut dockerfile = String::from("FROM scratch\n");
    let mut total = 0;
    for (n, dir) in [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/local/go",
        "/usr/share",
        "/usr/bin",
        "/usr/lib/gcc",
        "/usr/local/lib",
        "/usr/include",
        "/usr/local/bin",
    ]
    .iter()
    .enumerate()
    {
        if total >= BYTES || !Path::new(dir).exists() {
            continue;
        }
        let o = cmd::run(&mut cmd::command("du", ["-sbx", dir]), Duration::from_secs(120))?;
        let size: u64 = o
            .stdout
            .split_whitespace()
            .next()
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        if total + size > BYTES * 5 / 4 {
            continue;
        }
        let to = context.join(format!("l{n}"));
        cmd::run(
            &mut cmd::command("cp", ["-a", "--one-file-system", dir, &to.display().to_string()]),
            Duration::from_secs(300),
        )?;
        dockerfile.push_str(&format!("COPY l{n} /l{n}\n"));
        total += size;
    }
    std::fs::write(context.join("Dockerfile"), dockerfile)?;
    run_slipway(lab, &["build", "-t", name, &context.display().to_string()])?.ok()?;
    std::fs::remove_dir_all(&context)?;
    eprintln!("   the image holds {} MB", total / 1_000_000);
    Ok(())
}
