//! slipway-agent on a driver made for tests, before a stand-in kubelet: 8 GPUs, 64 processes in 8 pods.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::lab;
use hyper_util::rt::TokioIo;
use slipway_fake_gpu::topology::Process;
use slipway_fake_gpu::{Driver, FOLDER, Topology};
use slipway_kubelet_api::podresources as who;
use slipway_kubelet_api::v1beta1::device_plugin_client::DevicePluginClient;
use slipway_kubelet_api::v1beta1::registration_server::{Registration, RegistrationServer};
use slipway_kubelet_api::v1beta1::{AllocateRequest, ContainerAllocateRequest, Empty, RegisterRequest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Request, Response, Status};

use crate::table::Table;

const GPU: &str = "nvidia.com/gpu";
const SOON: Duration = Duration::from_secs(30);
/// Starts, and XIDs.
const ROUNDS: usize = 16;
const ALLOCATIONS: usize = 2000;
const SCRAPES: u32 = 20;

/// A list of kubelet's: when it came, and how many of its devices are unhealthy, of how many.
type List = (Instant, usize, usize);

/// kubelet's part: dials back, and tells of each list.
struct Registrar {
    folder: PathBuf,
    lists: mpsc::Sender<List>,
    plugin: mpsc::Sender<DevicePluginClient<Channel>>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let socket = self.folder.join(request.into_inner().endpoint);
        let channel = Endpoint::from_static("http://plugin")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
            }))
            .await
            .map_err(|e| Status::unavailable(e.to_string()))?;
        let mut plugin = DevicePluginClient::new(channel);
        plugin.get_device_plugin_options(Empty {}).await?;
        let _ = self.plugin.send(plugin.clone()).await;
        let lists = self.lists.clone();
        tokio::spawn(async move {
            let mut stream = plugin.list_and_watch(Empty {}).await?.into_inner();
            while let Some(list) = stream.message().await? {
                let sick = list.devices.iter().filter(|d| d.health != "Healthy").count();
                let _ = lists.send((Instant::now(), sick, list.devices.len())).await;
            }
            Ok::<_, Status>(())
        });
        Ok(Response::new(Empty {}))
    }
}

/// Who has which GPU.
struct Who(Vec<String>);

#[tonic::async_trait]
impl who::pod_resources_lister_server::PodResourcesLister for Who {
    async fn list(
        &self,
        _: Request<who::ListPodResourcesRequest>,
    ) -> Result<Response<who::ListPodResourcesResponse>, Status> {
        let pod = |(n, uuid): (usize, &String)| who::PodResources {
            name: format!("train-{n}"),
            namespace: "jobs".into(),
            containers: vec![who::ContainerResources {
                name: "main".into(),
                devices: vec![who::ContainerDevices {
                    resource_name: GPU.into(),
                    device_ids: vec![uuid.clone()],
                }],
            }],
        };
        Ok(Response::new(who::ListPodResourcesResponse {
            pod_resources: self.0.iter().enumerate().map(pod).collect(),
        }))
    }

    async fn get(
        &self,
        _: Request<who::GetPodResourcesRequest>,
    ) -> Result<Response<who::GetPodResourcesResponse>, Status> {
        Err(Status::unimplemented("only the list is asked for"))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<who::AllocatableResourcesRequest>,
    ) -> Result<Response<who::AllocatableResourcesResponse>, Status> {
        Err(Status::unimplemented("the agent knows what it has handed out"))
    }
}

/// The agent, ended with this.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    dir: tempfile::TempDir,
    config: String,
    driver: Driver,
    lists: mpsc::Receiver<List>,
    plugins: mpsc::Receiver<DevicePluginClient<Channel>>,
}

