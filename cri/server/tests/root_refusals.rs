//! Requests that cannot be taken at their word: every one of the CRI's, over the real socket. Each is answered with
//! InvalidArgument that names the field, and leaves nothing behind.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod refusals;
mod world;

use std::collections::BTreeSet;

use refusals::{
    bad_auths, bad_containers, bad_images, bad_limits, bad_pods, bad_sandbox_configs, bad_values, huge,
};
use slipway_cri_api::v1;
use world::{World, cannot_run};

const SLEEP: &[&str] = &["sleep", "1000"];

/// In these requests nothing can be wrong.
const NOTHING_TO_REFUSE: [&str; 8] = [
    "version",
    "status",
    "runtime_config",
    "get_container_events",
    "list_metric_descriptors",
    "list_pod_sandbox_metrics",
    "stream_pod_sandbox_metrics",
    "image_fs_info",
];
/// These are refused whatever they say.
const UNIMPLEMENTED: [&str; 3] = ["checkpoint_container", "checkpoint_pod", "restore_pod"];

fn bad_ids() -> [String; 4] {
    [String::new(), "a\nb".into(), "../../etc".into(), huge()]
}

/// What was answered to what.
struct Refused {
    rpc: &'static str,
    field: &'static str,
    answer: Option<tonic::Status>,
}

/// Calls and keeps what came of it.
macro_rules! ask {
    ($list:ident: $client:expr, $rpc:ident, $field:expr => $request:expr) => {
        $list.push(Refused {
            rpc: stringify!($rpc),
            field: $field,
            answer: $client.clone().$rpc($request).await.err(),
        })
    };
}

#[tokio::test]
async fn every_bad_request_is_refused_by_its_field_and_leaves_nothing() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("good", true)).await.unwrap();
    let container = w.create(&pod, w.container_config("good", SLEEP)).await.unwrap();
    w.start(&container).await.unwrap();
    let before = w.leftovers();
    let mut asked = Vec::new();
    creations(&w, &pod, &mut asked).await;
    changes(&w, &pod, &container, &mut asked).await;
    commands(&w, &pod, &container, &mut asked).await;
    lists(&w, &mut asked).await;
    images(&w, &mut asked).await;
    let mut wrong = Vec::new();
    for Refused { rpc, field, answer } in &asked {
        match answer {
            None => wrong.push(format!("{rpc} took a bad {field}")),
            Some(status)
                if status.code() != tonic::Code::InvalidArgument
                    || !status.message().contains(field)
                    || status.message().len() > 1000 =>
            {
                wrong.push(format!("{rpc} {field}: {:.300}", format!("{status:?}")));
            }
            Some(_) => {}
        }
    }
    assert!(
        wrong.is_empty(),
        "{}",
        wrong.join(
            "
"
        )
    );
    let covered: BTreeSet<String> = asked.iter().map(|r| r.rpc.to_owned()).collect();
    let others = NOTHING_TO_REFUSE
        .iter()
        .chain(&UNIMPLEMENTED)
        .map(|s| (*s).to_owned());
    let covered: BTreeSet<String> = covered.into_iter().chain(others).collect();
    assert_eq!(covered, rpcs(), "each RPC of the CRI has its cases");
    assert_eq!((w.pods().await.len(), w.containers().await.len()), (1, 1));
    assert_eq!(w.leftovers(), before);
    w.finish().await;
}

/// Every RPC that the CRI has, as the client spells it.
fn rpcs() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let protos = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/proto");
    for file in std::fs::read_dir(protos).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for rest in text.lines().filter_map(|line| line.trim().strip_prefix("rpc ")) {
            let name = rest.split('(').next().unwrap();
            let mut snake = String::new();
            for c in name.trim().chars() {
                if c.is_uppercase() && !snake.is_empty() {
                    snake.push('_');
                }
                snake.extend(c.to_lowercase());
            }
            found.insert(snake);
        }
    }
    assert_eq!(found.len(), 43);
    found
}

