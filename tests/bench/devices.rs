//! What a container's devices cost: 8 GPUs and 60 mounts by slipway-agent's CDI file of a driver made for tests, against the
//! same container without them, in turn.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use harness::cri::{Cri, container_config, pod_config};
use harness::image::BUSYBOX;
use harness::{Daemon, Lab, Setup, lab, v1};
use slipway_fake_gpu::{Driver, FOLDER, Topology};

use crate::peers::InMemory;
use crate::table::{Table, median};

const ROUNDS: usize = 40;
const MOUNTS: usize = 60;

/// One container's life to its start.
#[derive(Default)]
struct Times {
    create: Vec<f64>,
    both: Vec<f64>,
}

/// Measures into `table`.
pub async fn measure(table: &mut Table) -> Result<()> {
    let lab = Lab::new("bench-gpu")?;
    let in_memory = InMemory::new(lab.join("state"))?;
    harness::image::busybox(&lab)?;
    let cdi = lab.join("cdi");
    std::fs::create_dir(&cdi)?;
    describe_driver(&lab)?;
    let setup = Setup {
        args: vec!["--log-level".into(), "warn".into()],
        config: format!("[cdi]\nspec_dirs = [{cdi:?}]\n"),
        ..Setup::default()
    };
    let mut daemon = Daemon::start(&lab, &setup).await?;
    let outcome = in_turn(table, &lab, &daemon.cri().await?).await;
    daemon.stop()?;
    drop(in_memory);
    outcome?;
    lab.finish()
}

async fn in_turn(table: &mut Table, lab: &Lab, cri: &Cri) -> Result<()> {
    let config = pod_config("gpus", lab, true);
    let pod = cri.run_pod(config.clone()).await?;
    let (mut with, mut without) = (Times::default(), Times::default());
    for n in 0..ROUNDS + 2 {
        for (devices, times) in [(true, &mut with), (false, &mut without)] {
            let mut container = container_config(&format!("c{n}-{devices}"), BUSYBOX, &["sleep", "1000"]);
            if devices {
                container.cdi_devices = vec![v1::CdiDevice {
                    name: "nvidia.com/gpu=all".into(),
                }];
            }
            let began = Instant::now();
            let id = cri.create(&pod, container, config.clone()).await?;
            let created = began.elapsed();
            cri.start(&id).await?;
            let started = began.elapsed();
            if n >= 2 {
                times.create.push(created.as_secs_f64() * 1e3);
                times.both.push(started.as_secs_f64() * 1e3);
            }
            if n == 0 && devices {
                check(cri, &id).await?;
            }
            cri.stop(&id, 0).await?;
            cri.remove(&id).await?;
        }
    }
    cri.remove_pod(&pod).await?;
    let more = |with: &[f64], without: &[f64]| median(with) - median(without);
    let what = format!("CreateContainer, 8 GPUs and {MOUNTS} mounts, more than without");
    table.row(&what, more(&with.create, &without.create), 3.0, "ms");
    table.row(
        "the same, Create + Start",
        more(&with.both, &without.both),
        0.0,
        "ms",
    );
    table.row("Create + Start without devices", median(&without.both), 0.0, "ms");
    Ok(())
}

/// All of it is there.
async fn check(cri: &Cri, id: &str) -> Result<()> {
    let script =
        "ls /dev | grep -c 'nvidia[0-9]'; grep -c driver/root /proc/self/mountinfo; ls /etc/ld.so.cache";
    let (_, text, _) = cri.exec(id, &["sh", "-c", script], 10).await?;
    ensure!(text == format!("8\n{MOUNTS}\n/etc/ld.so.cache\n"), "{text}");
    Ok(())
}

/// Lays a driver out with as many libraries as it takes, and has slipway-agent describe it.
fn describe_driver(lab: &Lab) -> Result<()> {
    let topology = Topology::named("h100x8")?;
    let driver = Driver::lay_out(&lab.join("driver"), &topology)?;
    let config = format!(
        "[driver]\nroot = {:?}\ndev = {:?}\n[paths]\nproc = {:?}\nsys = {:?}\n",
        driver.root(),
        driver.dev(),
        driver.proc(),
        driver.sys()
    );
    let config = lab.write("agent.toml", config)?;
    let generate = || {
        let out = Command::new(lab::bin("slipway-agent"))
            .arg("--config")
            .arg(&config)
            .args(["cdi", "generate", "--output"])
            .arg(lab.join("cdi"))
            .env(FOLDER, driver.nvml())
            .output()
            .context("starting slipway-agent (make build makes it)")?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let file = std::fs::read_dir(lab.join("cdi"))?
            .next()
            .context("no CDI file")??;
        let spec: serde_json::Value = serde_json::from_slice(&std::fs::read(file.path())?)?;
        let mounts = spec["containerEdits"]["mounts"].as_array().map_or(0, Vec::len);
        Ok(mounts)
    };
    let there = generate()?;
    ensure!(there <= MOUNTS, "the driver has {there} files");
    let library = driver.library();
    let folder = library.parent().context("no folder")?;
    for n in there..MOUNTS {
        let name = format!("libnvidia-more{n}.so.{}", topology.driver_version);
        std::fs::copy(&library, folder.join(name))?;
    }
    let mounts = generate()?;
    ensure!(mounts == MOUNTS, "{mounts} mounts");
    Ok(())
}