/// Measures into `table`.
pub async fn measure(table: &mut Table) -> Result<()> {
    let mut bench = Bench::new()?;
    let mut starts = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let agent = bench.start(10)?;
        let (at, ..) = bench.list(|sick, all| sick == 0 && all == 8).await?;
        starts.push(at - began);
        drop(agent);
        while bench.lists.try_recv().is_ok() || bench.plugins.try_recv().is_ok() {}
    }
    row(table, "agent's start → first device list", &starts, 0.5, 50.0);

    // A GPU that was reset is found by a look.
    let agent = bench.start(1)?;
    bench.list(|sick, all| sick == 0 && all == 8).await?;
    let mut plugin = bench.plugins.recv().await.context("no plugin")?;
    let mut xids = Vec::new();
    for round in 0..ROUNDS {
        let gpu = round % 8;
        let began = Instant::now();
        bench.driver.raise(&format!("{gpu} 79"))?;
        let (at, ..) = bench.list(|sick, _| sick == 1).await?;
        xids.push(at - began);
        bench.driver.raise(&format!("{gpu} reset"))?;
        bench.list(|sick, _| sick == 0).await?;
        // It is watched again a moment after.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    row(table, "XID → ListAndWatch update", &xids, 0.5, 5.0);

    let id = Topology::named("h100x8")?.gpus[0].uuid.clone();
    let mut calls = Vec::new();
    for _ in 0..ALLOCATIONS {
        let request = AllocateRequest {
            container_requests: vec![ContainerAllocateRequest {
                devices_ids: vec![id.clone()],
            }],
        };
        let began = Instant::now();
        plugin.allocate(request).await?;
        calls.push(began.elapsed());
    }
    row(table, "Allocate, p50", &calls, 0.5, 1.0);
    row(table, "Allocate, p99", &calls, 0.99, 1.0);
    drop(agent);
    while bench.lists.try_recv().is_ok() {}
    let agent = bench.start(10)?;
    bench.list(|sick, all| sick == 0 && all == 8).await?;
    bench.usage(table, &agent).await
}