async fn creations(w: &World, pod: &str, asked: &mut Vec<Refused>) {
    for (field, change) in bad_pods() {
        let mut config = w.pod_config("bad", true);
        change(&mut config);
        let config = Some(config);
        ask!(asked: w.runtime, run_pod_sandbox, field => v1::RunPodSandboxRequest { config, ..Default::default() });
    }
    ask!(asked: w.runtime, run_pod_sandbox, "config" => v1::RunPodSandboxRequest::default());
    for runtime_handler in ["no-such", "a\nb", &huge()] {
        let config = Some(w.pod_config("bad", true));
        let runtime_handler = runtime_handler.to_owned();
        ask!(asked: w.runtime, run_pod_sandbox, "runtime_handler" => v1::RunPodSandboxRequest { config, runtime_handler });
    }
    let request = |pod: &str, config: Option<v1::ContainerConfig>| v1::CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config,
        sandbox_config: Some(w.pod_config("good", true)),
    };
    for (field, change) in bad_containers() {
        let mut config = w.container_config("bad", SLEEP);
        change(&mut config);
        ask!(asked: w.runtime, create_container, field => request(pod, Some(config)));
    }
    ask!(asked: w.runtime, create_container, "config" => request(pod, None));
    for (field, change) in bad_sandbox_configs() {
        let mut sandbox_config = w.pod_config("good", true);
        change(&mut sandbox_config);
        let bad = v1::CreateContainerRequest {
            sandbox_config: Some(sandbox_config),
            ..request(pod, Some(w.container_config("bad", SLEEP)))
        };
        ask!(asked: w.runtime, create_container, field => bad);
    }
    for id in bad_ids() {
        let config = Some(w.container_config("bad", SLEEP));
        ask!(asked: w.runtime, create_container, "pod_sandbox_id" => request(&id, config));
    }
}

async fn changes(w: &World, pod: &str, container: &str, asked: &mut Vec<Refused>) {
    const POD: &str = "pod_sandbox_id";
    const CONTAINER: &str = "container_id";
    for id in bad_ids() {
        let pod_sandbox_id = || id.clone();
        ask!(asked: w.runtime, stop_pod_sandbox, POD => v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id() });
        ask!(asked: w.runtime, remove_pod_sandbox, POD => v1::RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id() });
        ask!(asked: w.runtime, pod_sandbox_status, POD => v1::PodSandboxStatusRequest { pod_sandbox_id: pod_sandbox_id(), verbose: true });
        ask!(asked: w.runtime, pod_sandbox_stats, POD => v1::PodSandboxStatsRequest { pod_sandbox_id: pod_sandbox_id() });
        ask!(asked: w.runtime, port_forward, POD => v1::PortForwardRequest { pod_sandbox_id: pod_sandbox_id(), port: vec![80] });
        ask!(asked: w.runtime, update_pod_sandbox_resources, POD => v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod_sandbox_id(), ..Default::default() });
        let container_id = || id.clone();
        let cmd = || vec!["true".to_owned()];
        ask!(asked: w.runtime, start_container, CONTAINER => v1::StartContainerRequest { container_id: container_id() });
        ask!(asked: w.runtime, stop_container, CONTAINER => v1::StopContainerRequest { container_id: container_id(), timeout: 1 });
        ask!(asked: w.runtime, remove_container, CONTAINER => v1::RemoveContainerRequest { container_id: container_id() });
        ask!(asked: w.runtime, container_status, CONTAINER => v1::ContainerStatusRequest { container_id: container_id(), verbose: false });
        ask!(asked: w.runtime, container_stats, CONTAINER => v1::ContainerStatsRequest { container_id: container_id() });
        ask!(asked: w.runtime, reopen_container_log, CONTAINER => v1::ReopenContainerLogRequest { container_id: container_id() });
        ask!(asked: w.runtime, update_container_resources, CONTAINER => v1::UpdateContainerResourcesRequest { container_id: container_id(), linux: Some(Default::default()), ..Default::default() });
        ask!(asked: w.runtime, exec_sync, CONTAINER => v1::ExecSyncRequest { container_id: container_id(), cmd: cmd(), timeout: 1 });
        ask!(asked: w.runtime, exec, CONTAINER => v1::ExecRequest { container_id: container_id(), cmd: cmd(), stdout: true, ..Default::default() });
        ask!(asked: w.runtime, attach, CONTAINER => v1::AttachRequest { container_id: container_id(), stdout: true, ..Default::default() });
    }
    for timeout in [-1, i64::MIN] {
        let container_id = container.to_owned();
        ask!(asked: w.runtime, stop_container, "timeout" => v1::StopContainerRequest { container_id, timeout });
    }
    let update = |linux, annotations| v1::UpdateContainerResourcesRequest {
        container_id: container.to_owned(),
        linux,
        annotations,
        ..Default::default()
    };
    ask!(asked: w.runtime, update_container_resources, "linux" => update(None, Default::default()));
    let large = [("a".to_owned(), huge())].into();
    ask!(asked: w.runtime, update_container_resources, "annotations" => update(Some(Default::default()), large));
    for (field, change) in bad_limits().into_iter().chain(bad_values()) {
        let mut limits = v1::LinuxContainerResources::default();
        change(&mut limits);
        ask!(asked: w.runtime, update_container_resources, field => update(Some(limits), Default::default()));
    }
    for (field, change) in bad_limits() {
        let mut limits = v1::LinuxContainerResources::default();
        change(&mut limits);
        let limits = || Some(limits.clone());
        for (overhead, resources) in [(limits(), None), (None, limits())] {
            let pod_sandbox_id = pod.to_owned();
            ask!(asked: w.runtime, update_pod_sandbox_resources, field => v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id, overhead, resources });
        }
    }
    for cidr in ["10.0.0.0/99", "10.0.0.0/24\n10.1.0.0/24", &huge()] {
        let network_config = Some(v1::NetworkConfig {
            pod_cidr: cidr.to_owned(),
        });
        let runtime_config = Some(v1::RuntimeConfig { network_config });
        ask!(asked: w.runtime, update_runtime_config, "pod_cidr" => v1::UpdateRuntimeConfigRequest { runtime_config });
    }
}

