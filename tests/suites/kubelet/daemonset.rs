//! manifests/base and its overlays, applied: the agent as a pod of its DaemonSet, with the rights of its account and no others,
//! on a driver made for tests. The manifests are as they are but for this cluster's places.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use harness::cluster::{Asked, Cluster};
use harness::{cmd, lab};
use serde_json::{Value, json};
use slipway_fake_gpu::{Driver, Topology};

use crate::OURS;
use crate::kube::Kube;

const GPU: &str = "nvidia.com/gpu";
pub const SPACE: &str = "slipway-system";
pub const NODE_IMAGE: &str = "slipway.local/node:1";
const SOON: Duration = Duration::from_secs(60);
/// What is a Kubernetes before 1.37's, or for a sick GPU's pods only: of this account's rights those that a test need not see used.
const NOT_ALWAYS_USED: [&str; 3] = ["get pods", "delete pods", "create pods/eviction"];

/// Builds the image that the DaemonSets run, into node 1's store, as manifests/images/node says; once, whoever asks.
pub fn node_image(cluster: &Cluster) -> Result<()> {
    static BUILT: Mutex<bool> = Mutex::new(false);
    let mut built = BUILT
        .lock()
        .map_err(|_| anyhow!("building the node's image panicked"))?;
    if *built {
        return Ok(());
    }
    let context = cluster.dir().join("node-image");
    let manifests = lab::repo().join("manifests");
    cmd::sh(&format!(
        "rm -rf '{0}' && mkdir -p '{0}' && cp -rL '{1}' '{0}/bin' && cp -r '{2}/node' '{0}/node'",
        context.display(),
        lab::bin("slipwayd").with_file_name("").display(),
        manifests.display()
    ))?;
    cluster.build_stage(OURS, "busybox", "slipway.local/tools:1")?;
    let dockerfile = manifests.join("images/node/Dockerfile").display().to_string();
    let context = context.display().to_string();
    let args = [
        "build",
        "-q",
        "-t",
        NODE_IMAGE,
        "-f",
        &dockerfile,
        "--build-arg",
        "BASE=slipway.local/tools:1",
        &context,
    ];
    cmd::run(&mut cluster.slipway(OURS, &args), Duration::from_secs(300))?.ok()?;
    *built = true;
    Ok(())
}

/// Builds `text` as an image of node 1.
pub fn build(cluster: &Cluster, name: &str, text: &str) -> Result<()> {
    let context = cluster.dir().join(name.replace(['/', ':'], "-"));
    std::fs::create_dir_all(&context)?;
    std::fs::write(context.join("Dockerfile"), text)?;
    let context = context.display().to_string();
    cmd::run(
        &mut cluster.slipway(OURS, &["build", "-q", "-t", name, &context]),
        Duration::from_secs(300),
    )?
    .ok()?;
    Ok(())
}

/// Writes an overlay over manifests/`of` ("base", "overlays/mig") that has the node image's `tag` and `more` in its
/// kustomization; where it is.
pub fn overlay(cluster: &Cluster, name: &str, of: &str, tag: &str, more: &Value) -> Result<PathBuf> {
    let copy = cluster.dir().join("manifests");
    if !copy.exists() {
        cmd::sh(&format!(
            "cp -r '{}' '{}'",
            lab::repo().join("manifests").display(),
            copy.display()
        ))?;
    }
    let at = copy.join("here").join(name);
    std::fs::create_dir_all(&at)?;
    let mut all = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": SPACE,
        "resources": [format!("../../{of}")],
        "images": [{ "name": "slipway.local/node", "newTag": tag }],
    });
    crate::kube::merge(&mut all, more.clone());
    std::fs::write(at.join("kustomization.yaml"), all.to_string())?;
    Ok(at)
}

/// A change of one value, which has to be what it is in the manifest.
pub fn change(path: &str, from: &str, to: &Value) -> [Value; 2] {
    let path = format!("/spec/template/spec/{path}");
    [
        json!({ "op": "test", "path": path, "value": from }),
        json!({ "op": "replace", "path": path, "value": to }),
    ]
}

