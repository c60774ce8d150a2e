//! What the tests share: a namespace, waiting for what the API server says, and kubelet's log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::cluster::Cluster;
use harness::cmd::{self, Output};

/// The image of most tests: Debian's busybox.
pub const IMAGE: &str = "slipway.test/busybox:1";

/// A namespace of one test.
#[derive(Clone)]
pub struct Kube {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    /// The namespace.
    pub space: String,
}

impl Kube {
    pub fn new(cluster: Arc<Cluster>, space: &str) -> Result<Kube> {
        cluster.kubectl(&["create", "namespace", space])?;
        let k = Kube {
            cluster,
            space: space.to_owned(),
        };
        // Pods are refused until the controller has made the namespace's account.
        let began = Instant::now();
        while k
            .run(&["get", "serviceaccount", "default"], Duration::from_secs(10))?
            .code
            != 0
        {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("namespace {space} gets no service account");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(k)
    }

    /// kubectl in the namespace.
    pub fn command(&self, args: &[&str]) -> std::process::Command {
        let mut all = vec!["-n", self.space.as_str()];
        all.extend(args);
        self.cluster.kubectl_command(&all)
    }

    /// kubectl in the namespace, whatever its exit code.
    pub fn run(&self, args: &[&str], limit: Duration) -> Result<Output> {
        cmd::run(&mut self.command(args), limit)
    }

    /// kubectl in the namespace, which has to succeed; its standard output.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let o = self.run(args, Duration::from_secs(120))?;
        Ok(o.ok()
            .with_context(|| format!("kubectl {}", args.join(" ")))?
            .stdout)
    }

    /// Applies a manifest, with `IMAGE` in it replaced by the tests' image.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.apply_as_it_is(&manifest.replace("IMAGE", IMAGE))
    }

    fn apply_as_it_is(&self, manifest: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(self.cluster.dir())?;
        std::fs::write(file.path(), manifest)?;
        self.ok(&["apply", "-f", &file.path().display().to_string()])
            .with_context(|| manifest.to_owned())?;
        Ok(())
    }

    /// Applies manifests/examples/FILE as the cluster has prepared it, and changed as `change` says.
    pub fn example(&self, file: &str, change: &[(&str, &str)]) -> Result<()> {
        let path = self.cluster.dir().join("examples").join(file);
        let mut text =
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        for (from, to) in change {
            anyhow::ensure!(text.contains(from), "{file} has no {from:?}");
            text = text.replace(from, to);
        }
        self.apply_as_it_is(&text)
    }

    /// Waits until a Job is Complete.
    pub async fn complete(&self, job: &str, limit: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let of = |kind: &str| {
                self.field(
                    &format!("job/{job}"),
                    &format!(".status.conditions[?(@.type==\"{kind}\")].status"),
                )
            };
            if of("Complete")? == "True" {
                return Ok(());
            }
            if of("Failed")? == "True" || began.elapsed() > limit {
                let log = self.run(
                    &["logs", "-l", &format!("job-name={job}"), "--tail=40", "--prefix"],
                    Duration::from_secs(20),
                )?;
                bail!(
                    "job {job} is not Complete after {:?}:\n{}{}",
                    began.elapsed(),
                    log.stdout,
                    log.stderr
                );
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// A pod of one container `main` on node1 that runs `script`; `spec`: more of the pod's spec as JSON, `container` of the
    /// container's.
    pub fn pod(
        &self,
        name: &str,
        script: &str,
        spec: serde_json::Value,
        container: serde_json::Value,
    ) -> Result<()> {
        let mut c = serde_json::json!({
            "name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script],
        });
        merge(&mut c, container);
        let mut s = serde_json::json!({
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
            "nodeSelector": { "kubernetes.io/hostname": "node1" }, "containers": [c],
        });
        merge(&mut s, spec);
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } }, "spec": s,
        });
        self.apply(&pod.to_string())
    }

    /// What `path` (a jsonpath without braces) says of an object.
    pub fn field(&self, what: &str, path: &str) -> Result<String> {
        Ok(self
            .ok(&["get", what, "-o", &format!("jsonpath={{{path}}}")])?
            .trim()
            .to_owned())
    }

    /// Waits until the field is `want`.
    pub async fn until(&self, what: &str, path: &str, want: &str) -> Result<()> {
        self.until_true(&format!("{what} {path} to be {want:?}"), |k| {
            Ok(k.field(what, path)? == want)
        })
        .await
    }

    /// Waits until `check` says true, for a minute and a half.
    pub async fn until_true(&self, what: &str, check: impl Fn(&Kube) -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        let mut last = None;
        while began.elapsed() < Duration::from_secs(90) {
            match tokio::task::block_in_place(|| check(self)) {
                Ok(true) => return Ok(()),
                Ok(false) => last = None,
                Err(e) => last = Some(e),
            }
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        match last {
            Some(e) => Err(e.context(format!("waited 90 s for {what}"))),
            None => bail!("waited 90 s for {what}"),
        }
    }

    /// Waits until the pod is in `phase`.
    pub async fn phase(&self, pod: &str, phase: &str) -> Result<()> {
        self.until(&format!("pod/{pod}"), ".status.phase", phase).await
    }

    /// Waits until the pod is Ready.
    pub async fn ready(&self, pod: &str) -> Result<()> {
        self.until(
            &format!("pod/{pod}"),
            ".status.conditions[?(@.type==\"Ready\")].status",
            "True",
        )
        .await
    }

    /// The container's log.
    pub fn logs(&self, pod: &str) -> Result<String> {
        self.ok(&["logs", pod])
    }

    /// The container's log, once there is something in it: a container that runs has not said anything yet.
    pub async fn first_words(&self, pod: &str) -> Result<String> {
        self.until_true(&format!("a word of {pod}"), |k| Ok(k.logs(pod)?.ends_with('\n')))
            .await?;
        self.logs(pod)
    }

    /// Runs a script in the pod's first container, over kubectl exec.
    pub fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.ok(&["exec", pod, "--", "sh", "-c", script])
    }

    /// The id of the pod's first container, and its first process as the host counts.
    pub fn first_process(&self, pod: &str) -> Result<(String, u32)> {
        let id = self.field(&format!("pod/{pod}"), ".status.containerStatuses[0].containerID")?;
        let id = id
            .strip_prefix("slipway://")
            .with_context(|| format!("{id:?} is no id of ours"))?;
        let in_it =
            |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|c| c.contains(id));
        let pid = std::fs::read_dir("/proc")?
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
            .filter(in_it)
            .min()
            .with_context(|| format!("container {id} has no process"))?;
        Ok((id.to_owned(), pid))
    }

    /// Kills the first process of the pod's first container, as the kernel or an operator would.
    pub fn kill_container(&self, pod: &str) -> Result<()> {
        let (_, pid) = self.first_process(pod)?;
        cmd::sh(&format!("kill -9 {pid}"))?;
        Ok(())
    }

    /// Removes the namespace without waiting.
    pub fn delete(&self) {
        let _ = self.cluster.kubectl_for(
            &["delete", "namespace", &self.space, "--wait=false"],
            Duration::from_secs(30),
        );
    }

    /// What there is to see after a failure.
    pub fn picture(&self) -> String {
        let mut t = String::new();
        for args in [
            &["get", "pods,jobs", "-o", "wide"][..],
            &["get", "events"],
            &["describe", "pods"],
        ] {
            if let Ok(o) = self.run(args, Duration::from_secs(20)) {
                t += &format!("--- kubectl {}\n{}{}\n", args.join(" "), o.stdout, o.stderr);
            }
        }
        for n in self.cluster.nodes() {
            for name in [self.cluster.runtime(n), format!("kubelet{n}")] {
                let alive = self.cluster.processes().alive(&name);
                let tail = self.cluster.processes().tail(&name, 25);
                t += &format!("--- {name}, running: {alive}\n{tail}\n");
            }
        }
        t
    }
}

