//! Pods and Jobs: order, restarts, limits, identity.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::kube::Kube;

pub async fn containers_start_in_order_and_end_as_the_restart_policy_says(k: Kube) -> Result<()> {
    // An init container, a sidecar that outlives it, and two containers of which one fails and is started again.
    k.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: order}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: node1}
  volumes: [{name: shared, emptyDir: {}}]
  initContainers:
  - {name: first, image: IMAGE, command: [sh, -c, "echo first >> /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - name: sidecar
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "echo sidecar >> /shared/order; touch /shared/up; exec sleep 1000"]
    startupProbe: {exec: {command: [test, -f, /shared/up]}, periodSeconds: 1, timeoutSeconds: 10}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - {name: second, image: IMAGE, command: [sh, -c, "echo second >> /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: IMAGE, command: [sh, -c, "cat /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - name: flaky
    image: IMAGE
    command: [sh, -c, "if [ -f /shared/tried ]; then echo again; exit 0; fi; touch /shared/tried; exit 7"]
    volumeMounts: [{name: shared, mountPath: /shared}]
"#,
    )?;
    k.phase("order", "Succeeded").await?;
    let order = k.ok(&["logs", "order", "-c", "main"])?;
    ensure!(order == "first\nsidecar\nsecond\n", "{order:?}");
    let flaky = ".status.containerStatuses[?(@.name==\"flaky\")]";
    ensure!(k.field("pod/order", &format!("{flaky}.restartCount"))? == "1");
    ensure!(k.field("pod/order", &format!("{flaky}.lastState.terminated.exitCode"))? == "7");
    ensure!(k.ok(&["logs", "order", "-c", "flaky"])? == "again\n");
    Ok(())
}

pub async fn a_job_completes_and_its_logs_are_kept(k: Kube) -> Result<()> {
    k.apply(
        r#"
apiVersion: batch/v1
kind: Job
metadata: {name: count}
spec:
  completions: 3
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers:
      - {name: main, image: IMAGE, command: [sh, -c, "echo index $JOB_COMPLETION_INDEX on $(hostname)"]}
"#,
    )?;
    k.until(
        "job/count",
        ".status.conditions[?(@.type==\"Complete\")].status",
        "True",
    )
    .await?;
    let logs = k.ok(&["logs", "-l", "job-name=count", "--tail=-1"])?;
    for n in 0..3 {
        ensure!(logs.contains(&format!("index {n} on count-{n}")), "{logs}");
    }
    Ok(())
}

pub async fn limits_are_set_and_a_container_over_its_memory_is_oomkilled(k: Kube) -> Result<()> {
    let limits = json!({ "resources": { "requests": { "cpu": "100m", "memory": "16Mi" },
                                        "limits": { "cpu": "500m", "memory": "32Mi" } } });
    k.pod("within", "sleep 1000", json!({}), limits.clone())?;
    k.pod("over", "head -c 200000000 /dev/zero | tail", json!({}), limits)?;
    k.ready("within").await?;
    ensure!(k.field("pod/within", ".status.qosClass")? == "Burstable");
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null; true";
    let seen = k.exec("within", script)?;
    ensure!(
        seen.contains("33554432"),
        "the memory limit is not seen in the container: {seen:?}"
    );
    ensure!(seen.contains("50000"), "nor the CPU limit: {seen:?}");
    k.phase("over", "Failed").await?;
    let ended = ".status.containerStatuses[0].state.terminated";
    let reason = k.field("pod/over", &format!("{ended}.reason"))?;
    ensure!(reason == "OOMKilled", "{reason:?}");
    ensure!(k.field("pod/over", &format!("{ended}.exitCode"))? == "137");
    Ok(())
}

pub async fn pods_lie_in_the_cgroups_of_their_class(k: Kube) -> Result<()> {
    let some = json!({ "cpu": "50m", "memory": "16Mi" });
    let classes = [
        ("Guaranteed", "", json!({ "requests": some, "limits": some })),
        ("Burstable", "burstable/", json!({ "requests": some })),
        ("BestEffort", "besteffort/", json!({})),
    ];
    for (class, _, resources) in &classes {
        let name = class.to_lowercase();
        k.pod(
            &name,
            "exec sleep 1000",
            json!({}),
            json!({ "resources": resources }),
        )?;
    }
    for (class, folder, _) in &classes {
        let name = class.to_lowercase();
        k.ready(&name).await?;
        let pod = format!("pod/{name}");
        ensure!(k.field(&pod, ".status.qosClass")? == *class);
        let uid = k.field(&pod, ".metadata.uid")?;
        let (id, pid) = k.first_process(&name)?;
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        // One line a hierarchy: of those that kubelet does not use, none names the container.
        let ours: Vec<&str> = groups.lines().filter(|l| l.contains(&id)).collect();
        let below = format!("/kubepods/{folder}pod{uid}/");
        ensure!(
            !ours.is_empty() && ours.iter().all(|l| l.contains(&below)),
            "{name} is not below {below}:\n{groups}"
        );
    }
    Ok(())
}

pub async fn a_container_that_fails_again_and_again_is_started_ever_later(k: Kube) -> Result<()> {
    k.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: failing}
spec:
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: node1}
  volumes: [{name: shared, emptyDir: {}}]
  containers:
  - {name: main, image: IMAGE, command: [sh, -c, "date +%s >> /shared/starts; exit 7"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - {name: witness, image: IMAGE, command: [sleep, "1000"], volumeMounts: [{name: shared, mountPath: /shared}]}
"#,
    )?;
    let main = ".status.containerStatuses[?(@.name==\"main\")]";
    k.until(
        "pod/failing",
        &format!("{main}.state.waiting.reason"),
        "CrashLoopBackOff",
    )
    .await?;
    let starts = |k: &Kube| -> Result<Vec<u64>> {
        let said = k.ok(&["exec", "failing", "-c", "witness", "--", "cat", "/shared/starts"])?;
        Ok(said.lines().map(str::parse).collect::<Result<_, _>>()?)
    };
    k.until_true("a third start", |k| Ok(starts(k)?.len() >= 3))
        .await?;
    let starts = starts(&k)?;
    // Once at once, then after ten seconds.
    ensure!(starts[2] >= starts[1] + 9, "it was started at {starts:?}");
    ensure!(k.field("pod/failing", &format!("{main}.lastState.terminated.exitCode"))? == "7");
    Ok(())
}