struct Agent<'a> {
    k: &'a Kube,
    driver: Driver,
    root: HostRoot,
}

impl Agent<'_> {
    /// Applies an overlay with the places of this node, and the image's `tag`.
    fn apply(&self, of: &str, tag: &str) -> Result<PathBuf> {
        let cluster = &self.k.cluster;
        let node = cluster.node_dir(OURS);
        let opt = node.join("opt");
        std::fs::create_dir_all(&opt)?;
        let program = "opt/slipway/bin/slipway-agent";
        let env = json!({ "name": slipway_fake_gpu::FOLDER, "value": self.driver.nvml() });
        let mut patch = Vec::new();
        patch.extend(change("volumes/0/hostPath/path", "/", &json!(self.root.0)));
        patch.extend(change("volumes/1/hostPath/path", "/opt", &json!(opt)));
        patch.extend(change(
            "containers/0/command/2",
            &format!("/{program}"),
            &json!(node.join(program)),
        ));
        patch.push(json!({ "op": "add", "path": "/spec/template/spec/containers/0/env/-", "value": env }));
        patch.push(json!({ "op": "add", "path": "/spec/template/spec/nodeSelector",
            "value": { "kubernetes.io/hostname": format!("node{OURS}") } }));
        // The other DaemonSet works on the machine itself, wherever a node has its label.
        let gone = json!({ "$patch": "delete", "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": { "name": "slipway-node-setup" } });
        let more = json!({
            "configMapGenerator": [{ "name": "slipway-agent", "behavior": "replace", "files": ["agent.toml"] }],
            "patches": [{ "target": { "kind": "DaemonSet", "name": "slipway-agent" }, "patch": json!(patch).to_string() },
                        { "patch": gone.to_string() }],
        });
        let name = format!("{}-{tag}", of.replace('/', "-"));
        let at = overlay(cluster, &name, of, tag, &more)?;
        // What the overlay configures, and where things are on this node.
        let of = lab::repo().join("manifests").join(of).join("agent.toml");
        let own = if of.exists() {
            of
        } else {
            lab::repo().join("manifests/base/agent.toml")
        };
        // Kubelet's list of pods is that of 1.37: of an older one the agent has to ask the API server for their UIDs.
        let places = cluster
            .agent_places(OURS, &self.driver)
            .replace("pods-api.sock", "of-no-older-kubelet.sock");
        std::fs::write(
            at.join("agent.toml"),
            std::fs::read_to_string(own)? + "\n" + &places,
        )?;
        cluster.kubectl(&["apply", "-k", &at.display().to_string()])?;
        Ok(at)
    }

    /// Waits until the DaemonSet's pods are those of its newest template, and Ready: their probes are answered.
    fn rolled_out(&self) -> Result<()> {
        let args = [
            "-n",
            SPACE,
            "rollout",
            "status",
            "daemonset/slipway-agent",
            "--timeout=90s",
        ];
        let said = self.k.cluster.kubectl(&args);
        said.with_context(|| self.log()).map(drop)
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.k.cluster.kubectl(&[&["-n", SPACE], args].concat())
    }

    /// What `path` says of the one pod.
    fn pod(&self, path: &str) -> Result<String> {
        let of = "app.kubernetes.io/name=slipway-agent";
        self.kubectl(&[
            "get",
            "pods",
            "-l",
            of,
            "-o",
            &format!("jsonpath={{.items[*]{path}}}"),
        ])
    }

    fn log(&self) -> String {
        let args = ["logs", "daemonset/slipway-agent", "--all-containers", "--tail=30"];
        self.kubectl(&args)
            .unwrap_or_else(|e| format!("no log of the agent: {e:#}"))
    }

    async fn allocatable(&self, resource: &str, count: usize) -> Result<Duration> {
        let waited = self.k.cluster.wait_allocatable(OURS, resource, count, SOON).await;
        waited.with_context(|| self.log())
    }

    /// What its server answers.
    fn http(&self, path: &str) -> Result<String> {
        let mut stream = std::net::TcpStream::connect((self.pod(".status.podIP")?.as_str(), 9400))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
        )?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        ensure!(page.starts_with("HTTP/1.1 200 "), "{path}: {page}");
        Ok(page)
    }

    /// Everything it asked, which it may; and of what it may nothing that it never asks.
    fn uses_its_rights_and_no_others(&self) -> Result<()> {
        let asked = self.k.cluster.asked(SPACE, "slipway-agent")?;
        let denied: Vec<&Asked> = asked.iter().filter(|a| a.code == 403 || a.code == 401).collect();
        ensure!(denied.is_empty(), "it asked what it may not: {denied:?}");
        let used: BTreeSet<String> = asked
            .iter()
            .map(|a| format!("{} {}", a.verb, a.resource))
            .collect();
        let role: Value =
            serde_json::from_str(&self.kubectl(&["get", "clusterrole", "slipway-agent", "-o", "json"])?)?;
        let list = |rule: &Value, key: &str| -> Vec<String> {
            let all = rule[key].as_array().into_iter().flatten();
            all.filter_map(|v| v.as_str().map(str::to_owned)).collect()
        };
        let rules = role["rules"].as_array().context("rules")?;
        let may = rules.iter().flat_map(|rule| {
            let resources = list(rule, "resources");
            let of = move |verb: String| resources.clone().into_iter().map(move |r| format!("{verb} {r}"));
            list(rule, "verbs").into_iter().flat_map(of)
        });
        let may: BTreeSet<String> = may.collect();
        let idle: Vec<&String> = may
            .difference(&used)
            .filter(|r| !NOT_ALWAYS_USED.contains(&r.as_str()))
            .collect();
        ensure!(
            idle.is_empty(),
            "rights that it never uses: {idle:?}; it asked {asked:?}"
        );
        ensure!(!may.iter().any(|r| r.contains('*')), "it may everything: {may:?}");
        Ok(())
    }
}

