//! What is not as it should be when the agent starts, or while it runs: it says so, waits, and is there when it is.

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use crate::kubelet::{GPU, Kubelet, ready_with};
use crate::node::{Node, root};

/// A look a second.
const QUICK: &str = "[health]\nprobe_seconds = 1\n";

#[test]
fn a_configuration_with_an_unknown_key_ends_the_agent_with_its_name() {
    let node = Node::new("h200", "[resources]\nreplica = 4\n");
    let began = Instant::now();
    let out = node.run(&[]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("replica") && said.contains("agent.toml"),
        "{said}"
    );
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn root_a_library_that_hangs_when_it_is_loaded_is_waited_for_and_said() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    let kubelet = Kubelet::start(&node.kubelet());
    node.driver.override_with(&["nvmlInit_v2 hang"]).unwrap();
    node.start();
    node.wait("word of it", || {
        node.log().contains("waiting for the driver") && node.log().contains("no answer within 1500 ms")
    })
    .await;
    assert!(node.runs() && kubelet.known(GPU).is_none());
    node.driver.override_with(&[]).unwrap();
    node.wait("the GPU", || kubelet.ids(GPU, true).len() == 1).await;
}

#[tokio::test]
async fn root_a_library_that_answers_every_call_with_an_error_is_waited_for_and_said() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    let kubelet = Kubelet::start(&node.kubelet());
    node.driver.override_with(&["* 999"]).unwrap();
    node.start();
    node.wait("word of it", || node.log().contains("waiting for the driver"))
        .await;
    // Each reason is said once, however often it is tried.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(node.log().matches("waiting for the driver").count(), 1);
    assert!(node.runs());
    node.driver.override_with(&[]).unwrap();
    node.wait("the GPU", || kubelet.ids(GPU, true).len() == 1).await;
}

#[tokio::test]
async fn root_hostile_files_in_the_cdi_folder_cost_no_device_and_hold_nothing_up() {
    if !root() {
        return;
    }
    let mut node = Node::new("h100x8", QUICK);
    let cdi = node.cdi();
    std::fs::create_dir_all(&cdi).unwrap();
    let spec = |name: &str, edits: &str| {
        format!(
            r#"{{"cdiVersion":"0.6.0","kind":"evil.test/gpu","devices":[{{"name":"{name}","containerEdits":{edits}}}]}}"#
        )
    };
    let write = |name: &str, text: &str| std::fs::write(cdi.join(name), text).unwrap();
    // Ten megabytes, one of them of brackets; what leads elsewhere, nowhere, into itself, or never ends; what escapes.
    write(
        "large.json",
        &spec("x", &format!(r#"{{"env":["A={}"]}}"#, "x".repeat(10 << 20))),
    );
    write("deep.json", &"[".repeat(1 << 20));
    write("not.json", "\0\u{1}");
    write(
        "escapes.json",
        &spec(
            "../../x",
            r#"{"mounts":[{"hostPath":"/etc/shadow","containerPath":"../../etc"}]}"#,
        ),
    );
    symlink("/dev/zero", cdi.join("zero.json")).unwrap();
    symlink("/etc/shadow", cdi.join("elsewhere.json")).unwrap();
    symlink("loop.json", cdi.join("loop.json")).unwrap();
    symlink("/nowhere", cdi.join("nowhere.yaml")).unwrap();
    std::fs::create_dir(cdi.join("folder.json")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        cdi.join("pipe.json"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    let took = node.wait("all eight", || kubelet.ids(GPU, true).len() == 8).await;
    assert!(took < Duration::from_secs(10), "{took:?}");
    // Every look reads them again.
    node.driver.raise("3 set remap_failed 1").unwrap();
    node.wait("what a look finds", || kubelet.ids(GPU, false).len() == 1)
        .await;
    assert!(node.runs());
    // The operator sees what is wrong with each, and our devices.
    let folder = cdi.display().to_string();
    let out = node.run(&["cdi", "list", "--spec-dir", &folder]);
    let (found, said) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(!out.status.success());
    assert_eq!(found.lines().count(), 17, "{found}");
    for name in ["large", "deep", "not", "escapes", "zero", "elsewhere", "pipe"] {
        assert!(said.contains(&format!("{name}.json")), "{name}: {said}");
    }
    assert!(!said.contains("root:"), "no file's text is said: {said}");
}

#[tokio::test]
async fn root_a_cdi_folder_that_cannot_be_written_keeps_devices_back_and_says_why() {
    if !root() {
        return;
    }
    let (mut node, kubelet) = ready_with("h200", QUICK, 1).await;
    // Root may write anywhere but here.
    let cdi = node.cdi();
    std::fs::remove_dir_all(&cdi).unwrap();
    symlink("/proc/self/fdinfo", &cdi).unwrap();
    node.wait("none", || kubelet.ids(GPU, false).len() == 1).await;
    assert!(
        node.log().contains("the CDI file cannot be written into"),
        "{}",
        node.log()
    );
    std::fs::remove_file(&cdi).unwrap();
    node.wait("the GPU", || kubelet.ids(GPU, true).len() == 1).await;
    assert!(node.runs());
}
