//! The job that must work: an image built by a Job in the cluster, pushed to a registry in the cluster, pulled on the other
//! node, and a training of two workers on two nodes that survives the death of one of them. From manifests/examples.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::cmd;
use serde_json::json;

use crate::OURS;
use crate::follow::Followed;
use crate::kube::Kube;

const BUILT: &str = "registry.slipway.local:5000/train-digits:1";

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
    // Against the node's store alone: runnable there at once, without push or pull.
    k.example("build-job.yaml", &[])?;
    k.complete("build-digits", Duration::from_secs(200)).await?;
    k.pod(
        "built",
        "",
        json!({}),
        json!({ "image": BUILT, "imagePullPolicy": "Never", "command": ["python3", "-c", "import numpy; print('runs')"] }),
    )?;
    k.phase("built", "Succeeded").await?;
    ensure!(k.logs("built")? == "runs\n");
    // The same again, from the build's cache, and pushed.
    k.ok(&["delete", "job", "build-digits"])?;
    k.example(
        "build-job.yaml",
        &[("name: MORE, value: \"\"", "name: MORE, value: \"--push\"")],
    )?;
    k.complete("build-digits", Duration::from_secs(100)).await?;

    k.example("train-job.yaml", &[])?;
    let worker = |n: usize| format!("job-name=train-digits,batch.kubernetes.io/job-completion-index={n}");
    let pod = |n: usize| {
        k.ok(&[
            "get",
            "pods",
            "-l",
            &worker(n),
            "-o",
            "jsonpath={.items[0].metadata.name}",
        ])
    };
    k.until_true("a pod of either worker", |_| {
        Ok([0, 1].iter().all(|n| {
            pod(*n).is_ok_and(|name| {
                k.field(&format!("pod/{name}"), ".status.phase")
                    .is_ok_and(|p| p == "Running")
            })
        }))
    })
    .await?;
    // Both logs are read as they are written: the first steps are seen long before the last.
    let (leader, other) = (Followed::of(&k, &pod(0)?)?, Followed::of(&k, &pod(1)?)?);
    for log in [&leader, &other] {
        log.until("step    20/200", Duration::from_secs(90)).await?;
    }
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
    k.kill_container(&pod(1)?)?;
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
    // What was followed is what is kept, and came as it was written.
    let lines = leader.lines()?;
    let log = lines.iter().map(|(l, _)| format!("{l}\n")).collect::<String>();
    let kept = k.ok(&["logs", "-l", &worker(0), "--tail=-1"])?;
    ensure!(log == kept, "followed:\n{log}\nkept:\n{kept}");
    let at = |step: &str| {
        let line = lines.iter().find(|(l, _)| l.contains(step));
        line.map(|(_, at)| *at)
            .with_context(|| format!("no {step} in\n{log}"))
    };
    let spread = at("step   200/200")?.saturating_sub(at("step    20/200")?);
    ensure!(
        spread > Duration::from_secs(5),
        "steps that take a tenth of a second each were all seen within {spread:?}"
    );
    // The follower of a container ends with it: the one that was killed had not come to its end.
    let died = other.lines()?;
    ensure!(
        !died.iter().any(|(l, _)| l.contains("200/200")),
        "the killed worker had trained to the end: {died:?}"
    );
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
    // With the same image, all at once: the nightly build, tonight's now, a training with PyTorch's environment, and one of two
    // kinds of parts.
    k.example("build-cronjob.yaml", &[])?;
    k.ok(&["create", "job", "--from=cronjob/build-digits-nightly", "tonight"])?;
    k.example("pytorch-job.yaml", &[])?;
    k.example("jobset.yaml", &[])?;
    ranks_have_their_environment(&k).await?;
    for job in ["train-set-leader", "train-set-workers"] {
        k.complete(job, Duration::from_secs(150)).await?;
    }
    let led = k.ok(&["logs", "job/train-set-leader"])?;
    ensure!(
        led.contains("worker 1 joins") && led.contains("worker 2 joins") && led.contains("accuracy "),
        "{led}"
    );
    k.complete("tonight", Duration::from_secs(150)).await?;
    let schedule = k.field("cronjob/build-digits-nightly", ".spec.suspend")?;
    ensure!(
        schedule == "false",
        "the nightly build is suspended: {schedule:?}"
    );
    Ok(())
}

async fn ranks_have_their_environment(k: &Kube) -> Result<()> {
    k.complete("train-ranks", Duration::from_secs(150)).await?;
    for rank in 0..2 {
        let of = format!("job-name=train-ranks,batch.kubernetes.io/job-completion-index={rank}");
        let log = k.ok(&["logs", "-l", &of, "--tail=-1"])?;
        let said = format!("rank {rank} of 2, rendezvous at train-ranks-0.train-ranks:29500\n");
        ensure!(
            log.starts_with(&said) && log.contains("step   100/100"),
            "rank {rank} says\n{log}"
        );
    }
    Ok(())
}

/// The image of the examples' trainings on node 1: from the build's cache, where a Job has built it.
pub fn image(k: &Kube) -> Result<()> {
    k.cluster.prepare_examples()?;
    let source = harness::lab::repo().join("tests/fixtures/train-digits");
    let source = source.display().to_string();
    let args = ["build", "-q", "--network", "host", "-t", BUILT, &source];
    cmd::run(&mut k.cluster.slipway(OURS, &args), Duration::from_secs(200))?.ok()?;
    Ok(())
}