fn gpu_pod(k: &Kube, name: &str, resource: &str, script: &str) -> Result<()> {
    let resources = json!({ "resources": { "limits": { resource: 1 } } });
    k.pod(name, script, json!({}), resources)
}

/// What a restart, or another container in its place, would change.
fn incarnation(k: &Kube, pod: &str) -> Result<String> {
    k.field(
        &format!("pod/{pod}"),
        ".status.containerStatuses[0]['containerID','restartCount']",
    )
}

const SICK: &str = ".status.conditions[?(@.type==\"GpuUnhealthy\")].status";

pub async fn the_agents_daemon_set_hands_out_gpus_with_its_own_rights_alone(k: Kube) -> Result<()> {
    crate::manifests::servicemonitors_are_known(&k)?;
    node_image(&k.cluster)?;
    // A later version of the agent: its program is another.
    build(
        &k.cluster,
        "slipway.local/node:2",
        &format!("FROM {NODE_IMAGE}\nRUN printf 2 >> /slipway/bin/slipway-agent\n"),
    )?;
    // Two GPUs, and two that are divided into MIG devices; with everything that a dashboard can ask for.
    let mut topology = Topology::named("a100x4-mig")?;
    topology.driver_version = "580.95.05".into();
    for gpu in &mut topology.gpus {
        gpu.recovery_action = Some(0);
        gpu.link_kib = Some((1000, 2000));
    }
    let driver = Driver::lay_out(&k.cluster.node_dir(OURS).join("daemonset-driver"), &topology)?;
    let root = HostRoot::new(k.cluster.node_dir(OURS).join("host-root"))?;
    let agent = Agent { k: &k, driver, root };
    let verdict = as_they_are(&agent, &topology).await;
    // Whatever became of it: other tests want the node.
    k.run(&["delete", "pods", "--all", "--wait"], Duration::from_secs(60))?;
    let gone = agent.kubectl(&[
        "delete",
        "daemonset/slipway-agent",
        "--wait",
        "--cascade=foreground",
    ]);
    let gone = gone.and_then(|_| agent.root.remove());
    verdict?;
    gone
}

