//! What newer parts of the API ask of the runtime: sizes changed in place, users, volumes of images, handlers.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::kube::{IMAGE, Kube};

/// Lines for every slipwayd's configuration: a variant that a RuntimeClass can name.
pub const HANDLERS: &str = "[runtime.handlers.strict]\nno_new_privileges = true\nshm_size_mib = 2\n[runtime.handlers.roomy]\nshm_size_mib = 128\n";

/// Limits as a container sees them, in cgroups of either version.
const LIMITS: &str = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null; true";

pub async fn a_container_and_its_pod_are_resized_in_place(k: Kube) -> Result<()> {
    let sizes = |cpu: &str, memory: &str| json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "cpu": cpu, "memory": memory } });
    k.pod(
        "container",
        "exec sleep 1000",
        json!({}),
        json!({ "resources": sizes("100m", "32Mi") }),
    )?;
    k.pod(
        "pod",
        "exec sleep 1000",
        json!({ "resources": sizes("200m", "64Mi") }),
        json!({}),
    )?;
    for pod in ["container", "pod"] {
        k.ready(pod).await?;
    }
    let resize = |pod: &str, patch: serde_json::Value| {
        let patch = patch.to_string();
        k.ok(&["patch", "pod", pod, "--subresource", "resize", "--patch", &patch])
    };
    resize(
        "container",
        json!({ "spec": { "containers": [{ "name": "main", "resources": sizes("300m", "48Mi") }] } }),
    )?;
    let told = ".status.containerStatuses[0].resources.limits";
    k.until("pod/container", &format!("{told}.memory"), "48Mi")
        .await?;
    k.until("pod/container", &format!("{told}.cpu"), "300m").await?;
    let seen = k.exec("container", LIMITS)?;
    ensure!(
        seen.contains(&(48 << 20).to_string()) && seen.contains("30000"),
        "the container sees {seen:?}"
    );
    // The pod's own limits are kubelet's to set, in the cgroup above the container's; the runtime is told.
    resize("pod", json!({ "spec": { "resources": sizes("400m", "96Mi") } }))?;
    k.until("pod/pod", ".status.resources.limits.memory", "96Mi")
        .await?;
    let uid = k.field("pod/pod", ".metadata.uid")?;
    let script = format!(
        "find /sys/fs/cgroup -maxdepth 6 -type d -name 'pod{uid}' | while read d; do cat $d/memory.limit_in_bytes $d/memory.max $d/cpu.cfs_quota_us 2>/dev/null || true; done"
    );
    let set = harness::cmd::sh(&script)?;
    ensure!(
        set.contains(&(96 << 20).to_string()) && set.contains("40000"),
        "the pod's cgroups have {set:?}"
    );
    for pod in ["container", "pod"] {
        let restarts = k.field(&format!("pod/{pod}"), ".status.containerStatuses[0].restartCount")?;
        ensure!(restarts == "0", "{pod} was started again");
        let pending = k.field(
            &format!("pod/{pod}"),
            ".status.conditions[?(@.type==\"PodResizeInProgress\")].status",
        )?;
        ensure!(pending.is_empty(), "the resize of {pod} goes on");
    }
    Ok(())
}

pub async fn volumes_of_images_read_only_mounts_and_users_are_as_asked(k: Kube) -> Result<()> {
    // A mount below the one that is asked for: read-only too.
    let above = k.cluster.node_dir(1).join("rro");
    let below = above.join("sub");
    std::fs::create_dir_all(&below)?;
    let below = below.display();
    harness::cmd::sh(&format!("mount -t tmpfs tmpfs '{below}'"))?;
    let verdict = as_asked(&k, &above).await;
    k.run(&["delete", "pod", "asked"], std::time::Duration::from_secs(60))?;
    harness::cmd::sh(&format!("umount '{below}'"))?;
    verdict
}

