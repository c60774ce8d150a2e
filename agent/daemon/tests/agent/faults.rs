//! What is done about those who have a sick GPU: with stand-ins for slipwayd, kubelet and the API server.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use slipway_fake_gpu::Topology;
use slipway_fault_api::v1::fail_container_response::Outcome;
use slipway_fault_api::v1::fault_server::{Fault, FaultServer};
use slipway_fault_api::v1::{FailContainerRequest, FailContainerResponse};
use slipway_kubelet_api::v1beta1::PreStartContainerRequest;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::api::{Api, Evicts};
use crate::kubelet::{GPU, Kubelet};
use crate::kubernetes::telling;
use crate::node::{Node, root};
use crate::who::{Pod, Serves, Who};

/// A stand-in for slipwayd: it has every container, and each request is "announce ID" or "kill ID".
#[derive(Clone, Default)]
pub struct Runtime(Arc<Mutex<Vec<FailContainerRequest>>>, Arc<Mutex<Says>>);

/// What it says of containers, by the first letter of their ids.
#[derive(Default)]
pub struct Says {
    /// These have ended.
    pub gone: String,
    /// It has none of these.
    pub unknown: String,
    /// So many kills are broken off.
    pub broken: usize,
}

impl Runtime {
    fn serve(socket: &Path) -> Runtime {
        let runtime = Runtime::default();
        let listener = UnixListener::bind(socket).unwrap();
        tokio::spawn(
            Server::builder()
                .add_service(FaultServer::new(runtime.clone()))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        runtime
    }

    pub fn asked(&self) -> Vec<String> {
        let word = |r: &FailContainerRequest| {
            let verb = if r.only_announce { "announce" } else { "kill" };
            format!("{verb} {}", &r.container_id[..1])
        };
        self.0.lock().unwrap().iter().map(word).collect()
    }

    pub fn last(&self) -> FailContainerRequest {
        self.0.lock().unwrap().last().unwrap().clone()
    }
}

#[tonic::async_trait]
impl Fault for Runtime {
    async fn fail_container(
        &self,
        request: Request<FailContainerRequest>,
    ) -> Result<Response<FailContainerResponse>, Status> {
        let request = request.into_inner();
        let mut says = self.1.lock().unwrap();
        let outcome = if says.gone.contains(&request.container_id[..1]) {
            Outcome::AlreadyExited
        } else if request.only_announce {
            Outcome::Announced
        } else {
            Outcome::Failed
        };
        let only_announce = request.only_announce;
        let unknown = says.unknown.contains(&request.container_id[..1]);
        self.0.lock().unwrap().push(request);
        if unknown {
            return Err(Status::not_found("there is no such container"));
        }
        if !only_announce && says.broken > 0 {
            says.broken -= 1;
            return Err(Status::unavailable("it is being restarted"));
        }
        Ok(Response::new(FailContainerResponse {
            outcome: outcome as i32,
            exit_code: 137,
            ..Default::default()
        }))
    }
}

pub struct World {
    pub node: Node,
    pub kubelet: Kubelet,
    pub api: Api,
    pub who: Who,
    pub runtime: Option<Runtime>,
    pub topology: Topology,
}

pub const UIDS: [&str; 3] = [
    "0b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f",
    "1b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f",
    "2b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f",
];
pub const IDS: [&str; 3] = [
    "af1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a",
    "bf1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a",
    "cf1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a",
];
pub const NAMES: [&str; 3] = ["train-0", "train-1", "train-2"];

/// A pod, its container, and its GPUs or slices.
pub fn pod(n: usize, devices: &[&str]) -> Pod {
    Pod {
        name: NAMES[n],
        uid: UIDS[n],
        container: IDS[n],
        devices: devices.iter().map(|d| (*d).to_owned()).collect(),
    }
}

/// A node of 8 GPUs, of which train-0 has 3 and train-1 has 4; their pods' policy is as said.
pub async fn world(policy: &str, faults: &str, slipwayd: bool) -> World {
    world_of(policy, faults, slipwayd, Serves::Pods).await
}

pub async fn world_of(policy: &str, faults: &str, slipwayd: bool, serves: Serves) -> World {
    let topology = Topology::named("h100x8").unwrap();
    let api = Api::serve(0).await;
    for n in 0..2 {
        api.pod(NAMES[n], UIDS[n], policy, IDS[n]);
    }
    api.allocatable(GPU, 8);
    let mut node = telling(&topology, api.port, "");
    let socket = node.dir.path().join("fault.sock");
    let config = std::fs::read_to_string(node.config()).unwrap();
    let config = format!(
        "{config}[health]\nprobe_seconds = 1\n[faults]\nsocket = {:?}\n{faults}",
        socket.display().to_string()
    );
    std::fs::write(node.config(), config).unwrap();
    let runtime = slipwayd.then(|| Runtime::serve(&socket));
    let kubelet = Kubelet::start(&node.kubelet());
    let who = Who::serve_as(&node.pod_resources(), &node.pods(), serves);
    who.set(vec![
        pod(0, &[&topology.gpus[3].uuid]),
        pod(1, &[&topology.gpus[4].uuid]),
    ]);
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    World {
        node,
        kubelet,
        api,
        who,
        runtime,
        topology,
    }
}

impl World {
    pub fn asked(&self) -> Vec<String> {
        self.runtime.as_ref().map(Runtime::asked).unwrap_or_default()
    }