async fn commands(w: &World, pod: &str, container: &str, asked: &mut Vec<Refused>) {
    let id = || container.to_owned();
    for cmd in [
        vec![],
        vec![String::new()],
        vec!["a\0b".to_owned()],
        vec!["true".to_owned(), huge()],
    ] {
        ask!(asked: w.runtime, exec_sync, "cmd" => v1::ExecSyncRequest { container_id: id(), cmd: cmd.clone(), timeout: 1 });
        ask!(asked: w.runtime, exec, "cmd" => v1::ExecRequest { container_id: id(), cmd, stdout: true, ..Default::default() });
    }
    let cmd = || vec!["true".to_owned()];
    ask!(asked: w.runtime, exec_sync, "timeout" => v1::ExecSyncRequest { container_id: id(), cmd: cmd(), timeout: -1 });
    ask!(asked: w.runtime, exec, "stdin" => v1::ExecRequest { container_id: id(), cmd: cmd(), ..Default::default() });
    ask!(asked: w.runtime, exec, "tty" => v1::ExecRequest { container_id: id(), cmd: cmd(), tty: true, stdout: true, stderr: true, ..Default::default() });
    ask!(asked: w.runtime, attach, "stdin" => v1::AttachRequest { container_id: id(), ..Default::default() });
    ask!(asked: w.runtime, attach, "tty" => v1::AttachRequest { container_id: id(), tty: true, stdout: true, stderr: true, ..Default::default() });
    for port in [-1, 0, 65_536, i32::MIN] {
        let (pod_sandbox_id, port) = (pod.to_owned(), vec![80, port]);
        ask!(asked: w.runtime, port_forward, "port" => v1::PortForwardRequest { pod_sandbox_id, port });
    }
}

async fn lists(w: &World, asked: &mut Vec<Refused>) {
    const STATE: &str = "filter.state";
    const LABELS: &str = "filter.label_selector";
    let labels = || [("a".to_owned(), huge())].into();
    let pods = [
        (
            STATE,
            v1::PodSandboxFilter {
                state: Some(v1::PodSandboxStateValue { state: 9 }),
                ..Default::default()
            },
        ),
        (
            "filter.id",
            v1::PodSandboxFilter {
                id: "a\nb".into(),
                ..Default::default()
            },
        ),
        (
            LABELS,
            v1::PodSandboxFilter {
                label_selector: labels(),
                ..Default::default()
            },
        ),
    ];
    for (field, filter) in pods {
        let filter = || Some(filter.clone());
        ask!(asked: w.runtime, list_pod_sandbox, field => v1::ListPodSandboxRequest { filter: filter() });
        ask!(asked: w.runtime, stream_pod_sandboxes, field => v1::StreamPodSandboxesRequest { filter: filter() });
    }
    let containers = [
        (
            STATE,
            v1::ContainerFilter {
                state: Some(v1::ContainerStateValue { state: -1 }),
                ..Default::default()
            },
        ),
        (
            "filter.id",
            v1::ContainerFilter {
                id: huge(),
                ..Default::default()
            },
        ),
        (
            "filter.pod_sandbox_id",
            v1::ContainerFilter {
                pod_sandbox_id: "../x".into(),
                ..Default::default()
            },
        ),
        (
            LABELS,
            v1::ContainerFilter {
                label_selector: labels(),
                ..Default::default()
            },
        ),
    ];
    for (field, filter) in containers {
        let filter = || Some(filter.clone());
        ask!(asked: w.runtime, list_containers, field => v1::ListContainersRequest { filter: filter() });
        ask!(asked: w.runtime, stream_containers, field => v1::StreamContainersRequest { filter: filter() });
    }
    let container_stats = [
        (
            "filter.id",
            v1::ContainerStatsFilter {
                id: "a\nb".into(),
                ..Default::default()
            },
        ),
        (
            "filter.pod_sandbox_id",
            v1::ContainerStatsFilter {
                pod_sandbox_id: huge(),
                ..Default::default()
            },
        ),
        (
            LABELS,
            v1::ContainerStatsFilter {
                label_selector: labels(),
                ..Default::default()
            },
        ),
    ];
    for (field, filter) in container_stats {
        let filter = || Some(filter.clone());
        ask!(asked: w.runtime, list_container_stats, field => v1::ListContainerStatsRequest { filter: filter() });
        ask!(asked: w.runtime, stream_container_stats, field => v1::StreamContainerStatsRequest { filter: filter() });
    }
    let pod_stats = [
        (
            "filter.id",
            v1::PodSandboxStatsFilter {
                id: "a\nb".into(),
                ..Default::default()
            },
        ),
        (
            LABELS,
            v1::PodSandboxStatsFilter {
                label_selector: labels(),
                ..Default::default()
            },
        ),
    ];
    for (field, filter) in pod_stats {
        let filter = || Some(filter.clone());
        ask!(asked: w.runtime, list_pod_sandbox_stats, field => v1::ListPodSandboxStatsRequest { filter: filter() });
        ask!(asked: w.runtime, stream_pod_sandbox_stats, field => v1::StreamPodSandboxStatsRequest { filter: filter() });
    }
}

