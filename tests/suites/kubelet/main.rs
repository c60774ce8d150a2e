//! A real kubelet, API server, scheduler and controllers on slipwayd: what a cluster asks of its runtime.
//!
//! One cluster for all tests, so the runner is our own: it takes the test runner's usual arguments (a filter, -q,
//! --test-threads=N), brings the cluster up, runs the tests side by side, each in a namespace of its own, then those that
//! want a node to themselves, one after the other on each node, reads kubelet's log, and takes the cluster down.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::cluster::{Cluster, Net, Options};

mod compare;
mod daemonset;
mod devices;
mod events;
mod eviction;
mod faults;
mod features;
mod follow;
mod gpu;
mod gpu_jobs;
mod gpu_restarts;
mod gpu_shares;
mod kube;
mod lifecycle;
mod manifests;
mod network;
mod node_setup;
mod power;
mod restarts;
mod secrets;
mod streaming;
mod training;
mod volumes;
mod workloads;

use kube::Kube;

/// The node that most tests' pods are on.
pub const OURS: usize = 1;
/// A node with a network namespace of its own, which can be treated worse.
pub const SECOND: usize = 2;
/// The node with containerd, which gets only what names it.
pub const PEER: usize = 3;
/// No node's number: for who wants both of ours to itself.
pub const BOTH: usize = 0;

type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// A test: its name, and what it does in its own namespace.
pub struct Test {
    name: &'static str,
    run: fn(Kube) -> Running,
    /// The node that it wants to itself.
    alone: Option<usize>,
}

/// Names a test after its function.
#[macro_export]
macro_rules! tests {
    ($alone:expr; $($module:ident::$name:ident),+ $(,)?) => {
        vec![$($crate::Test { name: stringify!($name), run: |k| Box::pin($module::$name(k)), alone: $alone }),+]
    };
}

fn all() -> Vec<Test> {
    // The longest first.
    let mut list = tests![None;
        training::an_image_is_built_in_the_cluster_and_trains_on_two_nodes,
        daemonset::the_agents_daemon_set_hands_out_gpus_with_its_own_rights_alone,
        features::a_cron_job_runs_when_its_time_has_come,
        lifecycle::kubelet_rotates_logs_and_no_line_is_lost,
        workloads::containers_start_in_order_and_end_as_the_restart_policy_says,
        workloads::a_job_completes_and_its_logs_are_kept,
        workloads::limits_are_set_and_a_container_over_its_memory_is_oomkilled,
        workloads::a_container_that_fails_again_and_again_is_started_ever_later,
        workloads::pods_lie_in_the_cgroups_of_their_class,
        workloads::users_groups_capabilities_and_read_only_roots_are_as_asked,
        workloads::an_image_that_cannot_be_pulled_says_why,
        lifecycle::probes_and_hooks_are_run,
        lifecycle::a_pod_ends_gracefully_and_is_killed_after_its_grace_period,
        lifecycle::a_static_pod_runs,
        manifests::the_api_server_takes_every_overlay_and_example,
        manifests::an_agents_account_is_of_its_own_node,
        node_setup::the_set_up_daemon_set_installs_upgrades_and_leaves_a_wrong_node_alone,
        eviction::a_pod_that_uses_more_of_the_disk_than_its_limit_is_evicted,
        compare::statistics_and_metrics_are_those_that_containerd_gives,
        secrets::a_private_image_is_pulled_with_the_secrets_of_its_pod_alone,
        lifecycle::grpc_probes_are_asked,
        features::a_container_and_its_pod_are_resized_in_place,
        features::volumes_of_images_read_only_mounts_and_users_are_as_asked,
        features::handlers_are_told_with_what_they_can_and_a_runtime_class_names_one,
        volumes::config_maps_secrets_projections_and_the_downward_api_are_mounted,
        volumes::host_paths_and_empty_directories_are_mounted,
        volumes::an_empty_directory_takes_no_more_than_its_limit,
        network::host_namespaces_and_a_shared_pid_namespace,
        network::host_ports_aliases_and_dns_policies,
        streaming::exec_with_terminal_input_and_exit_codes,
        streaming::attach_reads_and_writes,
        streaming::attach_and_debug_have_a_terminal,
        streaming::port_forward_reaches_a_server_in_the_pod,
        streaming::debug_adds_a_container_that_sees_its_target,
        streaming::logs_are_followed_live,
    ];
    list.extend(tests![Some(OURS);
        restarts::a_running_container_never_notices_restarts_of_kubelet_and_slipwayd,
        restarts::the_node_is_ready_soon_after_slipwayd_is_up,
        gpu::pods_get_gpus_of_their_own_and_a_sick_one_is_not_given_again,
        gpu_jobs::a_job_sees_its_own_gpu_alone_and_finds_the_driver_on_any_root,
        gpu_restarts::no_restart_costs_a_gpu_pod_anything_or_hands_a_gpu_out_twice,
        gpu_shares::slices_of_a_gpu_are_pods_own_and_follow_the_geometry,
        gpu_shares::slices_of_one_profile_are_handed_out_as_gpus,
        gpu_shares::four_pods_share_a_gpu_and_none_is_given_two_shares,
        faults::a_training_goes_on_on_another_gpu_when_its_own_falls_sick,
        faults::a_training_without_a_spare_gpu_waits_until_its_own_is_well,
        faults::a_sick_gpu_ends_all_who_have_a_slice_of_it,
        eviction::unused_images_are_collected_when_the_disk_is_full,
    ]);
    list.extend(tests![Some(SECOND);
        events::pods_go_on_as_they_should_where_kubelet_hears_of_ends_by_events,
        streaming::a_file_goes_through_cp_and_port_forward_whole_with_memory_bounded,
        power::a_node_that_lost_its_power_brings_every_pod_back,
        features::huge_pages_are_counted_limited_and_mounted,
        eviction::memory_pressure_evicts_the_pod_that_holds_most_beyond_its_request,
        eviction::disk_pressure_evicts_the_pod_that_has_written_most_into_its_root,
    ]);
    list.extend(tests![Some(BOTH);
        gpu_jobs::a_training_has_one_gpu_on_each_of_two_nodes,
        // It compares them.
        events::kubelet_hears_of_ends_by_the_events_of_the_runtime,
    ]);
    list
}