    pub fn says(&self) -> std::sync::MutexGuard<'_, Says> {
        self.runtime.as_ref().unwrap().1.lock().unwrap()
    }

    /// Until nothing is left to be done.
    pub async fn done(&self) {
        self.node.wait("it to be written down", || self.is_done()).await;
    }

    /// Whether somebody is done with.
    pub fn is_done(&self) -> bool {
        let book = self.node.dir.path().join("state/faults.json");
        std::fs::read_to_string(book).is_ok_and(|t| t.contains("\"done\":true"))
    }

    pub fn has_event(&self, pod: &str, reason: &str) -> bool {
        self.api.events(pod).iter().any(|(r, _)| r == reason)
    }

    /// A moment in which what must not happen could have.
    pub async fn a_moment(&self) {
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
}

#[tokio::test]
async fn root_who_has_the_gpu_is_announced_at_once_and_evicted_and_ended_when_the_node_has_fallen() {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "wait_seconds = 600\n", true).await;
    w.node.driver.raise("3 31").unwrap();
    w.node
        .wait("word of it", || w.node.log().contains("xid=31"))
        .await;
    w.a_moment().await;
    assert!(
        w.asked().is_empty() && w.api.taken().is_empty(),
        "{:?}",
        w.asked()
    );

    w.node.driver.raise("3 79").unwrap();
    w.node.wait("word to slipwayd", || !w.asked().is_empty()).await;
    w.a_moment().await;
    assert_eq!(w.asked(), ["announce a"]);
    assert!(
        w.api.taken().is_empty(),
        "a replacement could be placed on the same GPU"
    );
    w.api.allocatable(GPU, 7);
    w.node
        .wait("the container to be ended", || w.asked().len() == 2)
        .await;
    assert_eq!(w.asked(), ["announce a", "kill a"]);
    assert_eq!(w.api.taken(), [format!("evict train-0 {}", UIDS[0])]);
    let request = w.runtime.as_ref().unwrap().last();
    assert_eq!(
        (
            request.pod_uid.as_str(),
            request.container.as_str(),
            request.reason.as_str()
        ),
        (UIDS[0], "main", "GpuXid79")
    );
    assert!(request.hold_seconds >= 600, "no other is started meanwhile");
    let told = format!("GPU 3 ({}) is sick: XID 79", w.topology.gpus[3].uuid);
    assert!(request.message.starts_with(&told), "{}", request.message);
    for reason in ["GpuUnhealthy", "GpuFaultFailed", "GpuFaultEvicted"] {
        w.node.wait(reason, || w.has_event("train-0", reason)).await;
    }
    assert!(w.api.events("train-1").is_empty());