pub async fn users_groups_capabilities_and_read_only_roots_are_as_asked(k: Kube) -> Result<()> {
    k.pod(
        "who",
        "id -u; id -g; id -G; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status; touch /x 2>&1; stat -c %g /data; touch /data/x && echo wrote",
        json!({ "securityContext": { "fsGroup": 3000, "supplementalGroups": [4000], "seccompProfile": { "type": "RuntimeDefault" } },
                "volumes": [{ "name": "data", "emptyDir": {} }] }),
        json!({ "securityContext": { "runAsUser": 1000, "runAsGroup": 2000, "readOnlyRootFilesystem": true,
                                     "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                "volumeMounts": [{ "name": "data", "mountPath": "/data" }] }),
    )?;
    k.phase("who", "Succeeded").await?;
    let log = k.logs("who")?;
    for want in [
        "1000\n2000\n",
        "3000",
        "4000",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "Read-only file system",
        "\n3000\nwrote",
    ] {
        ensure!(log.contains(want), "{want:?} is not in\n{log}");
    }
    Ok(())
}

pub async fn an_image_that_cannot_be_pulled_says_why(k: Kube) -> Result<()> {
    k.pod(
        "missing",
        "true",
        json!({}),
        json!({ "image": "127.0.0.1:9/no/such:image" }),
    )?;
    let waiting = ".status.containerStatuses[0].state.waiting";
    k.until_true("an image error", |k| {
        let reason = k.field("pod/missing", &format!("{waiting}.reason"))?;
        Ok(reason == "ErrImagePull" || reason == "ImagePullBackOff")
    })
    .await?;
    k.until_true("the reason", |k| {
        Ok(k.ok(&["get", "events"])?.contains("127.0.0.1:9/no/such:image"))
    })
    .await?;
    k.pod(
        "never",
        "true",
        json!({}),
        json!({ "image": "slipway.test/not-here:1", "imagePullPolicy": "Never" }),
    )?;
    k.until("pod/never", &format!("{waiting}.reason"), "ErrImageNeverPull")
        .await?;
    Ok(())
}