struct Args {
    filter: Vec<String>,
    threads: usize,
    list: bool,
}

fn args() -> Args {
    let mut a = Args {
        filter: Vec::new(),
        threads: 3,
        list: false,
    };
    let mut it = std::env::args().skip(1);
    while let Some(arg) = it.next() {
        if let Some(n) = arg.strip_prefix("--test-threads=") {
            a.threads = n.parse().unwrap_or(3);
        } else if arg == "--test-threads" {
            a.threads = it.next().and_then(|n| n.parse().ok()).unwrap_or(3);
        } else if arg == "--list" {
            a.list = true;
        } else if !arg.starts_with('-') {
            a.filter.push(arg);
        }
    }
    a
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = args();
    let mut tests = all();
    tests.retain(|t| args.filter.is_empty() || args.filter.iter().any(|f| t.name.contains(f.as_str())));
    if args.list {
        tests.iter().for_each(|t| println!("{}: test", t.name));
        return Ok(());
    }
    if tests.is_empty() {
        return Ok(());
    }
    let cluster = Arc::new(bring_up().await?);
    let outcome = run_all(&cluster, tests, args.threads).await;
    let complaints = kube::complaints(&cluster);
    if everywhere_containerd() {
        let all = cluster.nodes().flat_map(|n| kube::errors(&cluster, n));
        println!("{}", all.collect::<Vec<_>>().join("\n"));
    }
    if std::env::var_os("KEEP").is_some() {
        bail!("kept in {}: {outcome:?}", cluster.dir().display());
    }
    let down = cluster.down().await;
    let mut wrong = outcome?;
    if let Err(e) = down {
        wrong.push(format!("taking the cluster down: {e:#}"));
    }
    if !complaints.is_empty() {
        wrong.push(format!(
            "kubelet complains about the runtime:\n{}",
            complaints.join("\n")
        ));
    }
    if !wrong.is_empty() {
        bail!("{} failed:\n\n{}", wrong.len(), wrong.join("\n\n"));
    }
    Ok(())
}

/// Whether kubelet is only to show what it says of containerd in these tests (those of our own names and builds fail there):
/// what it complains about there, it may complain about here.
fn everywhere_containerd() -> bool {
    std::env::var_os("SLIPWAY_KUBELET_ON").is_some_and(|v| v == "containerd")
}