    // What is written down as done is: an agent that is killed before does it again.
    let book = w.node.dir.path().join("state/faults.json");
    let is_done = || std::fs::read_to_string(&book).is_ok_and(|t| t.contains("\"done\":true"));
    w.node.wait("it to be written down", is_done).await;
    // It is done: neither another agent nor another XID of the same GPU does it again.
    w.node.kill();
    w.node.start();
    w.node
        .wait("a list again", || w.kubelet.ids(GPU, false).len() == 1)
        .await;
    w.node.driver.raise("3 48").unwrap();
    w.a_moment().await;
    assert_eq!((w.asked().len(), w.api.taken().len()), (2, 1));
    // Well, and sick again, with another on it: that is another case.
    w.who.set(vec![pod(2, &[&w.topology.gpus[3].uuid])]);
    w.api.pod(NAMES[2], UIDS[2], "Always", IDS[2]);
    w.node.driver.raise("3 reset").unwrap();
    w.node
        .wait("it to be well", || w.kubelet.ids(GPU, true).len() == 8)
        .await;
    w.a_moment().await;
    w.node.driver.raise("3 79").unwrap();
    w.node.wait("the next to be ended", || w.asked().len() == 4).await;
    assert_eq!(w.asked()[2..], ["announce c", "kill c"]);
    assert_eq!(w.api.taken()[1..], [format!("evict train-2 {}", UIDS[2])]);
}

#[tokio::test]
async fn root_a_pod_that_ends_by_its_container_is_not_evicted() {
    if !root() {
        return;
    }
    let w = world("Never", "", true).await;
    w.api.allocatable(GPU, 7);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("the container to be ended", || {
            w.asked() == ["announce a", "kill a"]
        })
        .await;
    w.a_moment().await;
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
    // Nor is any where only that is wanted.
    let w = world("Always", "action = \"fail\"\n", true).await;
    w.api.allocatable(GPU, 7);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("the container to be ended", || {
            w.asked() == ["announce a", "kill a"]
        })
        .await;
    assert_eq!(w.runtime.as_ref().unwrap().last().hold_seconds, 0);
    w.a_moment().await;
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
}

#[tokio::test]
async fn root_a_disruption_budget_is_heeded_for_a_while_and_the_container_ended_at_once() {
    if !root() {
        return;
    }
    let w = world("OnFailure", "evict_seconds = 3\n", true).await;
    w.api.allocatable(GPU, 6);
    w.api.evicts(Evicts::Blocked);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("the container to be ended", || {
            w.asked() == ["announce a", "kill a"]
        })
        .await;
    assert!(w.api.taken().is_empty());
    let took = w
        .node
        .wait("the pod to be deleted", || !w.api.taken().is_empty())
        .await;
    assert!(took > Duration::from_secs(2), "{took:?}");
    assert_eq!(w.api.taken(), [format!("delete train-0 {}", UIDS[0])]);
    w.node
        .wait("the Event", || w.has_event("train-0", "GpuFaultDeleted"))
        .await;
    assert_eq!(w.node.log().matches("the pod is not evicted").count(), 1);
    // One that is let go in time is evicted.
    w.node.driver.raise("4 79").unwrap();
    w.node
        .wait("the other to be ended", || w.asked().len() == 4)
        .await;
    w.api.evicts(Evicts::Always);
    w.node
        .wait("the other pod to be evicted", || w.api.taken().len() == 2)
        .await;
    assert_eq!(w.api.taken()[1], format!("evict train-1 {}", UIDS[1]));
}