fn row(table: &mut Table, what: &str, times: &[Duration], quantile: f64, target: f64) {
    let mut ms: Vec<f64> = times.iter().map(|d| d.as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let at = ((ms.len() as f64 * quantile) as usize).min(ms.len().saturating_sub(1));
    table.row(what, ms.get(at).copied().unwrap_or(0.0), target, "ms");
}

impl Bench {
    fn new() -> Result<Bench> {
        let dir = tempfile::tempdir()?;
        let mut topology = Topology::named("h100x8")?;
        let mut pid = 100_000;
        for gpu in &mut topology.gpus {
            for _ in 0..8 {
                pid += 1;
                gpu.processes.push(Process {
                    pid,
                    used_mib: 1000,
                    utilization: 50,
                    ..Process::default()
                });
            }
        }
        let driver = Driver::lay_out(&dir.path().join("driver"), &topology)?;
        for n in 100_001..=pid {
            let of = driver.proc().join(n.to_string());
            std::fs::create_dir_all(&of)?;
            let (pod, id) = (format!("{:032x}", (n - 100_001) / 8), format!("{n:064x}"));
            std::fs::write(
                of.join("cgroup"),
                format!("0::/kubepods/burstable/pod{pod}/{id}\n"),
            )?;
        }
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("kubelet"))?;
        let config = format!(
            "[driver]\nroot = {:?}\ndev = {:?}\n[paths]\nproc = {:?}\nsys = {:?}\nstate = {:?}\nkubelet = {:?}\ncdi = {:?}\npod_resources = {:?}\npods = {:?}\n[http]\nlisten = \"127.0.0.1:0\"\n",
            driver.root(),
            driver.dev(),
            driver.proc(),
            driver.sys(),
            path("state"),
            path("kubelet"),
            path("cdi"),
            path("who.sock"),
            path("pods.sock"),
        );
        let (to, lists) = mpsc::channel(64);
        let (plugin, plugins) = mpsc::channel(64);
        let registrar = Registrar {
            folder: path("kubelet"),
            lists: to,
            plugin,
        };
        let socket = UnixListener::bind(path("kubelet/kubelet.sock"))?;
        tokio::spawn(
            Server::builder()
                .add_service(RegistrationServer::new(registrar))
                .serve_with_incoming(UnixListenerStream::new(socket)),
        );
        let uuids = topology.gpus.iter().map(|g| g.uuid.clone()).collect();
        let socket = UnixListener::bind(path("who.sock"))?;
        tokio::spawn(
            Server::builder()
                .add_service(who::pod_resources_lister_server::PodResourcesListerServer::new(
                    Who(uuids),
                ))
                .serve_with_incoming(UnixListenerStream::new(socket)),
        );
        Ok(Bench {
            dir,
            config,
            driver,
            lists,
            plugins,
        })
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Starts it with a look every so many seconds.
    fn start(&self, seconds: u32) -> Result<Agent> {
        let config = format!("{}[health]\nprobe_seconds = {seconds}\n", self.config);
        std::fs::write(self.dir.path().join("agent.toml"), config)?;
        let child = Command::new(lab::bin("slipway-agent"))
            .arg("--config")
            .arg(self.dir.path().join("agent.toml"))
            .env(FOLDER, self.driver.nvml())
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(self.log())?)
            .spawn()
            .context("starting slipway-agent (make build makes it)")?;
        Ok(Agent(child))
    }

    /// The first list of this kind.
    async fn list(&mut self, wanted: impl Fn(usize, usize) -> bool) -> Result<List> {
        let find = async {
            while let Some((at, sick, all)) = self.lists.recv().await {
                if wanted(sick, all) {
                    return Ok((at, sick, all));
                }
            }
            anyhow::bail!("the lists have ended")
        };
        let found = tokio::time::timeout(SOON, find).await;
        found.with_context(|| {
            format!(
                "no such list:\n{}",
                std::fs::read_to_string(self.log()).unwrap_or_default()
            )
        })?
    }

    /// Memory and time of the processor, with a page of metrics every 15 s.
    async fn usage(&self, table: &mut Table, agent: &Agent) -> Result<()> {
        let log = std::fs::read_to_string(self.log())?;
        let address = log.lines().find_map(|l| l.split_once("HTTP is served address="));
        let address = address.context("no address")?.1.trim().to_owned();
        let pids = family(agent.0.id())?;
        ensure!(pids.len() == 2, "the agent and its child, not {pids:?}");
        let idle = rate(&pids, Duration::from_secs(20)).await?;
        let before = used(&pids)?;
        let began = Instant::now();
        for _ in 0..SCRAPES {
            tokio::time::sleep(Duration::from_millis(1050)).await;
            let page = scrape(&address)?;
            let lines = page
                .lines()
                .filter(|l| l.starts_with("slipway_gpu_process_memory_bytes{"));
            ensure!(lines.count() == 64, "{page}");
        }
        let busy = used(&pids)?.saturating_sub(before).as_secs_f64() - idle * began.elapsed().as_secs_f64();
        let page = busy.max(0.0) / f64::from(SCRAPES);
        table.row("a page of metrics, time of the processor", page * 1e3, 0.0, "ms");
        table.row(
            "agent's processor, a page every 15 s",
            (idle + page / 15.0) * 100.0,
            0.5,
            "%",
        );
        table.row("agent's PSS", pss(&pids)?, 12.0, "MiB");
        table.row("agent's PSS, of it the child's", pss(&pids[1..])?, 0.0, "MiB");
        Ok(())
    }
}

fn scrape(address: &str) -> Result<String> {
    let mut stream = std::net::TcpStream::connect(address)?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// A process and its children.
fn family(pid: u32) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let children = text.split_whitespace().map(str::parse);
    let children: Vec<u32> = children.collect::<Result<_, _>>()?;
    Ok(std::iter::once(pid).chain(children).collect())
}

/// Time of the processor that all their threads have used.
fn used(pids: &[u32]) -> Result<Duration> {
    let mut all = 0;
    for pid in pids {
        for task in std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))?.flatten() {
            let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            all += text
                .split(' ')
                .next()
                .and_then(|ns| ns.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    Ok(Duration::from_nanos(all))
}

/// Seconds of the processor a second.
async fn rate(pids: &[u32], time: Duration) -> Result<f64> {
    let before = used(pids)?;
    tokio::time::sleep(time).await;
    Ok(used(pids)?.saturating_sub(before).as_secs_f64() / time.as_secs_f64())
}

fn pss(pids: &[u32]) -> Result<f64> {
    let mut kib = 0.0;
    for pid in pids {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("Pss:"))
            .context("no Pss")?;
        kib += line.trim().trim_end_matches(" kB").trim().parse::<f64>()?;
    }
    Ok(kib / 1024.0)
}
