//! Images over the CRI and the command line: a real registry on loopback, pull, list, remove, push.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result};
use harness::cri::{container_config, pod_config};
use harness::image::{BUSYBOX, run_slipway};
use harness::registry::Registry;
use harness::{World, cmd, lab, v1};

#[tokio::test]
async fn an_image_built_is_pushed_removed_pulled_and_run() -> Result<()> {
    let w = World::new("img-push").await?;
    let registry = Registry::start(&w.lab, None)?;
    let name = format!("{}/team/busybox:v1", registry.host());
    run_slipway(&w.lab, &["tag", BUSYBOX, &name])?.ok()?;
    let pushed = run_slipway(&w.lab, &["push", &name])?.ok()?;
    assert!(
        pushed.stdout.contains("sha256:") || pushed.stderr.contains("sha256:"),
        "{pushed:?}"
    );
    let built = w.cri.images().await?;
    let id = built[0].id.clone();
    assert!(
        built[0].size > 0 && built[0].repo_tags.contains(&name),
        "{built:?}"
    );

    for tag in [BUSYBOX, name.as_str()] {
        let r = v1::RemoveImageRequest {
            image: Some(v1::ImageSpec {
                image: tag.into(),
                ..Default::default()
            }),
        };
        w.cri.image.clone().remove_image(r.clone()).await?;
        w.cri
            .image
            .clone()
            .remove_image(r)
            .await
            .context("removing twice")?;
    }
    assert!(w.cri.images().await?.is_empty(), "one tag removes all its names");

    let pulled = w.cri.pull(&name).await?;
    assert_eq!(pulled, id, "the same config digest");
    let images = w.cri.images().await?;
    assert_eq!(images[0].repo_tags, std::slice::from_ref(&name));
    assert!(
        images[0]
            .repo_digests
            .iter()
            .any(|d| d.starts_with(&format!("{}/team/busybox@sha256:", registry.host())))
    );
    let config = pod_config("pulled", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let c = w
        .cri
        .run(
            &pod,
            container_config("main", &pulled, &["sh", "-c", "echo it runs"]),
            config,
        )
        .await?;
    assert_eq!(w.cri.wait_exit(&c, Duration::from_secs(10)).await?.exit_code, 0);
    w.finish().await
}

#[tokio::test]
async fn a_registry_that_is_not_there_and_an_image_it_lacks_are_told_apart() -> Result<()> {
    let w = World::new("img-err").await?;
    let registry = Registry::start(&w.lab, None)?;
    let missing = format!("{}/none/such:1", registry.host());
    let e = w.cri.pull(&missing).await.expect_err("not there");
    assert_eq!(
        e.downcast_ref::<tonic::Status>().map(tonic::Status::code),
        Some(tonic::Code::NotFound),
        "{e:#}"
    );
    assert!(format!("{e:#}").contains("none/such"), "{e:#}");
    drop(registry);
    let e = w
        .cri
        .pull("127.0.0.1:1/none/such:1")
        .await
        .expect_err("nobody listens");
    assert_ne!(
        e.downcast_ref::<tonic::Status>().map(tonic::Status::code),
        Some(tonic::Code::NotFound),
        "{e:#}"
    );
    let r = v1::ImageStatusRequest {
        image: Some(v1::ImageSpec {
            image: missing,
            ..Default::default()
        }),
        verbose: true,
    };
    assert!(
        w.cri
            .image
            .clone()
            .image_status(r)
            .await?
            .into_inner()
            .image
            .is_none(),
        "absent is no error"
    );
    w.finish().await
}

#[tokio::test]
async fn a_password_is_asked_for_and_given() -> Result<()> {
    let w = World::new("img-auth").await?;
    let password = w.lab.join("htpasswd");
    cmd::sh(&format!(
        "htpasswd -Bbc {} jane secret 2>/dev/null",
        password.display()
    ))?;
    let registry = Registry::start(&w.lab, Some(&password))?;
    let name = format!("{}/private/busybox:1", registry.host());
    run_slipway(&w.lab, &["tag", BUSYBOX, &name])?.ok()?;
    let refused = run_slipway(&w.lab, &["push", &name])?;
    assert_ne!(refused.code, 0, "no credentials");
    let auth =
        serde_json::json!({ "auths": { registry.host(): { "username": "jane", "password": "secret" } } });
    w.lab.write("docker/config.json", auth.to_string())?;
    let mut push = harness::image::slipway(w.daemon.root(), w.daemon.state(), &["push", &name]);
    cmd::run(
        push.env("DOCKER_CONFIG", w.lab.join("docker")),
        Duration::from_secs(60),
    )?
    .ok()?;
    run_slipway(&w.lab, &["rmi", &name])?.ok()?;
    let pull = async |user: &str, pass: &str| {
        let r = v1::PullImageRequest {
            image: Some(v1::ImageSpec {
                image: name.clone(),
                ..Default::default()
            }),
            auth: Some(v1::AuthConfig {
                username: user.into(),
                password: pass.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        w.cri.image.clone().pull_image(r).await
    };
    assert!(pull("jane", "wrong").await.is_err());
    pull("jane", "secret").await?;
    w.finish().await
}

#[tokio::test]
async fn file_system_figures_count_what_is_stored() -> Result<()> {
    let w = World::new("img-fs").await?;
    let r = w
        .cri
        .image
        .clone()
        .image_fs_info(v1::ImageFsInfoRequest {})
        .await?
        .into_inner();
    let fs = r.image_filesystems.first().expect("an image file system");
    assert!(
        fs.used_bytes.as_ref().is_some_and(|b| b.value > 500_000),
        "{fs:?}"
    );
    let mount = &fs.fs_id.as_ref().expect("fs_id").mountpoint;
    assert!(std::path::Path::new(mount).exists(), "{mount}");
    w.finish().await
}

#[tokio::test]
async fn crictl_shows_pods_containers_and_images() -> Result<()> {
    let w = World::new("img-crictl").await?;
    let (pod, id) = w
        .pod_with("shown", container_config("main", BUSYBOX, &["sleep", "1000"]))
        .await?;
    let endpoint = format!("unix://{}", w.daemon.socket().display());
    let crictl = |args: &[&str]| -> Result<String> {
        let mut all = vec!["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint];
        all.extend(args);
        Ok(cmd::run(
            &mut cmd::command(lab::tool("crictl"), all),
            Duration::from_secs(20),
        )?
        .ok()?
        .stdout)
    };
    assert!(crictl(&["version"])?.contains("slipway"));
    assert!(crictl(&["info"])?.contains("RuntimeReady"));
    assert!(crictl(&["pods"])?.contains("shown"));
    assert!(crictl(&["ps"])?.contains("main"));
    assert!(crictl(&["images"])?.contains("slipway.test/busybox"));
    let inspect: serde_json::Value = serde_json::from_str(&crictl(&["inspect", &id])?)?;
    assert!(
        inspect["info"]["pid"].as_u64().is_some_and(|p| p > 0),
        "{inspect:#}"
    );
    assert!(
        inspect["info"]["runtimeSpec"]["process"].is_object(),
        "{inspect:#}"
    );
    let inspect: serde_json::Value = serde_json::from_str(&crictl(&["inspectp", &pod])?)?;
    assert_eq!(inspect["status"]["metadata"]["name"], "shown");
    serde_json::from_str::<serde_json::Value>(&crictl(&["inspecti", BUSYBOX])?)?;
    assert!(crictl(&["stats"])?.contains(&id[..13]));
    assert_eq!(crictl(&["exec", "-s", &id, "echo", "hello"])?.trim(), "hello");
    assert!(crictl(&["imagefsinfo"])?.contains("usedBytes"));
    crictl(&["stopp", &pod])?;
    crictl(&["rmp", &pod])?;
    w.finish().await
}

#[tokio::test]
async fn two_roots_side_by_side_know_nothing_of_each_other() -> Result<()> {
    let a = World::new("img-a").await?;
    let b = World::new("img-b").await?;
    let (pa, _) = a
        .pod_with("one", container_config("main", BUSYBOX, &["sleep", "1000"]))
        .await?;
    let (pb, _) = b
        .pod_with("one", container_config("main", BUSYBOX, &["sleep", "1000"]))
        .await?;
    assert_eq!(
        a.cri.pods().await?.iter().map(|p| &p.id).collect::<Vec<_>>(),
        [&pa]
    );
    assert_eq!(
        b.cri.pods().await?.iter().map(|p| &p.id).collect::<Vec<_>>(),
        [&pb]
    );
    a.finish().await?;
    b.finish().await
}

#[tokio::test]
async fn a_full_disk_fails_a_pull_clearly_and_gives_the_space_back() -> Result<()> {
    let w = World::new("img-full").await?;
    let registry = Registry::start(&w.lab, None)?;
    let context = w.lab.join("big");
    std::fs::create_dir_all(&context)?;
    cmd::sh(&format!(
        "head -c 60000000 /dev/urandom > {}/blob",
        context.display()
    ))?;
    std::fs::write(
        context.join("Dockerfile"),
        format!("FROM {BUSYBOX}\nCOPY blob /blob\n"),
    )?;
    let big = format!("{}/big:1", registry.host());
    let small = format!("{}/small:1", registry.host());
    run_slipway(&w.lab, &["build", "-t", &big, &context.display().to_string()])?.ok()?;
    run_slipway(&w.lab, &["tag", BUSYBOX, &small])?.ok()?;
    run_slipway(&w.lab, &["push", &big])?.ok()?;
    run_slipway(&w.lab, &["push", &small])?.ok()?;

    let tiny = harness::Lab::new("img-tiny")?;
    std::fs::create_dir_all(tiny.join("root"))?;
    cmd::sh(&format!(
        "mount -t tmpfs -o size=48m tmpfs {}",
        tiny.join("root").display()
    ))?;
    let outcome = async {
        let mut d = harness::Daemon::start(&tiny, &harness::Setup::default()).await?;
        let c = d.cri().await?;
        let e = c.pull(&big).await.expect_err("48 MiB are not enough");
        assert!(format!("{e:#}").to_lowercase().contains("space"), "{e:#}");
        c.pull(&small).await.context("the service goes on")?;
        assert_eq!(c.images().await?.len(), 1);
        let o = run_slipway(
            &tiny,
            &["build", "-t", "x/y:1", &w.lab.join("big").display().to_string()],
        )?;
        assert_ne!(o.code, 0);
        d.drain().await
    }
    .await;
    cmd::sh(&format!("umount -l {}", tiny.join("root").display()))?;
    outcome?;
    tiny.finish()?;
    w.finish().await
}