#[tokio::test]
async fn root_without_slipwayd_pods_are_evicted_and_without_an_api_server_containers_ended() {
    if !root() {
        return;
    }
    // Never, too: nothing else ends its container.
    let w = world("Never", "", false).await;
    w.api.allocatable(GPU, 6);
    w.node.driver.raise("3 79").unwrap();
    w.node.driver.raise("4 79").unwrap();
    w.node
        .wait("both to be evicted", || w.api.taken().len() == 2)
        .await;
    assert_eq!(
        w.node.log().matches("containers cannot be failed here").count(),
        1
    );

    let w = world("OnFailure", "wait_seconds = 1\n", true).await;
    w.api.refuse(Some(503));
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("the container to be ended", || {
            w.asked() == ["announce a", "kill a"]
        })
        .await;
    assert!(w.api.taken().is_empty());
    // It answers again while the GPU is sick: the pod would be started on it for ever.
    w.api.refuse(None);
    w.node
        .wait("the pod to be evicted", || w.api.taken().len() == 1)
        .await;
}

#[tokio::test]
async fn root_an_agent_that_is_started_in_the_middle_goes_on_and_hits_nobody_who_came_later() {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "wait_seconds = 600\n", true).await;
    w.node.driver.raise("3 79").unwrap();
    w.node.driver.raise("4 79").unwrap();
    w.node.wait("both to be announced", || w.asked().len() == 2).await;
    w.a_moment().await;
    w.node.kill();
    // Meanwhile: the container of one was started again, and the other pod was replaced by one of the same name.
    w.who.set(vec![
        Pod {
            container: IDS[2],
            ..pod(0, &[&w.topology.gpus[3].uuid])
        },
        Pod {
            uid: UIDS[2],
            ..pod(1, &[])
        },
    ]);
    w.api.pod(NAMES[0], UIDS[0], "Never", IDS[2]);
    w.api.pod(NAMES[1], UIDS[2], "OnFailure", IDS[2]);
    w.api.allocatable(GPU, 6);
    w.node.start();
    w.node
        .wait("the one to be ended", || w.asked().iter().any(|a| a == "kill a"))
        .await;
    w.a_moment().await;
    assert!(
        !w.asked().iter().any(|a| a.ends_with('c') || a == "kill b"),
        "{:?}",
        w.asked()
    );
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());

    // A GPU that is well before anything was said to anyone concerns nobody.
    let w = world("OnFailure", "wait_seconds = 600\n", false).await;
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("it to be sick", || w.kubelet.ids(GPU, false).len() == 1)
        .await;
    w.node
        .wait("word of slipwayd", || {
            w.node.log().contains("containers cannot be failed here")
        })
        .await;
    w.node.driver.raise("3 reset").unwrap();
    w.node
        .wait("it to be well", || w.kubelet.ids(GPU, true).len() == 8)
        .await;
    w.api.allocatable(GPU, 7);
    w.a_moment().await;
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
}

#[tokio::test]
async fn root_all_who_have_a_slice_of_a_sick_gpu_are_ended() {
    if !root() {
        return;
    }
    let topology = Topology::named("a100x4-mig").unwrap();
    let mut node = Node::of(&topology, "");
    let socket = node.dir.path().join("fault.sock");
    let config = std::fs::read_to_string(node.config()).unwrap();
    let more = format!(
        "{config}[resources]\nmig_strategy = \"mixed\"\n[faults]\nwait_seconds = 1\nsocket = {:?}\n",
        socket.display().to_string()
    );
    std::fs::write(node.config(), more).unwrap();
    let runtime = Runtime::serve(&socket);
    let kubelet = Kubelet::start(&node.kubelet());
    let who = Who::serve(&node.pod_resources(), &node.pods(), true);
    node.start();
    node.wait("four resources", || kubelet.resources().len() == 4)
        .await;
    let slice = |gpu: usize, n: usize| topology.gpus[gpu].mig.as_ref().unwrap().devices[n].uuid.clone();
    who.set(vec![
        pod(0, &[&slice(0, 0)]),
        pod(1, &[&slice(0, 1)]),
        pod(2, &[&slice(1, 0)]),
    ]);
    // An error of an instance, of an application's: nobody's end.
    node.driver.raise("0 31 3 0").unwrap();
    node.wait("word of it", || node.log().contains("xid=31")).await;
    node.driver.raise("0 79").unwrap();
    node.wait("both to be ended", || {
        let asked = runtime.asked();
        asked.iter().filter(|a| a.starts_with("kill")).count() == 2
    })
    .await;
    let mut asked = runtime.asked();
    asked.sort();
    assert_eq!(asked, ["announce a", "announce b", "kill a", "kill b"]);
}

