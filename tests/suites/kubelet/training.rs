//! The job that must work: an image built by a Job in the cluster, pushed to a registry in the cluster, pulled on the other
//! node, and a training of two workers on two nodes that survives the death of one of them. From manifests/examples.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::kube::Kube;

pub async fn an_image_is_built_in_the_cluster_and_trains_on_two_nodes(k: Kube) -> Result<()> {
    k.cluster.prepare_examples()?;
    k.example("registry.yaml", &[])?;
    k.ready("registry").await?;
    let source = harness::lab::repo()
        .join("tests/fixtures/train-digits")
        .display()
        .to_string();
    k.ok(&[
        "create",
        "configmap",
        "digits-source",
        &format!("--from-file={source}"),
    ])?;
    k.example(
        "build-job.yaml",
        &[("name: MORE, value: \"\"", "name: MORE, value: \"--push\"")],
    )?;
    k.complete("build-digits", Duration::from_secs(200)).await?;

    k.example("train-job.yaml", &[])?;
    let worker = |n: usize| format!("job-name=train-digits,batch.kubernetes.io/job-completion-index={n}");
    // Read as it is written: the first steps are seen long before the last.
    k.until_true("the first steps", |k| {
        Ok(k.run(&["logs", "-l", &worker(1)], Duration::from_secs(20))?
            .stdout
            .contains("step    20/200"))
    })
    .await?;
    let nodes = k.ok(&[
        "get",
        "pods",
        "-l",
        "job-name=train-digits",
        "-o",
        "jsonpath={.items[*].spec.nodeName}",
    ])?;
    ensure!(
        nodes.contains("node1") && nodes.contains("node2"),
        "both nodes have a worker: {nodes}"
    );
    let pod = k.ok(&[
        "get",
        "pods",
        "-l",
        &worker(1),
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ])?;
    k.kill_container(&pod)?;
    k.complete("train-digits", Duration::from_secs(120)).await?;
    let restarts = k.ok(&[
        "get",
        "pods",
        "-l",
        &worker(1),
        "-o",
        "jsonpath={.items[*].status.containerStatuses[0].restartCount}",
    ])?;
    ensure!(
        restarts.trim() == "1",
        "the worker was started again: {restarts:?}"
    );
    let log = k.ok(&["logs", "-l", &worker(0), "--tail=-1"])?;
    ensure!(
        log.contains("worker 1 is gone") || log.matches("worker 1 joins").count() == 2,
        "{log}"
    );
    let accuracy: f64 = log
        .lines()
        .find_map(|l| l.strip_prefix("accuracy "))
        .and_then(|a| a.parse().ok())
        .with_context(|| format!("no accuracy in\n{log}"))?;
    ensure!(accuracy > 0.85, "accuracy {accuracy}");
    println!("{}", log.trim_end());
    Ok(())
}
