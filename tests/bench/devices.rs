//! What a container's devices cost: 8 GPUs and 60 mounts by slipway-agent's CDI file of a driver made for tests, against the
//! same container without them, in turn.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use harness::cri::{Cri, container_config, pod_config};
use harness::image::BUSYBOX;
use harness::{Lab, lab, v1};
use slipway_fake_gpu::{Driver, FOLDER, Topology};

use crate::peers::{self, Peer};
use crate::table::{Table, median};

const ROUNDS: usize = 40;
const MOUNTS: usize = 60;

/// One container's life to its start.
#[derive(Default)]
struct Times {
    create: Vec<f64>,
    both: Vec<f64>,
}

/// Fills the rows of devices.
pub async fn measure(table: &mut Table, lab: &Lab, ours: &Peer, theirs: &Peer) -> Result<()> {
    describe_driver(lab)?;
    let config = |name: &str| pod_config(name, lab, true);
    let pods = [
        ours.cri.run_pod(config("gpus-s")).await?,
        theirs.cri.run_pod(config("gpus-c")).await?,
    ];
    let mut times: [[Times; 2]; 2] = Default::default();
    for n in 0..ROUNDS + 2 {
        let peers = [(ours, "gpus-s"), (theirs, "gpus-c")];
        for ((peer, name), (pod, times)) in peers.into_iter().zip(pods.iter().zip(&mut times)) {
            for (devices, times) in [true, false].into_iter().zip(times) {
                let mut warm = Times::default();
                let times = if n < 2 { &mut warm } else { times };
                one(
                    &peer.cri,
                    pod,
                    config(name),
                    devices,
                    &format!("c{n}-{devices}"),
                    times,
                )
                .await?;
            }
        }
    }
    ours.cri.remove_pod(&pods[0]).await?;
    theirs.cri.remove_pod(&pods[1]).await?;
    let [ours, theirs] = times;
    let more =
        |[with, without]: &[Times; 2], of: fn(&Times) -> &[f64]| median(of(with)) - median(of(without));
    let mut row = |what: &str, of: fn(&Times) -> &[f64]| {
        table.row(what, more(&ours, of), more(&theirs, of), "ms");
    };
    row(
        "CreateContainer, what 8 GPUs and 60 mounts add (target 3 ms)",
        |t| &t.create,
    );
    row("Create + Start, what they add", |t| &t.both);
    Ok(())
}

async fn one(
    cri: &Cri,
    pod: &str,
    config: v1::PodSandboxConfig,
    devices: bool,
    name: &str,
    times: &mut Times,
) -> Result<()> {
    let mut container = container_config(name, BUSYBOX, &["sleep", "1000"]);
    if devices {
        container.cdi_devices = vec![v1::CdiDevice {
            name: "nvidia.com/gpu=all".into(),
        }];
    }
    let began = Instant::now();
    let id = cri.create(pod, container, config).await?;
    times.create.push(began.elapsed().as_secs_f64() * 1e3);
    cri.start(&id).await?;
    times.both.push(began.elapsed().as_secs_f64() * 1e3);
    if devices {
        check(cri, &id).await?;
    }
    cri.stop(&id, 0).await?;
    cri.remove(&id).await
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
    std::fs::create_dir_all(peers::cdi(lab))?;
    let generate = || {
        let out = Command::new(lab::bin("slipway-agent"))
            .arg("--config")
            .arg(&config)
            .args(["cdi", "generate", "--output"])
            .arg(peers::cdi(lab))
            .env(FOLDER, driver.nvml())
            .output()
            .context("starting slipway-agent (make build makes it)")?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let file = std::fs::read_dir(peers::cdi(lab))?
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
