//! The story `make run` tells, step by step, and its undoing.

use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::cri::Cri;
use harness::v1 as cri;
use harness::{cmd, lab, leftovers};

use crate::host::{self, BRIDGE, CGROUP, NETWORK, SUBNET};
use crate::screen;

const LOCAL_BASE: &str = "slipway.local/python:3";
const IMAGE: &str = "slipway.local/train-digits:demo";
const STEPS: &str = "6000";

/// Builds, runs, shows.
pub async fn tell(work: &Path) -> Result<()> {
    reset(work).await?;
    let base = match std::env::var("BASE").ok().filter(|b| !b.is_empty()) {
        Some(b) => b,
        None => {
            local_base(work).await?;
            LOCAL_BASE.to_owned()
        }
    };
    build(work, &base).await?;
    let c = start_daemon(work).await?;
    let (pod, container) = run_pod(work, &c).await?;
    let status = follow(work, &c, &container).await?;
    show(work, &c, &pod).await?;
    if status.exit_code != 0 {
        bail!(
            "the training container exited with {} ({})",
            status.exit_code,
            status.message
        );
    }
    screen::title("Taking it down");
    step("stopped and removed the pod", async { c.remove_pod(&pod).await }).await
}

async fn step<T>(what: &str, f: impl Future<Output = Result<T>>) -> Result<T> {
    let began = Instant::now();
    let r = f.await.with_context(|| what.to_owned())?;
    screen::done(what, began.elapsed());
    Ok(r)
}

/// An earlier run that was killed may have left its build, its pod and its daemon: end and forget them first.
async fn reset(work: &Path) -> Result<()> {
    std::fs::create_dir_all(work)?;
    end_builds(work)?;
    if let Ok(c) = Cri::connect(&socket(work)).await {
        remove_pods(&c).await?;
    }
    stop_daemon(work)
}

async fn remove_pods(c: &Cri) -> Result<()> {
    for p in c.pods().await? {
        c.remove_pod(&p.id).await?;
    }
    Ok(())
}

fn slipway(work: &Path, args: &[&str]) -> Command {
    harness::image::slipway(&work.join("root"), &work.join("state"), args)
}

async fn local_base(work: &Path) -> Result<()> {
    let there = cmd::run(
        &mut slipway(work, &["inspect", LOCAL_BASE]),
        Duration::from_secs(60),
    )?;
    if there.code == 0 {
        return Ok(());
    }
    screen::title("The base image: Python from this distribution's packages, no registry needed");
    live(slipway(
        work,
        &[
            "build",
            "-t",
            LOCAL_BASE,
            &work.join("base").display().to_string(),
        ],
    ))
    .await
}

async fn build(work: &Path, base: &str) -> Result<()> {
    let context = lab::repo().join("tests/fixtures/train-digits");
    screen::title(&format!(
        "slipway build -t {IMAGE} --build-arg BASE={base} tests/fixtures/train-digits"
    ));
    let arg = format!("BASE={base}");
    live(slipway(
        work,
        &[
            "build",
            "-t",
            IMAGE,
            "--build-arg",
            &arg,
            &context.display().to_string(),
        ],
    ))
    .await
}

/// Runs `slipway` on the demo's own terminal. One whose caller is given up goes on: [`end_builds`] ends it.
async fn live(mut c: Command) -> Result<()> {
    let verb = c
        .get_args()
        .next()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    c.stdin(Stdio::null())
        .stdout(Stdio::inherit())
        .stderr(Stdio::inherit());
    let status = tokio::process::Command::from(c)
        .status()
        .await
        .context("starting slipway")?;
    if !status.success() {
        bail!("`slipway {verb}` failed ({status}): what it says is above");
    }
    Ok(())
}

fn pid_file(work: &Path) -> PathBuf {
    work.join("slipwayd.pid")
}

fn socket(work: &Path) -> PathBuf {
    work.join("state/slipwayd.sock")
}