async fn as_they_are(agent: &Agent<'_>, topology: &Topology) -> Result<()> {
    let k = agent.k;
    let began = Instant::now();
    agent.apply("overlays/monitoring", "1")?;
    agent.allocatable(GPU, 2).await?;
    println!("`kubectl apply` to the node's allocatable: {:?}", began.elapsed());
    agent.rolled_out()?;
    for (name, restarts) in [("one", "Always"), ("two", "Never")] {
        let resources = json!({ "resources": { "limits": { GPU: 1 } } });
        k.pod(
            name,
            "exec sleep 1000",
            json!({ "restartPolicy": restarts }),
            resources,
        )?;
    }
    for name in ["one", "two"] {
        k.ready(name).await?;
    }
    let nodes = k.exec("one", "ls /dev | grep 'nvidia[0-9]'")?;
    let sick: usize = nodes.trim().trim_start_matches("nvidia").parse()?;
    for (label, value) in [
        ("nvidia\\.com/gpu\\.count", "4"),
        ("nvidia\\.com/gpu\\.product", "NVIDIA-A100-SXM4-40GB"),
    ] {
        k.until("node/node1", &format!(".metadata.labels.{label}"), value)
            .await?;
    }
    k.until("node/node1", SICK, "False").await?;
    agent.http("/healthz")?;

    let uuid = &topology.gpus[sick].uuid;
    agent.driver.raise(&format!("{sick} 79"))?;
    agent.allocatable(GPU, 1).await?;
    k.until("node/node1", SICK, "True").await?;
    k.until_true("an Event on the pod", |k| {
        let of = "reason=GpuUnhealthy,involvedObject.name=one";
        Ok(k.ok(&["get", "events", "--field-selector", of])?
            .contains("XID 79"))
    })
    .await?;
    // Everything that can happen has.
    the_dashboard_asks_for_what_there_is(agent, &agent.http("/metrics")?)?;
    // Kubelet would start its container again and again on the sick GPU.
    k.until_true("the pod to be evicted", |k| {
        Ok(k.ok(&["get", "pods", "--ignore-not-found", "one"])?.is_empty())
    })
    .await?;

    let two = incarnation(k, "two")?;
    let (name, restarts) = (".metadata.name", ".status.containerStatuses[0].restartCount");
    let first = agent.pod(name)?;
    ensure!(
        agent.pod(restarts)? == "0",
        "the agent was started again: {}",
        agent.log()
    );
    agent.kubectl(&["delete", "pod", &first, "--wait"])?;
    agent.rolled_out()?;
    ensure!(agent.pod(name)? != first);
    agent.allocatable(GPU, 1).await?;
    let page = agent.http("/metrics")?;
    let line = |l: &&str| l.starts_with("slipway_gpu_healthy{") && l.contains(uuid.as_str());
    let line = page.lines().find(line).context("no slipway_gpu_healthy")?;
    ensure!(
        line.contains("xid=\"79\"") && line.ends_with(" 0"),
        "the new pod has forgotten the XID: {line}"
    );
    agent.driver.raise(&format!("{sick} reset"))?;
    agent.allocatable(GPU, 2).await?;

    let program = k.cluster.node_dir(OURS).join("opt/slipway/bin/slipway-agent");
    let length = std::fs::metadata(&program)?.len();
    let began = Instant::now();
    agent.apply("overlays/monitoring", "2")?;
    agent.rolled_out()?;
    agent.allocatable(GPU, 2).await?;
    println!("another version of the agent, rolled out: {:?}", began.elapsed());
    ensure!(
        std::fs::metadata(&program)?.len() == length + 1,
        "the program is the old one"
    );

    agent.apply("overlays/time-slicing", "2")?;
    agent.rolled_out()?;
    agent.allocatable(GPU, 8).await?;
    let shared: Vec<String> = (0..3).map(|n| format!("shared-{n}")).collect();
    for name in &shared {
        gpu_pod(k, name, GPU, "exec sleep 1000")?;
    }
    for name in &shared {
        k.ready(name).await?;
    }
    k.ok(&[
        &["delete", "pods", "--wait"],
        shared.iter().map(String::as_str).collect::<Vec<_>>().as_slice(),
    ]
    .concat())?;

    agent.apply("overlays/mig", "2")?;
    agent.rolled_out()?;
    for (resource, count) in [
        (GPU, 2),
        ("nvidia.com/mig-1g.5gb", 6),
        ("nvidia.com/mig-3g.20gb", 2),
    ] {
        agent.allocatable(resource, count).await?;
    }
    gpu_pod(
        k,
        "slice",
        "nvidia.com/mig-3g.20gb",
        "ls /dev/nvidia-caps /dev | grep 'nvidia[0-9]\\|cap[1-9]'",
    )?;
    k.phase("slice", "Succeeded").await?;
    let seen = k.logs("slice")?;
    let (caps, cards): (Vec<&str>, Vec<&str>) = seen.lines().partition(|l| l.contains("-cap"));
    ensure!(caps.len() == 2 && cards.len() == 1, "the slice's pod sees {seen}");
    // Five agents have come and gone.
    ensure!(
        incarnation(k, "two")? == two,
        "its container is another one: {} and was {two}",
        incarnation(k, "two")?
    );
    agent.uses_its_rights_and_no_others()?;
    // One of the two GPUs is in a pod's hands.
    k.ok(&["delete", "pod", "two", "--wait"])?;
    the_examples_have_one_gpu(k).await
}