#[tokio::test]
async fn root_nothing_is_done_and_nothing_refused_where_that_is_not_wanted() {
    if !root() {
        return;
    }
    for (refuse, said) in [(true, Some("refuse_start")), (false, None)] {
        let faults = format!("action = \"none\"\nrefuse_start = {refuse}\n");
        let w = world("OnFailure", &faults, true).await;
        w.api.allocatable(GPU, 7);
        w.node.driver.raise("3 79").unwrap();
        w.node
            .wait("one unhealthy", || w.kubelet.ids(GPU, false).len() == 1)
            .await;
        let request = PreStartContainerRequest {
            devices_ids: vec![w.topology.gpus[3].uuid.clone()],
        };
        let answer = w.kubelet.plugin(GPU).await.pre_start_container(request).await;
        match said {
            Some(said) => {
                let error = answer.unwrap_err();
                assert_eq!(error.code(), tonic::Code::FailedPrecondition);
                assert!(
                    error.message().contains(said) && error.message().contains("XID 79"),
                    "{error}"
                );
            }
            None => drop(answer.unwrap()),
        }
        w.a_moment().await;
        assert!(w.asked().is_empty() && w.api.taken().is_empty());
    }
}

#[tokio::test]
async fn root_a_gpu_that_does_not_answer_is_lost_after_a_while_and_one_that_is_to_be_drained_is_left_its_work()
 {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "lost_seconds = 3\nwait_seconds = 1\n", true).await;
    // Drained: whoever has it may end by itself.
    w.topology.gpus[4].recovery_action = Some(4);
    w.node.driver.set_topology(&w.topology).unwrap();
    w.node.driver.raise("4 63").unwrap();
    w.node
        .wait("one unhealthy", || w.kubelet.ids(GPU, false).len() == 1)
        .await;
    // None answers: that is the driver.
    w.node.driver.override_with(&["* 999"]).unwrap();
    w.node
        .wait("none healthy", || w.kubelet.ids(GPU, false).len() == 8)
        .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    w.node.driver.override_with(&[]).unwrap();
    w.node
        .wait("the others to be well", || w.kubelet.ids(GPU, false).len() == 1)
        .await;
    assert!(
        w.asked().is_empty() && w.api.taken().is_empty(),
        "{:?}",
        w.asked()
    );
    // One does not.
    w.api.allocatable(GPU, 6);
    w.node
        .driver
        .override_with(&["nvmlDeviceGetMemoryInfo_v2 15 3"])
        .unwrap();
    w.node
        .wait("two unhealthy", || w.kubelet.ids(GPU, false).len() == 2)
        .await;
    let took = w
        .node
        .wait("the container to be ended", || w.asked().len() == 2)
        .await;
    assert!(took > Duration::from_secs(2), "{took:?}");
    assert_eq!(w.asked(), ["announce a", "kill a"]);
    let request = w.runtime.as_ref().unwrap().last();
    assert_eq!(request.reason, "GpuLost");
    assert!(request.message.contains("does not answer"), "{}", request.message);
    assert_eq!(w.api.taken(), [format!("evict train-0 {}", UIDS[0])]);
}
