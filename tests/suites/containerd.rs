//! The real containerd beside us: our shim as its runtime `io.containerd.slipway.v1`, our images in its store.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::Lab;
use harness::containerd::Containerd;
use harness::image::{self, BUSYBOX, run_slipway};
use harness::registry::Registry;

#[test]
fn containerd_runs_execs_and_removes_a_container_through_our_shim() -> Result<()> {
    let lab = Lab::new("ctrd")?;
    image::busybox(&lab)?;
    let tar = lab.join("image.tar").display().to_string();
    run_slipway(&lab, &["save", "-o", &tar, BUSYBOX])?.ok()?;
    let c = Containerd::start(&lab)?;
    c.ctr(&["images", "import", &tar])?.ok()?;
    let runtime = ["--runtime", "io.containerd.slipway.v1"];
    let cgroup = format!("{}/one", lab.cgroup());
    let mut run = vec!["run", "--rm"];
    run.extend(runtime);
    run.extend([
        "--cgroup",
        &cgroup,
        BUSYBOX,
        "one",
        "sh",
        "-c",
        "echo from inside; exit 3",
    ]);
    let o = c.ctr(&run)?;
    assert_eq!(
        o.code,
        3,
        "{o:?}\n{}",
        std::fs::read_to_string(lab.join("ctrd/log"))?
    );
    assert_eq!(o.stdout.trim(), "from inside");

    let cgroup = format!("{}/two", lab.cgroup());
    let mut run = vec!["run", "-d"];
    run.extend(runtime);
    run.extend(["--cgroup", &cgroup, BUSYBOX, "two", "sleep", "1000"]);
    c.ctr(&run)?.ok()?;
    let o = c.ctr(&[
        "tasks",
        "exec",
        "--exec-id",
        "x",
        "two",
        "sh",
        "-c",
        "echo exec; exit 4",
    ])?;
    assert_eq!((o.code, o.stdout.trim()), (4, "exec"), "{o:?}");
    assert!(c.ctr(&["tasks", "ls"])?.ok()?.stdout.contains("RUNNING"));
    c.ctr(&["tasks", "metrics", "two"])?.ok()?;
    c.ctr(&["tasks", "pause", "two"])?.ok()?;
    assert!(c.ctr(&["tasks", "ls"])?.ok()?.stdout.contains("PAUSED"));
    c.ctr(&["tasks", "resume", "two"])?.ok()?;
    c.ctr(&["tasks", "kill", "-s", "SIGKILL", "two"])?.ok()?;
    let began = Instant::now();
    while c.ctr(&["tasks", "ls"])?.ok()?.stdout.contains("RUNNING") {
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(10),
            "the task does not stop"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    c.ctr(&["tasks", "rm", "two"])?.ok()?;
    c.ctr(&["containers", "rm", "two"])?.ok()?;
    drop(c);
    lab.finish()
}

#[test]
fn containerd_pulls_and_runs_what_we_pushed() -> Result<()> {
    let lab = Lab::new("ctrd-pull")?;
    image::busybox(&lab)?;
    let registry = Registry::start(&lab, None)?;
    let name = format!("{}/team/pushed:1", registry.host());
    lab.write("c/file", "from the context")?;
    lab.write(
        "c/Dockerfile",
        format!(
            "FROM {BUSYBOX}\nCOPY file /d/file\nRUN rm /etc/group && ln /d/file /d/again && mkdir -p /gone/x && chown 1000:44 /d/file && chmod 4755 /d/again\nRUN rm -r /gone && head -c 3000000 /dev/zero > /zeros\nUSER appuser\nWORKDIR /d\nENTRYPOINT [\"sh\", \"-c\"]\n"
        ),
    )?;
    let dir = lab.join("c").display().to_string();
    let c = Containerd::start(&lab)?;
    run_slipway(&lab, &["build", "-t", &name, &dir])?.ok()?;
    run_slipway(&lab, &["push", &name])?.ok()?;
    c.ctr(&["images", "pull", "--plain-http", "--local", &name])?
        .ok()?;
    let inspect = run_slipway(&lab, &["inspect", "--format", "json", &name])?
        .ok()?
        .stdout;
    let inspect: serde_json::Value = serde_json::from_str(&inspect)?;
    let digest = inspect["repo_digests"][0]
        .as_str()
        .and_then(|d| d.split_once('@'))
        .map(|(_, digest)| digest.to_owned())
        .context("a repository digest")?;
    let listed = c.ctr(&["images", "ls", &format!("name=={name}")])?.ok()?.stdout;
    anyhow::ensure!(listed.contains(&digest), "{digest} is not in {listed}");
    let cgroup = format!("{}/pushed", lab.cgroup());
    let look = "id -u; pwd; cat file; echo; stat -c '%a %u:%g %h' again; ls -d /gone /etc/group 2>/dev/null; wc -c < /zeros";
    let o = c.ctr(&[
        "run", "--rm", "--cgroup", &cgroup, &name, "pushed", "sh", "-c", look,
    ])?;
    anyhow::ensure!(
        o.code == 0,
        "{o:?}\n{}",
        std::fs::read_to_string(lab.join("ctrd/log"))?
    );
    anyhow::ensure!(
        o.stdout == "1000\n/d\nfrom the context\n4755 1000:44 2\n3000000\n",
        "{}",
        o.stdout
    );
    drop(c);
    drop(registry);
    lab.finish()
}
