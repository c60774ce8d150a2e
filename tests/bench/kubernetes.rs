//! What Kubernetes has of the runtime: one cluster, with slipwayd under one kubelet and containerd under the other.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::cluster::{Cluster, Net, Options};
use harness::{cmd, leftovers};
use serde_json::{Value, json};

use crate::allocatable;
use crate::table::Table;

const IMAGE: &str = "slipway.test/busybox:1";
/// The nodes: ours, and containerd's.
const NODES: [usize; 2] = [1, 2];
const MANY: usize = 30;
/// Pods and containers in each of them while kubelet lists.
const LISTED: (usize, usize) = (20, 10);
/// How long CPU is counted.
const COUNTED: Duration = Duration::from_secs(20);
const FORWARDED: usize = 200_000_000;

/// Brings a cluster up, fills the rows, and takes it down.
pub async fn measure(table: &mut Table, rounds: usize) -> Result<()> {
    let pid = std::process::id();
    let (cluster, _) = Cluster::up(Options {
        dir: format!("/var/tmp/slipway-bench-kube-{pid}").into(),
        net: Net {
            name: format!("sb{:x}", pid & 0xf_ffff),
            base: (243, u8::try_from(pid % 64 * 4).context("below 256")?),
            count: 2,
        },
        program: std::env::current_exe().context("where this program is")?,
        slipwayd: String::new(),
        kubelet: String::new(),
        gates: Vec::new(),
        containerd: vec![NODES[1]],
    })
    .await?;
    let outcome = all_rows(table, &cluster, rounds).await;
    let down = cluster.down().await;
    outcome.and(down)
}

async fn all_rows(table: &mut Table, cluster: &Cluster, rounds: usize) -> Result<()> {
    for n in NODES {
        cluster.build_stage(n, "busybox", IMAGE)?;
    }
    let began = Instant::now();
    while cluster.kubectl(&["get", "serviceaccount", "default"]).is_err() {
        ensure!(began.elapsed() < Duration::from_secs(20), "no service account");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let watch = Watch::start(cluster)?;
    let bench = Bench {
        cluster,
        watch,
        made: Cell::new(0),
    };
    // A round to warm up; then in turn, so that the machine's drift meets both.
    let mut one = [Vec::new(), Vec::new()];
    for round in 0..rounds * 3 + 1 {
        for (side, n) in NODES.into_iter().enumerate() {
            let took = bench.up(n, 1, &json!({}))?.1;
            bench.none()?;
            if round > 0 {
                one[side].push(took);
            }
        }
    }
    table.times("1 pod, create to Ready", &one[0], &one[1]);
    let mut many = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (side, n) in NODES.into_iter().enumerate() {
            many[side].push(bench.up(n, MANY, &json!({}))?.1);
            bench.none()?;
        }
    }
    table.times("30 pods at once, create to Ready", &many[0], &many[1]);
    bench.commands(table, rounds)?;
    bench.probes(table)?;
    bench.listed(table).await?;
    allocatable::measure(table, cluster).await
}

struct Bench<'a> {
    cluster: &'a Cluster,
    watch: Watch,
    /// How many times pods were made: part of their names, so that nothing told late of earlier ones counts.
    made: Cell<usize>,
}