async fn as_asked(k: &Kube, above: &std::path::Path) -> Result<()> {
    k.pod(
        "asked",
        "ls /tool/busybox* /tool/sh; touch /tool/x 2>&1; touch /host/sub/x 2>&1; id -G; exec sleep 1000",
        json!({ "securityContext": { "supplementalGroups": [4000], "supplementalGroupsPolicy": "Strict" },
                "volumes": [{ "name": "image", "image": { "reference": IMAGE, "pullPolicy": "Never" } },
                            { "name": "above", "hostPath": { "path": above, "type": "Directory" } }] }),
        json!({ "securityContext": { "runAsUser": 1000, "runAsGroup": 1000 },
                "volumeMounts": [{ "name": "image", "mountPath": "/tool", "subPath": "bin" },
                                 { "name": "above", "mountPath": "/host", "readOnly": true, "recursiveReadOnly": "Enabled" }] }),
    )?;
    k.ready("asked").await?;
    let status = ".status.containerStatuses[0]";
    k.until_true("the script's words", |k| Ok(k.logs("asked")?.contains("4000")))
        .await?;
    let log = k.logs("asked")?;
    ensure!(
        log.contains("/tool/sh") && log.matches("Read-only file system").count() == 2,
        "{log}"
    );
    ensure!(log.lines().last() == Some("1000 4000"), "{log}");
    let groups = k.field("pod/asked", &format!("{status}.user.linux"))?;
    ensure!(groups.contains("[1000,4000]"), "{groups}");
    let mounts = k.field("pod/asked", &format!("{status}.volumeMounts"))?;
    ensure!(mounts.contains("\"recursiveReadOnly\":\"Enabled\""), "{mounts}");

    k.pod(
        "own-users",
        "cat /proc/self/uid_map; exec sleep 1000",
        json!({ "hostUsers": false }),
        json!({}),
    )?;
    k.ready("own-users").await?;
    let map = k.first_words("own-users").await?;
    let words: Vec<&str> = map.split_whitespace().collect();
    ensure!(
        words.len() == 3 && words[0] == "0" && words[1] != "0" && words[2] == "65536",
        "{map}"
    );
    Ok(())
}

pub async fn handlers_are_told_with_what_they_can_and_a_runtime_class_names_one(k: Kube) -> Result<()> {
    let node: serde_json::Value = serde_json::from_str(&k.ok(&["get", "node", "node1", "-o", "json"])?)?;
    let handlers = node["status"]["runtimeHandlers"]
        .as_array()
        .context("runtimeHandlers")?;
    let named = |name: &str| handlers.iter().find(|h| h["name"].as_str().unwrap_or("") == name);
    for name in ["", "slipway", "strict", "roomy"] {
        let features = &named(name).with_context(|| format!("no {name:?} in {handlers:?}"))?["features"];
        // The tests of volumes and users have both, so the node has to say so.
        ensure!(
            features["recursiveReadOnlyMounts"] == true && features["userNamespaces"] == true,
            "{name:?} can {features}"
        );
    }
    let features = &node["status"]["features"];
    ensure!(features["supplementalGroupsPolicy"] == true, "{features}");

    let class = |name: &str, handler: &str| {
        format!(
            "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {{name: {name}}}\nhandler: {handler}\n"
        )
    };
    k.apply(&class("strict", "strict"))?;
    k.apply(&class("roomy", "roomy"))?;
    k.apply(&class("nowhere", "nowhere"))?;
    // Each as it is configured, and none with anything of another.
    let show = "grep NoNewPrivs /proc/self/status; df -k /dev/shm | tail -1 | awk '{print $2}'";
    k.pod("plain", show, json!({}), json!({}))?;
    for name in ["strict", "roomy"] {
        k.pod(name, show, json!({ "runtimeClassName": name }), json!({}))?;
    }
    k.pod(
        "nowhere",
        show,
        json!({ "runtimeClassName": "nowhere" }),
        json!({}),
    )?;
    for (pod, want) in [
        ("plain", "NoNewPrivs:\t0\n65536\n"),
        ("strict", "NoNewPrivs:\t1\n2048\n"),
        ("roomy", "NoNewPrivs:\t0\n131072\n"),
    ] {
        k.phase(pod, "Succeeded").await?;
        ensure!(k.logs(pod)? == want, "{pod}: {:?}", k.logs(pod)?);
    }
    k.until_true("an event that names the handler", |k| {
        let events = k.ok(&["get", "events", "--field-selector", "involvedObject.name=nowhere"])?;
        Ok(events.contains("runtime_handler") && events.contains("\"nowhere\" is not known here"))
    })
    .await?;
    k.ok(&["delete", "pod", "nowhere"])?;
    k.ok(&["delete", "runtimeclass", "strict", "roomy", "nowhere"])
        .map(drop)
}

pub async fn a_cron_job_runs_when_its_time_has_come(k: Kube) -> Result<()> {
    k.apply(
        r#"
apiVersion: batch/v1
kind: CronJob
metadata: {name: tick}
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: Never
          containers: [{name: main, image: IMAGE, command: [echo, ticked]}]
"#,
    )?;
    k.until_true("a job that has run", |k| {
        let done = "jsonpath={.items[*].status.succeeded}";
        Ok(k.ok(&["get", "jobs", "-o", done])?.contains('1'))
    })
    .await?;
    let pods = k.ok(&["get", "pods", "-o", "jsonpath={.items[0].metadata.name}"])?;
    ensure!(k.logs(&pods)? == "ticked\n");
    k.ok(&["delete", "cronjob", "tick"]).map(drop)
}

