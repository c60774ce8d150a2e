//! Registries that ask for a password, and pods that bring it.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Lab, cmd, image, lab, registry::Registry};
use serde_json::json;

use crate::kube::Kube;

pub async fn a_private_image_is_pulled_with_the_secrets_of_its_pod_alone(k: Kube) -> Result<()> {
    let lab = Lab::new("kubelet-secret")?;
    let password = lab.join("htpasswd");
    cmd::sh(&format!(
        "htpasswd -Bbc {} jane open-sesame 2>/dev/null",
        password.display()
    ))?;
    let registry = Registry::start(&lab, Some(&password))?;
    let name = format!("{}/private/busybox:1", registry.host());
    push(&lab, &registry, &name)?;
    let outcome = pull(&k, &registry, &name).await;
    drop(registry);
    lab.finish()?;
    outcome
}

fn push(lab: &Lab, registry: &Registry, name: &str) -> Result<()> {
    let auth = json!({ "auths": { registry.host(): { "username": "jane", "password": "open-sesame" } } });
    lab.write("docker/config.json", auth.to_string())?;
    let context = lab::cache().join("lab-images").display().to_string();
    let build = [
        "build",
        "-q",
        "--push",
        "--target",
        "marked",
        "--build-arg",
        "TEST=private",
        "-t",
        name,
        &context,
    ];
    let mut build = image::slipway(&lab.join("root"), &lab.join("state"), &build);
    cmd::run(
        build.env("DOCKER_CONFIG", lab.join("docker")),
        Duration::from_secs(120),
    )?
    .ok()?;
    Ok(())
}

async fn pull(k: &Kube, registry: &Registry, name: &str) -> Result<()> {
    let server = format!("--docker-server={}", registry.host());
    for (secret, password) in [("right", "open-sesame"), ("wrong", "guess")] {
        let password = format!("--docker-password={password}");
        let create = ["create", "secret", "docker-registry", secret, &server];
        k.ok(&[&create[..], &["--docker-username=jane", &password]].concat())?;
    }
    let image = |policy: &str| json!({ "image": name, "imagePullPolicy": policy });
    let refused = |pod: &'static str| {
        k.until_true(pod, move |k| {
            let waiting = ".status.containerStatuses[0].state.waiting.reason";
            let reason = k.field(&format!("pod/{pod}"), waiting)?;
            Ok(reason == "ErrImagePull" || reason == "ImagePullBackOff")
        })
    };
    k.pod("none", "true", json!({}), image("Always"))?;
    refused("none").await?;
    let events = k.ok(&["get", "events"])?;
    ensure!(
        events.contains("401") || events.to_lowercase().contains("unauthorized"),
        "why is not said: {events}"
    );
    let secrets = |names: &[&str]| {
        let list: Vec<_> = names.iter().map(|n| json!({ "name": n })).collect();
        json!({ "imagePullSecrets": list })
    };
    k.pod("bad", "true", secrets(&["wrong"]), image("Always"))?;
    refused("bad").await?;
    // kubelet tries one after the other.
    k.pod(
        "good",
        "ls /private",
        secrets(&["wrong", "right"]),
        image("Always"),
    )?;
    k.phase("good", "Succeeded").await?;
    ensure!(k.logs("good")? == "/private\n");
    // That it is there now lets nobody have it who may not pull it: kubelet remembers by the image's id.
    k.pod("sly", "true", json!({}), image("IfNotPresent"))?;
    refused("sly").await?;
    k.pod("again", "true", secrets(&["right"]), image("IfNotPresent"))?;
    k.phase("again", "Succeeded").await
}