async fn start_daemon(work: &Path) -> Result<Cri> {
    screen::title("slipwayd, on a root of its own");
    let conf = work.join("cni");
    std::fs::create_dir_all(&conf)?;
    let list = serde_json::json!({
        "cniVersion": "1.0.0", "name": NETWORK,
        "plugins": [
            { "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": true, "hairpinMode": true,
              "ipam": { "type": "host-local", "dataDir": work.join("ipam"), "ranges": [[{ "subnet": SUBNET }]],
                        "routes": [{ "dst": "0.0.0.0/0" }] } },
            { "type": "portmap", "capabilities": { "portMappings": true } }
        ]
    });
    std::fs::write(conf.join("10-demo.conflist"), serde_json::to_vec_pretty(&list)?)?;
    let log = std::fs::File::create(work.join("slipwayd.log"))?;
    let began = Instant::now();
    let child = Command::new(lab::bin("slipwayd"))
        .arg("--root")
        .arg(work.join("root"))
        .arg("--state")
        .arg(work.join("state"))
        .arg("--socket")
        .arg(socket(work))
        .arg("--cni-conf-dir")
        .arg(&conf)
        .arg("--cni-bin-dir")
        .arg(lab::cni_bin())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting slipwayd")?;
    std::fs::write(pid_file(work), child.id().to_string())?;
    let c = loop {
        match Cri::connect(&socket(work)).await {
            Ok(c) => break c,
            Err(e) if began.elapsed() > Duration::from_secs(20) => {
                return Err(e.context(format!(
                    "slipwayd does not answer; its log is {}",
                    work.join("slipwayd.log").display()
                )));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let v = c
        .runtime
        .clone()
        .version(cri::VersionRequest::default())
        .await?
        .into_inner();
    screen::done(
        &format!("{} {} answers", v.runtime_name, v.runtime_version),
        began.elapsed(),
    );
    // Pods of an earlier run whose slipwayd was killed too.
    remove_pods(&c).await?;
    Ok(c)
}

async fn run_pod(work: &Path, c: &Cri) -> Result<(String, String)> {
    screen::title(&format!("The image runs as a pod: --max_steps {STEPS}"));
    let sandbox = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "train-digits".into(),
            uid: "demo".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: "train-digits".into(),
        log_directory: work.join("logs").display().to_string(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: CGROUP.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let pod = step("pod sandbox with its own network", c.run_pod(sandbox.clone())).await?;
    let s = c.pod_status(&pod).await?;
    if let Some(ip) = s.status.and_then(|s| s.network).map(|n| n.ip) {
        screen::line(&format!("   its address is {ip}"));
    }
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "train".into(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: IMAGE.into(),
            ..Default::default()
        }),
        args: vec!["--max_steps".into(), STEPS.into()],
        log_path: "train/0.log".into(),
        // As kubelet sets them: crictl shows a container's pod by these.
        labels: [
            ("io.kubernetes.container.name", "train"),
            ("io.kubernetes.pod.name", "train-digits"),
            ("io.kubernetes.pod.namespace", "default"),
            ("io.kubernetes.pod.uid", "demo"),
        ]
        .map(|(key, value)| (key.into(), value.into()))
        .into(),
        linux: Some(cri::LinuxContainerConfig::default()),
        ..Default::default()
    };
    let id = step("container created", c.create(&pod, config, sandbox)).await?;
    step("container started", c.start(&id)).await?;
    Ok((pod, id))
}

/// Prints the container's log as it is written; once training is under way, looks inside with exec.
async fn follow(work: &Path, c: &Cri, id: &str) -> Result<cri::ContainerStatus> {
    screen::title("Its log, live (the CRI log file that kubectl logs reads)");
    let path = work.join("logs/train/0.log");
    let began = Instant::now();
    let (mut at, mut looked, mut accuracy) = (0u64, false, false);
    loop {
        let over = c.status(id).await?;
        let done = over.state == cri::ContainerState::ContainerExited as i32;
        if let Ok(mut f) = std::fs::File::open(&path) {
            f.seek(SeekFrom::Start(at))?;
            let mut r = BufReader::new(f);
            let mut line = String::new();
            while r.read_line(&mut line)? > 0 && line.ends_with('\n') {
                at += line.len() as u64;
                let text = line.splitn(4, ' ').nth(3).unwrap_or(&line).trim_end().to_owned();
                screen::line(&format!("   {} {text}", screen::painted("36", "│")));
                accuracy |= text.starts_with("accuracy");
                if text.starts_with("step") && !looked && !done {
                    looked = true;
                    look_inside(c, id).await?;
                }
                line.clear();
            }
        }
        if done {
            if !accuracy {
                bail!(
                    "the container ended ({}, exit code {}) without printing an accuracy; its log is {}",
                    over.reason,
                    over.exit_code,
                    path.display()
                );
            }
            return Ok(over);
        }
        if began.elapsed() > Duration::from_secs(300) {
            bail!(
                "the training did not end within 5 minutes; its log is {}",
                path.display()
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn look_inside(c: &Cri, id: &str) -> Result<()> {
    let began = Instant::now();
    let (code, out, err) = c
        .exec(
            id,
            &["sh", "-c", "echo $(hostname): $(ls /app | tr '\\n' ' ')"],
            10,
        )
        .await?;
    if code != 0 {
        bail!("exec in the container ended with {code}: {err}");
    }
    let mark = screen::painted("35", "│ exec:");
    screen::done(&format!("{mark} {}", out.trim()), began.elapsed());
    Ok(())
}

async fn show(work: &Path, c: &Cri, pod: &str) -> Result<()> {
    let crictl = lab::tool("crictl");
    let on_path = Command::new("crictl")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if !crictl.exists() && !on_path {
        let n = c.containers().await?.len();
        screen::line(&format!(
            "   (crictl is not installed; over the CRI: 1 pod {}, {n} container)",
            &pod[..13.min(pod.len())]
        ));
        return Ok(());
    }
    let program = if crictl.exists() {
        crictl
    } else {
        PathBuf::from("crictl")
    };
    let endpoint = format!("unix://{}", socket(work).display());
    for verb in [&["pods"][..], &["ps", "-a"][..]] {
        screen::title(&format!("crictl {}", verb.join(" ")));
        let mut args = vec![
            "--runtime-endpoint",
            endpoint.as_str(),
            "--image-endpoint",
            endpoint.as_str(),
        ];
        args.extend(verb);
        let o = cmd::run(&mut cmd::command(&program, args), Duration::from_secs(20))?.ok()?;
        for l in o.stdout.lines() {
            screen::line(&format!("   {l}"));
        }
    }
    Ok(())
}

/// Ends a build and removes pods that a failed run left, stops slipwayd, removes what CNI plugins never remove themselves.
pub async fn tear_down(work: &Path) -> Result<()> {
    end_builds(work)?;
    if let Ok(c) = Cri::connect(&socket(work)).await {
        remove_pods(&c).await?;
    }
    stop_daemon(work)?;
    let kept = host::on_the_network(work);
    leftovers::remove_bridge(BRIDGE);
    for dir in ["state", "logs", "ipam", "cni"] {
        let dir = work.join(dir);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
    }
    if !kept.is_empty() {
        bail!(
            "removing the pod left this on its network:\n  {}",
            kept.join("\n  ")
        );
    }
    Ok(())
}

/// Ends a `slipway` that works on the demo's store: one that is asked to end removes what it made.
fn end_builds(work: &Path) -> Result<()> {
    let program = lab::bin("slipway").display().to_string();
    let root = work.join("root");
    let ours = || {
        leftovers::processes_naming(&root)
            .into_iter()
            .find(|(_, c)| c.split(' ').next() == Some(&program))
    };
    while let Some((pid, command)) = ours() {
        end(pid, &command, &|| ours().is_some_and(|(p, _)| p == pid))?;
    }
    Ok(())
}

/// Sends SIGTERM and waits until the process is not `there` any more.
fn end(pid: u32, what: &str, there: &dyn Fn() -> bool) -> Result<()> {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let began = Instant::now();
    while there() {
        if began.elapsed() > Duration::from_secs(10) {
            bail!("pid {pid} does not end ten seconds after SIGTERM: {what}");
        }
        // A zombie of ours has no command line, so the loop ends by itself.
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn stop_daemon(work: &Path) -> Result<()> {
    let file = pid_file(work);
    let Ok(text) = std::fs::read_to_string(&file) else {
        return Ok(());
    };
    // Only a process that is still our slipwayd: pids are reused.
    let ours = || {
        leftovers::processes_naming(work)
            .into_iter()
            .find(|(p, c)| p.to_string() == text && c.contains("slipwayd"))
    };
    if let Some((pid, command)) = ours() {
        end(pid, &command, &|| ours().is_some())?;
    }
    std::fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))
}

/// Searches the host for what is the demo's, after waiting a moment for what ends by itself.
///
/// # Errors
/// Lists what is still there.
pub fn prove_clean(work: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        let left = host::left(work);
        if left.is_empty() {
            break;
        }
        if began.elapsed() > Duration::from_secs(5) {
            bail!("this was left behind:\n  {}", left.join("\n  "));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    screen::line(&format!(
        "   nothing is left: no mount, network namespace, link, firewall rule, cgroup or process; the caches are in {}",
        work.display()
    ));
    Ok(())
}