/// The examples with one GPU, of which the first names an image that has to be pulled.
async fn the_examples_have_one_gpu(k: &Kube) -> Result<()> {
    crate::training::image(k)?;
    let debian = (
        "image: debian:12-slim",
        "image: slipway.local/python:3\n        imagePullPolicy: Never",
    );
    k.example("gpu-check.yaml", &[debian])?;
    k.example("gpu-job.yaml", &[])?;
    k.complete("gpu-check", SOON).await?;
    k.complete("train-gpu", SOON).await?;
    let log = k.ok(&["logs", "job/gpu-check"])?;
    ensure!(
        log.contains("libcuda.so.1") && log.contains("a fake driver"),
        "{log}"
    );
    let log = k.ok(&["logs", "job/train-gpu"])?;
    let is_card = |l: &&str| l.starts_with("nvidia") && l.ends_with(|c: char| c.is_ascii_digit());
    ensure!(
        log.lines().filter(is_card).count() == 1
            && log.contains("libcuda is there")
            && log.contains("accuracy "),
        "{log}"
    );
    Ok(())
}

/// The machine's root as a mount that is shared, which it is where systemd started it; with a /run of its own, so that the
/// mount points of the agent's pod there are not left behind.
struct HostRoot(PathBuf);

impl HostRoot {
    fn new(at: PathBuf) -> Result<HostRoot> {
        std::fs::create_dir_all(&at)?;
        let here = HostRoot(at);
        let at = here.0.display();
        let made = cmd::sh(&format!(
            "mount --bind / '{at}' && mount --make-shared '{at}' && mount -t tmpfs tmpfs '{at}/run' && \
             for d in proc sys dev; do mount --bind /$d '{at}'/$d || exit 1; done"
        ));
        match made {
            Ok(_) => Ok(here),
            Err(e) => {
                let gone = here.remove();
                Err(gone.err().map_or(e, |g| g.context("and could not be undone")))
            }
        }
    }

    fn remove(&self) -> Result<()> {
        let mut all = harness::leftovers::mounts_under(&self.0);
        all.reverse();
        for m in all {
            cmd::sh(&format!("umount '{m}'"))?;
        }
        Ok(())
    }
}

