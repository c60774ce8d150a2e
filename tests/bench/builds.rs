//! Builds beside BuildKit with containerd's worker: from the last step's end until the image can run, and until it is
//! pushed.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::image::{BUSYBOX, slipway};
use harness::registry::Registry;
use harness::{Lab, cmd, lab};

use crate::peers::Peer;
use crate::table::Table;

/// A RUN that writes 1 GB, half of it zeros, and says when it is done.
const WRITE: &str = "mkdir /data && for i in 1 2 3 4; do head -c 125000000 /dev/urandom > /data/r$i; head -c 125000000 /dev/zero > /data/z$i; done; echo the-run-ended";

/// Fills the build rows.
pub fn measure(table: &mut Table, lab: &Lab, containerd: &Peer, rounds: usize) -> Result<()> {
    let registry = Registry::start(lab, None)?;
    let buildkit = BuildKit::start(lab, containerd, &registry.host())?;
    let write = lab.write("write/Dockerfile", format!("FROM {BUSYBOX}\nRUN {WRITE}\n"))?;
    let train = train(lab, &registry)?;
    for (what, dockerfile) in [("train image", train), ("1 GB RUN", write)] {
        let dir = dockerfile.with_file_name("").display().to_string();
        let (mut run, mut push) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for n in 0..rounds {
            let name = format!("{}/ours:{n}", registry.host());
            run[0].push(after_the_run(&mut ours(lab, &["-t", &name, &dir]))?);
            cmd::sh("sync")?;
            push[0].push(after_the_run(&mut ours(lab, &["--push", "-t", &name, &dir]))?);
            cmd::sh("sync")?;
            let name = format!("{}/theirs:{n}", registry.host());
            let unpacked = format!("type=image,name={name},unpack=true");
            run[1].push(after_the_run(&mut buildkit.build(&dir, &unpacked))?);
            let pushed = format!("type=image,name={name},push=true,registry.insecure=true");
            push[1].push(after_the_run(&mut buildkit.build(&dir, &pushed))?);
        }
        table.times(
            &format!("{what}: end of the last step → can run on the node"),
            &run[0],
            &run[1],
        );
        table.times(
            &format!("{what}: end of the last step → pushed"),
            &push[0],
            &push[1],
        );
    }
    Ok(())
}

/// A build of ours that uses nothing of earlier ones.
fn ours(lab: &Lab, args: &[&str]) -> Command {
    let mut c = slipway(
        &lab.join("root"),
        &lab.join("state"),
        &["build", "--no-cache", "--progress", "plain"],
    );
    c.args(args);
    c
}

/// The Dockerfile of the training image, on a base that both find in the registry, with a last step that says its end.
fn train(lab: &Lab, registry: &Registry) -> Result<PathBuf> {
    let base = format!("{}/python:3", registry.host());
    let from = lab::cache().join("demo/base").display().to_string();
    cmd::run(
        &mut ours(lab, &["--push", "-t", &base, &from]),
        Duration::from_secs(300),
    )?
    .ok()
    .context("building the Python base (tests/setup/base-image.sh makes its file tree)")?;
    let fixture = lab::repo().join("tests/fixtures/train-digits");
    for file in ["requirements.txt", "train.py"] {
        lab.write(format!("train/{file}"), std::fs::read(fixture.join(file))?)?;
    }
    let dockerfile = std::fs::read_to_string(fixture.join("Dockerfile"))?
        .replace("ARG BASE=slipway.local/python:3", &format!("ARG BASE={base}"));
    lab.write(
        "train/Dockerfile",
        format!("{dockerfile}\nRUN echo the-run-ended\n"),
    )
}

/// Time from the step's own last line to the program's end.
fn after_the_run(c: &mut Command) -> Result<Duration> {
    let mut child = c
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .stdin(Stdio::null())
        .spawn()?;
    let (sent, seen) = std::sync::mpsc::channel();
    let streams: [Box<dyn std::io::Read + Send>; 2] = [
        Box::new(child.stdout.take().context("stdout")?),
        Box::new(child.stderr.take().context("stderr")?),
    ];
    let readers: Vec<_> = streams
        .into_iter()
        .map(|s| {
            let sent = sent.clone();
            std::thread::spawn(move || {
                let mut all = String::new();
                for line in BufReader::new(s).lines().map_while(Result::ok) {
                    if line.trim_end().ends_with("the-run-ended") && !line.contains("echo") {
                        let _ = sent.send(Instant::now());
                    }
                    all.push_str(&line);
                    all.push('\n');
                }
                all
            })
        })
        .collect();
    let status = child.wait()?;
    let end = Instant::now();
    let said: String = readers.into_iter().filter_map(|r| r.join().ok()).collect();
    if !status.success() {
        bail!("{c:?} ended with {status}:\n{said}");
    }
    let began = seen
        .try_recv()
        .with_context(|| format!("the step's last line was not seen in\n{said}"))?;
    Ok(end - began)
}

struct BuildKit {
    child: Child,
    address: String,
}

impl BuildKit {
    fn start(lab: &Lab, containerd: &Peer, registry: &str) -> Result<BuildKit> {
        let socket = containerd
            .containerd_socket()
            .context("a containerd")?
            .display()
            .to_string();
        let address = format!("unix://{}", lab.join("buildkit.sock").display());
        let config = lab.write(
            "buildkitd.toml",
            format!(
                "root = '{}'\n[grpc]\n  address = ['{address}']\n[worker.oci]\n  enabled = false\n[worker.containerd]\n  enabled = true\n  address = '{socket}'\n  namespace = 'k8s.io'\n  networkMode = 'host'\n  gc = false\n[registry.'{registry}']\n  http = true\n",
                lab.join("buildkit").display()
            ),
        )?;
        let log = std::fs::File::create(lab.join("buildkit.log"))?;
        let path = format!(
            "{}:/usr/sbin:/usr/bin:/sbin:/bin",
            lab::cache().join("tools/bin").display()
        );
        let child = Command::new(lab::tool("buildkitd"))
            .arg("--config")
            .arg(config)
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting buildkitd (tests/setup/go-tools.sh buildkit builds it)")?;
        let b = BuildKit { child, address };
        let began = Instant::now();
        while cmd::run(&mut b.ctl(&["debug", "workers"]), Duration::from_secs(10))?.code != 0 {
            if began.elapsed() > Duration::from_secs(20) {
                bail!(
                    "buildkitd does not answer:\n{}",
                    std::fs::read_to_string(lab.join("buildkit.log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(b)
    }

    fn ctl(&self, args: &[&str]) -> Command {
        let mut c = cmd::command(lab::tool("buildctl"), ["--addr", self.address.as_str()]);
        c.args(args);
        c
    }

    fn build(&self, dir: &str, output: &str) -> Command {
        let (context, dockerfile) = (format!("context={dir}"), format!("dockerfile={dir}"));
        self.ctl(&[
            "build",
            "--no-cache",
            "--progress",
            "plain",
            "--frontend",
            "dockerfile.v0",
            "--local",
            &context,
            "--local",
            &dockerfile,
            "--output",
            output,
        ])
    }
}

impl Drop for BuildKit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