async fn bring_up() -> Result<Cluster> {
    let pid = std::process::id();
    let dir =
        std::env::var_os("SLIPWAY_TEST_DIR").map_or_else(|| "/var/tmp".into(), std::path::PathBuf::from);
    let number = u8::try_from(pid % 40).context("below 40")?;
    let (cluster, took) = Cluster::up(Options {
        dir: dir.join(format!("slipway-kubelet-{pid}")),
        net: Net {
            name: format!("sk{:x}", pid & 0xf_ffff),
            base: (
                200 + number,
                u8::try_from(pid / 40 % 64 * 4).context("below 256")?,
            ),
            count: PEER,
        },
        program: env!("CARGO_BIN_EXE_cluster").into(),
        slipwayd: features::HANDLERS.into(),
        gates: vec![(SECOND, "EventedPLEG: true".into())],
        containerd: if everywhere_containerd() {
            (1..=PEER).collect()
        } else {
            vec![PEER]
        },
        kubelet: "containerLogMaxSize: 64Ki\ncontainerLogMaxFiles: 3\ncontainerLogMonitorInterval: 3s\nevictionPressureTransitionPeriod: 1s\nvolumeStatsAggPeriod: 5s\n"
            .into(),
    })
    .await?;
    println!(
        "API server ready after {:?}, its nodes Ready after {:?}",
        took.api, took.ready
    );
    for n in cluster.nodes() {
        cluster.build_stage(n, "busybox", kube::IMAGE)?;
    }
    Ok(cluster)
}

async fn run_all(cluster: &Arc<Cluster>, tests: Vec<Test>, threads: usize) -> Result<Vec<String>> {
    let (alone, together): (Vec<Test>, Vec<Test>) = tests.into_iter().partition(|t| t.alone.is_some());
    let mut wrong = Vec::new();
    let mut running = tokio::task::JoinSet::new();
    let mut waiting = together.into_iter();
    loop {
        while running.len() < threads
            && let Some(t) = waiting.next()
        {
            running.spawn(one(cluster.clone(), t));
        }
        match running.join_next().await {
            Some(r) => wrong.extend(r?),
            None => break,
        }
    }
    let mut on_nodes: BTreeMap<Option<usize>, Vec<Test>> = BTreeMap::new();
    for t in alone {
        on_nodes.entry(t.alone).or_default().push(t);
    }
    let on_both = on_nodes.remove(&Some(BOTH)).unwrap_or_default();
    let mut running = tokio::task::JoinSet::new();
    for tests in on_nodes.into_values() {
        running.spawn(one_by_one(cluster.clone(), tests));
    }
    while let Some(r) = running.join_next().await {
        wrong.extend(r?);
    }
    wrong.extend(one_by_one(cluster.clone(), on_both).await);
    Ok(wrong)
}

async fn one_by_one(cluster: Arc<Cluster>, tests: Vec<Test>) -> Vec<String> {
    let mut wrong = Vec::new();
    for t in tests {
        wrong.extend(one(cluster.clone(), t).await);
    }
    wrong
}

/// Runs one test; what went wrong.
async fn one(cluster: Arc<Cluster>, test: Test) -> Option<String> {
    let began = Instant::now();
    let space = test.name.split('_').take(4).collect::<Vec<_>>().join("-");
    let kube = match Kube::new(cluster, &space) {
        Ok(k) => k,
        Err(e) => return Some(format!("{}: {e:#}", test.name)),
    };
    let large = std::env::var_os("SLIPWAY_CP_MIB").is_some();
    let limit = Duration::from_secs(if large { 1800 } else { 300 });
    let run = tokio::spawn(tokio::time::timeout(limit, (test.run)(kube.clone())));
    let verdict = match run.await {
        Ok(Ok(r)) => r,
        Ok(Err(_)) => Err(anyhow::anyhow!("not done within {limit:?}")),
        Err(e) => Err(anyhow::anyhow!("{e}")),
    };
    let took = began.elapsed().as_secs_f64();
    match verdict {
        Ok(()) => {
            println!("test {} ... ok ({took:.1} s)", test.name);
            kube.delete();
            None
        }
        Err(e) => {
            println!("test {} ... FAILED ({took:.1} s)", test.name);
            let picture = kube.picture();
            if std::env::var_os("KEEP").is_none() {
                // What it holds is for others.
                kube.delete();
            }
            Some(format!("{}: {e:#}\n{picture}", test.name))
        }
    }
}