/// Each metric of the dashboard's, with every label that it is told apart by, is one of the agent's, or what the ServiceMonitor
/// adds; and the ServiceMonitor finds the agent's Service.
fn the_dashboard_asks_for_what_there_is(agent: &Agent, page: &str) -> Result<()> {
    let of = |kind: &str, name: &str| -> Result<Value> {
        Ok(serde_json::from_str(
            &agent.kubectl(&["get", kind, name, "-o", "json"])?,
        )?)
    };
    let (monitor, service) = (
        of("servicemonitor", "slipway-agent")?,
        of("service", "slipway-agent")?,
    );
    let labels = service["metadata"]["labels"].as_object().context("labels")?;
    let wanted = monitor["spec"]["selector"]["matchLabels"]
        .as_object()
        .context("a selector")?;
    ensure!(
        wanted.iter().all(|(k, v)| labels.get(k) == Some(v)),
        "{wanted:?} selects no {labels:?}"
    );
    let endpoint = &monitor["spec"]["endpoints"][0];
    ensure!(
        service["spec"]["ports"][0]["name"] == endpoint["port"],
        "{endpoint}"
    );
    let added: Vec<&str> = endpoint["relabelings"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|r| r["targetLabel"].as_str())
        .collect();

    let board = of("configmap", "slipway-gpu-dashboard")?;
    ensure!(board["metadata"]["labels"]["grafana_dashboard"] == "1", "{board}");
    let board: Value = serde_json::from_str(board["data"]["gpus.json"].as_str().context("gpus.json")?)?;
    let mut asked = Vec::new();
    expressions(&board, &mut asked);
    ensure!(asked.len() > 10, "a dashboard with few questions: {asked:?}");
    for (expression, legend) in &asked {
        for metric in metrics_in(expression) {
            let of = |l: &&str| {
                let rest = l.strip_prefix(metric);
                rest.is_some_and(|r| r.starts_with('{') || r.starts_with(' '))
            };
            let series: Vec<&str> = page.lines().filter(of).collect();
            ensure!(
                !series.is_empty(),
                "{expression} asks for {metric}, which the agent has not:\n{page}"
            );
            for label in labels_in(expression) {
                let is_there = |l: &&str| l.contains(&format!("{label}=\""));
                ensure!(
                    added.contains(&label) || series.iter().any(is_there),
                    "{expression} wants {label}, which is on none of {series:?}"
                );
            }
        }
        for label in legend_labels(legend) {
            ensure!(
                added.contains(&label) || page.contains(&format!("{label}=\"")),
                "{expression} is told apart by {label}, which nothing has:\n{page}"
            );
        }
    }
    Ok(())
}

/// Every question to Prometheus in a dashboard, with the words for its answers.
fn expressions(value: &Value, into: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for key in ["expr", "query"] {
                if let Some(text) = map.get(key).and_then(Value::as_str)
                    && text.contains("slipway_")
                {
                    let legend = map.get("legendFormat").and_then(Value::as_str);
                    into.push((text.to_owned(), legend.unwrap_or_default().to_owned()));
                }
            }
            map.values().for_each(|v| expressions(v, into));
        }
        Value::Array(list) => list.iter().for_each(|v| expressions(v, into)),
        _ => {}
    }
}

fn metrics_in(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|w| w.starts_with("slipway_"))
}

/// Those of selectors (`{a=~"x"}`), of `by (…)` and of `label_values(metric, a)`.
fn labels_in(expression: &str) -> impl Iterator<Item = &str> {
    let matched = expression
        .split(['{', ',', '}'])
        .filter_map(|p| p.split_once('=').map(|(name, _)| name));
    let named = expression
        .split_once("by (")
        .and_then(|(_, rest)| rest.split_once(')'))
        .map_or("", |(list, _)| list);
    let values = expression
        .strip_prefix("label_values(")
        .and_then(|rest| rest.split_once(','))
        .map_or("", |(_, label)| label.trim_end_matches(')'));
    matched
        .chain(named.split(','))
        .chain([values])
        .map(str::trim)
        .filter(|l| !l.is_empty() && l.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
}

fn legend_labels(legend: &str) -> impl Iterator<Item = &str> {
    let parts = legend.split("{{").skip(1);
    parts.filter_map(|p| p.split_once("}}").map(|(label, _)| label.trim()))
}
