//! Modes of files do not depend on who starts slipwayd. Alone in its process, whose mask it changes.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod world;

use std::os::unix::fs::PermissionsExt;

use world::{World, cannot_run};

#[tokio::test]
async fn root_a_container_reads_its_files_whatever_mask_slipwayd_was_started_with() {
    if cannot_run() {
        return;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("masked", true)).await.unwrap();
    let config = w.container_config("main", &["sh", "-c", "umask"]);
    let logs = w.path().join("logs/masked");
    let id = w.create(&pod, config).await.unwrap();
    w.start(&id).await.unwrap();
    assert_eq!(w.wait_exit(&id).await.exit_code, 0);
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let etc = w.path().join("state/pods").join(&pod).join("etc");
    for name in ["hosts", "resolv.conf", "hostname"] {
        assert_eq!(mode(&etc.join(name)), 0o644, "{name}");
    }
    assert_eq!(mode(&logs), 0o755);
    let log = std::fs::read_to_string(logs.join("main/0.log")).unwrap();
    assert!(log.contains("0022"), "{log}");
    w.finish().await;
}