/// Pages of 2 MiB that the kernel sets apart for the time of a test.
struct HugePages {
    before: String,
}

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    /// `None`: this machine has none to give.
    fn set(count: usize) -> Result<Option<HugePages>> {
        let Ok(before) = std::fs::read_to_string(HugePages::FILE) else {
            return Ok(None);
        };
        let had: usize = before.trim().parse()?;
        let pages = HugePages { before };
        if std::fs::write(HugePages::FILE, (had + count).to_string()).is_err() {
            return Ok(None);
        }
        let have: usize = std::fs::read_to_string(HugePages::FILE)?.trim().parse()?;
        Ok((have >= had + count).then_some(pages))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(e) = std::fs::write(HugePages::FILE, self.before.trim()) {
            eprintln!("{} stays as it is: {e}", HugePages::FILE);
        }
    }
}

pub async fn huge_pages_are_counted_limited_and_mounted(k: Kube) -> Result<()> {
    let Some(pages) = HugePages::set(4)? else {
        println!("SKIPPED huge pages: this machine has none to set apart");
        return Ok(());
    };
    // kubelet counts them when it starts.
    let anew = async || -> Result<()> {
        k.cluster
            .processes()
            .end("kubelet2", std::time::Duration::from_secs(10))?;
        k.cluster.start_kubelet(2)?;
        k.cluster.wait_ready(2, std::time::Duration::from_secs(30)).await
    };
    anew().await?;
    let allocatable = ".status.allocatable.hugepages-2Mi";
    k.until_true("kubelet to count the huge pages", |k| {
        Ok(!matches!(k.field("node/node2", allocatable)?.as_str(), "" | "0"))
    })
    .await?;
    k.pod(
        "huge",
        "mount | grep ' /pages '; exec sleep 1000",
        json!({ "nodeSelector": { "kubernetes.io/hostname": "node2" },
                "volumes": [{ "name": "pages", "emptyDir": { "medium": "HugePages" } }] }),
        json!({ "volumeMounts": [{ "name": "pages", "mountPath": "/pages" }],
                "resources": { "limits": { "hugepages-2Mi": "4Mi", "memory": "32Mi", "cpu": "100m" } } }),
    )?;
    if hugetlb_is_handed_down() {
        are_mounted_and_limited(&k).await?;
    } else {
        // A limit that cannot be kept is no limit: the pod waits, and says for what.
        k.until_true("an event that names the limit", |k| {
            let events = k.ok(&["get", "events", "--field-selector", "involvedObject.name=huge"])?;
            Ok(events.contains("hugepageLimits.2MB cannot be set"))
        })
        .await?;
    }
    k.ok(&["delete", "pod", "huge"])?;
    drop(pages);
    anew().await
}

/// Whether containers' cgroups can limit huge pages: v1 has the controller, or v2's root gives it to those below.
fn hugetlb_is_handed_down() -> bool {
    let down = |root: &str| {
        let file = format!("/sys/fs/cgroup/{root}cgroup.subtree_control");
        std::fs::read_to_string(file).is_ok_and(|down| down.contains("hugetlb"))
    };
    std::path::Path::new("/sys/fs/cgroup/hugetlb").exists() || down("") || down("unified/")
}

async fn are_mounted_and_limited(k: &Kube) -> Result<()> {
    k.ready("huge").await?;
    k.until_true("the mount to be told", |k| {
        Ok(k.logs("huge")?.contains("hugetlbfs"))
    })
    .await?;
    let mount = k.logs("huge")?;
    ensure!(mount.contains("pagesize=2M"), "{mount}");
    let id = k.field("pod/huge", ".status.containerStatuses[0].containerID")?;
    let id = id.strip_prefix("slipway://").context("whose container is it?")?;
    let find = format!(
        "find /sys/fs/cgroup -type d -name '*{id}*' -exec sh -c 'cat \"$1\"/hugetlb.2MB.max \"$1\"/hugetlb.2MB.limit_in_bytes 2>/dev/null' sh {{}} \\;"
    );
    let limits = harness::cmd::sh(&find)?;
    ensure!(limits.lines().any(|l| l == (4 << 20).to_string()), "{limits:?}");
    Ok(())
}