/// Puts `more`'s keys into `into`.
pub fn merge(into: &mut serde_json::Value, more: serde_json::Value) {
    if let (Some(a), serde_json::Value::Object(b)) = (into.as_object_mut(), more) {
        a.extend(b);
    }
}

/// What kubelet says of containerd too in these tests (SLIPWAY_KUBELET_ON=containerd shows it), and what a test asks for.
const EXPECTED: &[&str] = &[
    // It asks for the statistics of no pod, to learn whether the call is there.
    "podSandboxID=\"\"",
    // It asks about containers that it has just had removed.
    "ContainerStatus from runtime service failed\" err=\"rpc error: code = NotFound",
    "Failed to remove container\" err=\"failed to get container status",
    "pleg has yet to be successful",
    // Images that are not there on purpose, and containers that fail on purpose.
    "127.0.0.1:9/no/such",
    "slipway.test/not-here",
    "/private/busybox:1",
    "is not known here",
    // Where no hierarchy has the controller.
    "hugepageLimits.2MB cannot be set",
    "CrashLoopBackOff",
    // It is being ended, with requests under way: the words are its own.
    "rpc error: code = Canceled desc = context canceled",
    // A container that is not to start on a sick GPU.
    "device plugin PreStartContainer rpc failed",
    // Kubelet removes a pod's logs while its ended container is still listed, as containerd lists such ones too.
    "Unable to fetch container log stats",
    // While slipwayd is down.
    "connect: no such file or directory",
    "connect: connection refused",
    "code = Unavailable desc = error reading from server",
    // It was killed while kubelet was connecting.
    "error reading server preface",
    "container runtime is down",
    "container runtime status check may not have completed yet",
];

/// Error lines of kubelet about the runtime that containerd would not have caused too.
pub fn complaints(cluster: &Cluster) -> Vec<String> {
    let expected = |l: &String| EXPECTED.iter().any(|e| l.contains(e));
    let ours = cluster.nodes().filter(|n| !cluster.has_containerd(*n));
    ours.flat_map(|n| errors(cluster, n))
        .filter(|l| !expected(l))
        .collect()
}

/// Every error line of node `n`'s kubelet about its runtime.
pub fn errors(cluster: &Cluster, n: usize) -> Vec<String> {
    let log = cluster.processes().log(&format!("kubelet{n}"));
    let log = std::fs::read_to_string(log).unwrap_or_default();
    log.lines()
        .filter(|l| l.starts_with('E') && about_the_runtime(l))
        .map(|l| format!("node{n}: {l}"))
        .collect()
}

/// klog names the file: those in which kubelet speaks to its runtime, and its words for it elsewhere.
fn about_the_runtime(line: &str) -> bool {
    [
        "remote_runtime.go",
        "remote_image.go",
        "kuberuntime",
        "rpc error",
        "container runtime",
        "pleg",
        "cri_stats_provider",
        "log.go",
    ]
    .iter()
    .any(|w| line.contains(w))
}
