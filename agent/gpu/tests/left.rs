//! Processes that cannot be ended. One that hangs in a driver is in a sleep that no signal ends; one in a frozen cgroup (v1)
//! is too, and can be made here.
#![allow(clippy::unwrap_used)] // a failure is a failed test

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use slipway_gpu::{GpuError, Launch, Supervisor};

struct Frozen(PathBuf);

impl Frozen {
    fn new(name: &str) -> Option<Frozen> {
        let root = Path::new("/sys/fs/cgroup/freezer");
        let made = root.join(format!("slipway-gpu-test-{}-{name}", std::process::id()));
        if !root.join("cgroup.procs").exists() || std::fs::create_dir(&made).is_err() {
            let _ = writeln!(
                std::io::stderr(),
                "\n*** SKIPPED: this test needs root and a freezer cgroup (v1), to make processes that do not end ***\n"
            );
            return None;
        }
        std::fs::write(made.join("freezer.state"), "FROZEN").unwrap();
        Some(Frozen(made))
    }

    fn processes(&self) -> usize {
        let text = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().count()
    }

    fn thaw(&self) {
        let _ = std::fs::write(self.0.join("freezer.state"), "THAWED");
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw();
        let began = Instant::now();
        while std::fs::remove_dir(&self.0).is_err() && began.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A child that answers in a shell: to what hangs by going into the cgroup, to everything else that it is a driver of 16 GPUs.
fn launch(frozen: &Frozen, hangs: &str) -> Launch {
    let script = r#"while read -r line; do
        id=${line#*\"id\":}; id=${id%%,*}
        case $line in
            *$1*) echo $$ > "$0/cgroup.procs"; sleep 1000 ;;
            *) echo "{\"answer\":[$id,{\"system\":{\"driver\":\"1.2\",\"cuda\":[1,2],\"count\":16}}]}" ;;
        esac
    done"#;
    Launch {
        program: "/bin/sh".into(),
        args: vec![
            "-c".into(),
            script.into(),
            frozen.0.display().to_string(),
            hangs.into(),
        ],
        env: Vec::new(),
        deadline: Duration::from_millis(300),
    }
}

#[tokio::test]
async fn root_processes_that_cannot_be_ended_are_one_a_gpu_and_few_in_all() {
    let Some(frozen) = Frozen::new("gpus") else { return };
    let (supervisor, _events) = Supervisor::start(launch(&frozen, "look"));
    assert_eq!(supervisor.system().await.unwrap().count, 16);
    let hangs = |e: GpuError| matches!(e, GpuError::Hangs(_));
    assert!(hangs(supervisor.look(3).await.unwrap_err()));
    // However often it is asked, and the others can be.
    for _ in 0..20 {
        let again = supervisor.look(3).await.unwrap_err();
        assert!(matches!(again, GpuError::StillHangs), "{again}");
    }
    assert!(supervisor.system().await.is_ok());
    assert_eq!(frozen.processes(), 1);
    for gpu in 4..7 {
        assert!(hangs(supervisor.look(gpu).await.unwrap_err()));
    }
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        let stuck = supervisor.system().await.unwrap_err();
        assert!(
            matches!(stuck, GpuError::Stuck(4) | GpuError::Process(_)),
            "{stuck}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(frozen.processes(), 4);

    // They end at last, and everything can be asked again.
    frozen.thaw();
    let began = Instant::now();
    while supervisor.system().await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::write(frozen.0.join("freezer.state"), "FROZEN").unwrap();
    assert!(hangs(supervisor.look(3).await.unwrap_err()));
}

#[tokio::test]
async fn root_a_driver_that_hangs_from_the_start_costs_one_process() {
    let Some(frozen) = Frozen::new("driver") else {
        return;
    };
    let (supervisor, _events) = Supervisor::start(launch(&frozen, "system"));
    let first = supervisor.system().await.unwrap_err();
    assert!(matches!(first, GpuError::Hangs(_)), "{first}");
    for _ in 0..20 {
        let again = supervisor.system().await.unwrap_err();
        assert!(matches!(again, GpuError::StillHangs), "{again}");
    }
    assert_eq!(frozen.processes(), 1);
}

#[tokio::test]
async fn root_a_release_says_which_processes_keep_their_handles_and_none_is_started_before_it_ends() {
    let Some(frozen) = Frozen::new("release") else {
        return;
    };
    let (supervisor, _events) = Supervisor::start(launch(&frozen, "look"));
    // One that can be ended is, and everything asked meanwhile is answered so.
    assert_eq!(supervisor.system().await.unwrap().count, 16);
    supervisor.release().await.unwrap();
    let released = |e: GpuError| matches!(e, GpuError::Released);
    assert!(released(supervisor.system().await.unwrap_err()));
    assert!(released(supervisor.look(3).await.unwrap_err()));
    supervisor.release().await.unwrap();
    supervisor.resume().await.unwrap();
    assert_eq!(supervisor.system().await.unwrap().count, 16);

    assert!(matches!(
        supervisor.look(3).await.unwrap_err(),
        GpuError::Hangs(_)
    ));
    let stuck = supervisor.release().await.unwrap_err();
    assert!(matches!(stuck, GpuError::Stuck(1)), "{stuck}");
    assert_eq!(frozen.processes(), 1);
    assert!(
        released(supervisor.system().await.unwrap_err()),
        "none is started"
    );
    frozen.thaw();
    supervisor.release().await.unwrap();
    supervisor.resume().await.unwrap();
    assert_eq!(supervisor.system().await.unwrap().count, 16);
}