async fn images(w: &World, asked: &mut Vec<Refused>) {
    let spec = |image: String| {
        Some(v1::ImageSpec {
            image,
            ..Default::default()
        })
    };
    let wrong = ["a\nb", "../../etc/passwd", "busy box", &huge()].map(str::to_owned);
    for name in wrong {
        let image = || spec(name.clone());
        ask!(asked: w.image, image_status, "image" => v1::ImageStatusRequest { image: image(), verbose: true });
        ask!(asked: w.image, remove_image, "image" => v1::RemoveImageRequest { image: image() });
        ask!(asked: w.image, pull_image, "image" => v1::PullImageRequest { image: image(), ..Default::default() });
        let filter = || Some(v1::ImageFilter { image: image() });
        ask!(asked: w.image, list_images, "filter.image" => v1::ListImagesRequest { filter: filter() });
        ask!(asked: w.image, stream_images, "filter.image" => v1::StreamImagesRequest { filter: filter() });
    }
    ask!(asked: w.image, image_status, "image" => v1::ImageStatusRequest::default());
    ask!(asked: w.image, remove_image, "image" => v1::RemoveImageRequest::default());
    ask!(asked: w.image, pull_image, "image" => v1::PullImageRequest::default());
    for (field, change) in bad_images() {
        let mut image = v1::ImageSpec {
            image: "127.0.0.1:9/x:1".into(),
            ..Default::default()
        };
        change(&mut image);
        let image = || Some(image.clone());
        ask!(asked: w.image, image_status, field => v1::ImageStatusRequest { image: image(), verbose: true });
        ask!(asked: w.image, remove_image, field => v1::RemoveImageRequest { image: image() });
        ask!(asked: w.image, pull_image, field => v1::PullImageRequest { image: image(), ..Default::default() });
        let unnamed = || {
            image().map(|i| v1::ImageSpec {
                image: String::new(),
                ..i
            })
        };
        for image in [image(), unnamed()] {
            let filter = || Some(v1::ImageFilter { image: image.clone() });
            ask!(asked: w.image, list_images, field => v1::ListImagesRequest { filter: filter() });
            ask!(asked: w.image, stream_images, field => v1::StreamImagesRequest { filter: filter() });
        }
    }
    for (field, change) in bad_sandbox_configs() {
        let mut sandbox_config = w.pod_config("good", true);
        change(&mut sandbox_config);
        let request = v1::PullImageRequest {
            image: spec("127.0.0.1:9/x:1".into()),
            sandbox_config: Some(sandbox_config),
            ..Default::default()
        };
        ask!(asked: w.image, pull_image, field => request);
    }
    for (field, change) in bad_auths() {
        let mut auth = v1::AuthConfig::default();
        change(&mut auth);
        let request = v1::PullImageRequest {
            image: spec("127.0.0.1:9/x:1".into()),
            auth: Some(auth),
            ..Default::default()
        };
        ask!(asked: w.image, pull_image, field => request);
    }
}