impl Bench<'_> {
    /// Creates pods on a node, their container changed by `more`; from the first one's creation to the last one's being
    /// Ready, as the API server tells it; what their names begin with.
    fn up(&self, node: usize, count: usize, more: &Value) -> Result<(String, Duration)> {
        let mut container = json!({ "name": "c0", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
                                    "command": ["sh", "-c", "echo hello; exec sleep 100000"] });
        merge(&mut container, more);
        self.create(node, count, &[container])
    }

    fn create(&self, node: usize, count: usize, containers: &[Value]) -> Result<(String, Duration)> {
        self.made.set(self.made.get() + 1);
        let names = format!("p{}-", self.made.get());
        let pod = |i: usize| {
            json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("{names}{i}") },
                    "spec": { "nodeName": format!("node{node}"), "terminationGracePeriodSeconds": 0, "restartPolicy": "Never",
                              "automountServiceAccountToken": false, "enableServiceLinks": false, "containers": containers } })
        };
        let list: Vec<Value> = (0..count).map(pod).collect();
        let text = json!({ "apiVersion": "v1", "kind": "List", "items": list }).to_string();
        self.cluster.apply(&text)?;
        let took = self.watch.ready(&names, count)?;
        Ok((names, took))
    }

    /// Removes every pod, and waits until they are gone.
    fn none(&self) -> Result<()> {
        self.cluster
            .kubectl(&["delete", "pods", "--all", "--wait=true", "--timeout=100s"])?;
        Ok(())
    }

    /// kubectl exec, logs and port-forward: with kubectl's own start, which both have.
    fn commands(&self, table: &mut Table, rounds: usize) -> Result<()> {
        let web = format!(
            "mkdir -p /www && head -c {FORWARDED} /dev/zero > /www/big && echo hello && exec httpd -f -p 8080 -h /www"
        );
        let more = json!({ "command": ["sh", "-c", web],
                           "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 } });
        let mut pods = Vec::new();
        for n in NODES {
            pods.push(format!("{}0", self.up(n, 1, &more)?.0));
        }
        for (what, args) in [
            ("kubectl exec true", &["exec", "POD", "--", "true"][..]),
            ("kubectl logs", &["logs", "POD"][..]),
        ] {
            let mut times = [Vec::new(), Vec::new()];
            // kubectl's own start is most of it, and differs by more than the runtimes do.
            for round in 0..=rounds * 14 {
                for side in turn(round) {
                    let name = &pods[side];
                    let args: Vec<&str> = args.iter().map(|a| if *a == "POD" { name } else { *a }).collect();
                    let began = Instant::now();
                    self.cluster.kubectl(&args)?;
                    if round > 0 {
                        times[side].push(began.elapsed());
                    }
                }
            }
            table.times(what, &times[0], &times[1]);
        }
        self.kept(table, &pods, rounds)?;
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=rounds * 3 {
            for side in turn(round) {
                let took = self.forward(&pods[side])?;
                if round > 0 {
                    times[side].push(took);
                }
            }
        }
        table.times("200 MB through kubectl port-forward", &times[0], &times[1]);
        self.none()
    }

    /// Logs from the API server through a connection that is kept: without kubectl's start, which is most of the time it takes.
    fn kept(&self, table: &mut Table, pods: &[String], rounds: usize) -> Result<()> {
        let proxy = Proxy::start(self.cluster)?;
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=rounds * 70 {
            for side in turn(round) {
                let began = Instant::now();
                let said = proxy.get(&format!("/api/v1/namespaces/default/pods/{}/log", pods[side]))?;
                if round > 0 {
                    times[side].push(began.elapsed());
                }
                ensure!(said.ends_with("hello\n"), "{said}");
            }
        }
        table.times("a log, asked of the API server", &times[0], &times[1]);
        Ok(())
    }

    fn forward(&self, pod: &str) -> Result<Duration> {
        let pod = format!("pod/{pod}");
        let mut child = self
            .cluster
            .kubectl_command(&["port-forward", &pod, ":8080", "--address", "127.0.0.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut said = BufReader::new(child.stdout.take().context("piped")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        // kubectl says each connection, and ends where nobody takes that.
        let rest = std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let port = line.split("127.0.0.1:").nth(1).and_then(|p| p.split(' ').next());
        let asked = port
            .with_context(|| format!("no port in {line:?}"))
            .and_then(|port| {
                let began = Instant::now();
                let got = cmd::sh(&format!(
                    "curl -sf --max-time 55 http://127.0.0.1:{port}/big | wc -c"
                ))?;
                ensure!(got.trim() == FORWARDED.to_string(), "{got} bytes arrived");
                Ok(began.elapsed())
            });
        child.kill()?;
        child.wait()?;
        let _ = rest.join();
        asked
    }

    /// Thirty pods that are each asked once a second whether they live: what that costs the runtime and its shims.
    fn probes(&self, table: &mut Table) -> Result<()> {
        let probe = json!({ "exec": { "command": ["true"] }, "periodSeconds": 1, "timeoutSeconds": 20, "failureThreshold": 100 });
        let mut cpu = [0.0; 2];
        for (side, n) in NODES.into_iter().enumerate() {
            self.up(n, MANY, &json!({ "livenessProbe": probe }))?;
            cpu[side] = self.cpu(n)?;
            self.none()?;
        }
        table.row(
            "30 exec probes a second, CPU of runtime and shims",
            cpu[0],
            cpu[1],
            "ms/s",
        );
        Ok(())
    }

    /// kubelet's lists with 200 containers: one, and what a second of them costs the runtime.
    async fn listed(&self, table: &mut Table) -> Result<()> {
        let container = |i: usize| json!({ "name": format!("c{i}"), "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "100000"] });
        let containers: Vec<Value> = (0..LISTED.1).map(container).collect();
        let (mut times, mut cpu) = ([Vec::new(), Vec::new()], [0.0; 2]);
        for (side, n) in NODES.into_iter().enumerate() {
            self.create(n, LISTED.0, &containers)?;
            let cri = self.cluster.cri(n).await?;
            for _ in 0..50 {
                let began = Instant::now();
                let (pods, all) = (cri.pods().await?, cri.containers().await?);
                times[side].push(began.elapsed());
                ensure!(
                    pods.len() >= LISTED.0 && all.len() >= LISTED.0 * LISTED.1,
                    "{} pods, {} containers",
                    pods.len(),
                    all.len()
                );
            }
            cpu[side] = self.cpu(n)?;
            self.none()?;
        }
        table.times(
            "a list of pods and of containers, 200 of these",
            &times[0],
            &times[1],
        );
        table.row(
            "CPU of the runtime under kubelet, 200 containers",
            cpu[0],
            cpu[1],
            "ms/s",
        );
        Ok(())
    }

    /// Milliseconds of CPU a second of a node's runtime, its shims and their ended children.
    fn cpu(&self, node: usize) -> Result<f64> {
        let runtime = self.cluster.runtime(node);
        let daemon = self
            .cluster
            .processes()
            .pid(&runtime)
            .with_context(|| format!("{runtime} has ended"))?;
        let dir = self.cluster.node_dir(node);
        // Whoever starts or ends meanwhile is not counted: no pod does.
        let shims: Vec<u32> = leftovers::processes_naming(&dir)
            .into_iter()
            .filter(|(_, c)| c.contains("containerd-shim-"))
            .map(|(pid, _)| pid)
            .collect();
        ensure!(!shims.is_empty(), "{runtime} has no shims");
        let used = || -> f64 { shims.iter().chain([&daemon]).map(|pid| ticks(*pid)).sum::<f64>() };
        let (before, began) = (used(), Instant::now());
        std::thread::sleep(COUNTED);
        Ok((used() - before) * 10.0 / began.elapsed().as_secs_f64())
    }
}

/// In turn, and whoever was first in one round is second in the next.
fn turn(round: usize) -> [usize; 2] {
    [round % 2, 1 - round % 2]
}

/// `kubectl proxy`: the API server without its TLS.
struct Proxy {
    child: Child,
    address: String,
}

impl Proxy {
    fn start(cluster: &Cluster) -> Result<Proxy> {
        let mut child = cluster
            .kubectl_command(&["proxy", "--port=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        let said = child.stdout.take().context("piped").map(BufReader::new);
        let address = said.and_then(|mut said| {
            said.read_line(&mut line)?;
            let address = line.trim().rsplit(' ').next().unwrap_or_default();
            ensure!(address.starts_with("127.0.0.1:"), "no address in {line:?}");
            Ok(address.to_owned())
        });
        let mut proxy = Proxy {
            child,
            address: String::new(),
        };
        proxy.address = address?;
        Ok(proxy)
    }

    /// The answer to a request, its head and its body.
    fn get(&self, path: &str) -> Result<String> {
        let mut connection = TcpStream::connect(&self.address)?;
        connection.set_read_timeout(Some(Duration::from_secs(30)))?;
        connection.write_all(format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").as_bytes())?;
        let mut said = String::new();
        connection.read_to_string(&mut said)?;
        Ok(said)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// utime, stime, cutime and cstime of a process: fields 14 to 17 of proc_pid_stat(5), in hundredths of a second.
fn ticks(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(") ").next().unwrap_or_default();
    after
        .split(' ')
        .skip(11)
        .take(4)
        .filter_map(|f| f.parse::<f64>().ok())
        .sum()
}

/// What the API server tells of pods, as it tells it.
struct Watch {
    child: Child,
    events: Receiver<(Instant, String, Told)>,
}

enum Told {
    Added,
    Ready,
}

impl Watch {
    fn start(cluster: &Cluster) -> Result<Watch> {
        let args = ["get", "pods", "-o", "json", "--watch", "--output-watch-events"];
        let mut child = cluster
            .kubectl_command(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let out = BufReader::new(child.stdout.take().context("piped")?);
        let (told, events) = channel();
        std::thread::spawn(move || {
            for event in serde_json::Deserializer::from_reader(out).into_iter::<Value>() {
                let Ok(e) = event else { break };
                let name = e["object"]["metadata"]["name"].as_str().unwrap_or("").to_owned();
                let now = Instant::now();
                let conditions = e["object"]["status"]["conditions"].as_array();
                let ready = conditions
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True");
                let what = match e["type"].as_str() {
                    Some("ADDED") => Told::Added,
                    Some("MODIFIED") if ready => Told::Ready,
                    _ => continue,
                };
                if told.send((now, name, what)).is_err() {
                    break;
                }
            }
        });
        Ok(Watch { child, events })
    }

    /// Waits until `count` pods whose names begin so are Ready; from the first one's being added.
    fn ready(&self, names: &str, count: usize) -> Result<Duration> {
        let (mut first, mut ready) = (None, std::collections::BTreeSet::new());
        let deadline = Instant::now() + Duration::from_secs(120);
        while let Ok((at, name, what)) = self
            .events
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if !name.starts_with(names) {
                continue;
            }
            match what {
                Told::Added => first = first.or(Some(at)),
                Told::Ready => {
                    ready.insert(name);
                }
            }
            if ready.len() == count
                && let Some(first) = first
            {
                return Ok(at - first);
            }
        }
        bail!("{} of {count} pods are Ready after two minutes", ready.len())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn merge(into: &mut Value, more: &Value) {
    if let (Some(a), Some(b)) = (into.as_object_mut(), more.as_object()) {
        a.extend(b.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
}
