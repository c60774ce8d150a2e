//! A child that dies by itself, again and again.
#![allow(clippy::unwrap_used)] // a failure is a failed test

use std::time::{Duration, Instant};

use slipway_gpu::{Launch, Supervisor};

/// The first one watches a GPU and dies then; those after it die of being told to watch. Each leaves a line in `$0`.
const SCRIPT: &str = r#"echo >> "$0"; began=$(wc -l < "$0")
while read -r line; do
    id=${line#*\"id\":}; id=${id%%,*}
    [ "$began" = 1 ] && echo "{\"answer\":[$id,\"watching\"]}"
    exit
done"#;

#[tokio::test]
async fn a_process_that_dies_of_watching_is_started_ever_more_rarely() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    let count = || std::fs::read_to_string(&starts).map_or(0, |text| text.lines().count());
    let (supervisor, _events) = Supervisor::start(Launch {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), SCRIPT.into(), starts.display().to_string()],
        env: Vec::new(),
        deadline: Duration::from_secs(10),
    });
    let began = Instant::now();
    supervisor.watch(0, "GPU-0").await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    // At 0, 100, 300, 700, 1500 ms and so on, however slow this machine is.
    let (most, took) = (count(), began.elapsed());
    assert!(most >= 2, "it is started again by itself");
    assert!(
        took > Duration::from_secs(3) || most <= 5,
        "{most} starts in {took:?}"
    );
}
