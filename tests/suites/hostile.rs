//! Images that mean harm, over a real registry and the CRI: refused with a clear error, nothing half-visible, nothing
//! outside. The CVEs are those of other runtimes and builders.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::cri::{container_config, pod_config};
use harness::forge::{Entry, Forge, layer};
use harness::image::{BUSYBOX, run_slipway};
use harness::registry::Registry;
use harness::{World, cmd, lab, v1};

fn stored(root: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for dir in ["content/sha256", "content/ingest", "snapshots"] {
        for entry in std::fs::read_dir(root.join(dir))? {
            found.insert(format!("{dir}/{}", entry?.file_name().to_string_lossy()));
        }
    }
    Ok(found)
}

/// A pull that must fail, and says one of these words.
async fn refused(w: &World, name: &str, words: &[&str]) -> Result<()> {
    let before = stored(w.daemon.root())?;
    let error = match w.cri.pull(name).await {
        Err(error) => format!("{error:#}"),
        Ok(id) => anyhow::bail!("{name} was pulled as {id}"),
    };
    ensure!(
        words.iter().any(|word| error.contains(word)),
        "{name}: none of {words:?} is in {error}"
    );
    ensure!(
        !error.contains("Internal") && error.contains(name),
        "{name} is not what the error is about: {error}"
    );
    let images = w.cri.images().await?;
    ensure!(images.len() == 1, "{name}: {images:?}");
    // What came of a failed pull and is good is kept until somebody asks for the room, and the last of the transfers has
    // let go of it.
    let began = Instant::now();
    loop {
        run_slipway(&w.lab, &["prune"])?.ok()?;
        let after = stored(w.daemon.root())?;
        let left: Vec<_> = after.difference(&before).collect();
        if left.is_empty() {
            return Ok(());
        }
        ensure!(began.elapsed() < Duration::from_secs(5), "{name} leaves {left:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_blob_that_changed_was_cut_or_grew_in_a_real_registry_is_refused() -> Result<()> {
    let w = World::new("host-blob").await?;
    let registry = Registry::start(&w.lab, None)?;
    let noise: Vec<u8> = (0..400_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let layers = [
        layer(&[Entry::file("a", &noise)])?,
        layer(&[Entry::file("b", &noise[..1000])])?,
    ];
    let name = Forge::new(&registry.host(), "bad/blob").image("1", &layers, |_| {})?;
    let file = registry.blob_file(&harness::forge::digest(&layers[0].blob));
    let good = std::fs::read(&file)?;
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 4;
    std::fs::write(&file, &flipped)?;
    refused(&w, &name, &["digest"]).await?;
    std::fs::write(&file, &good[..good.len() / 2])?;
    refused(&w, &name, &["ended after"]).await?;
    std::fs::write(&file, b"")?;
    refused(&w, &name, &["ended after"]).await?;
    std::fs::write(&file, [&good[..], b"more"].concat())?;
    refused(&w, &name, &["longer", "bytes"]).await?;
    std::fs::remove_file(&file)?;
    refused(&w, &name, &["layer", "not"]).await?;
    std::fs::write(&file, &good)?;
    w.cri.pull(&name).await.context("made good again")?;
    w.finish().await
}

/// CVE-2021-32760 (a link's mode reaches its target), CVE-2025-47290 (a link put where a directory was checked).
#[tokio::test]
async fn archives_that_lead_out_of_their_layer_are_refused_or_stay_in_it() -> Result<()> {
    let w = World::new("host-path").await?;
    let registry = Registry::start(&w.lab, None)?;
    let forge = Forge::new(&registry.host(), "bad/path");
    let victim = w.lab.write("victim", "untouched")?;
    std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o600))?;
    let outside = victim.display().to_string();
    let up = "../".repeat(30);
    let climbing = format!("{up}{}", outside.trim_start_matches('/'));
    let (file, dir) = (
        |name: &str| Entry::file(name, b"evil"),
        |name: &str| Entry::dir(name),
    );
    let refusals: Vec<(&str, Vec<Entry>)> = vec![
        (
            "dots",
            vec![file(&climbing[climbing.len() - climbing.len().min(99)..])],
        ),
        ("plain-dots", vec![file("../../../evil")]),
        ("inner-dots", vec![dir("a"), file("a/../../evil")]),
        ("absolute", vec![file("/evil")]),
        ("link-up", vec![Entry::link("l", &up), file("l/evil")]),
        ("hard-dots", vec![Entry::hard("h", "../../../etc/passwd")]),
        ("hard-absolute", vec![Entry::hard("h", "/etc/passwd")]),
        ("whiteout-dots", vec![file("a/.wh...")]),
        ("root-is-a-file", vec![file("./")]),
    ];
    for (tag, entries) in refusals {
        let name = forge.image(tag, &[layer(&[dir("ok")])?, layer(&entries)?], |_| {})?;
        refused(&w, &name, &["lead out", "usable name", "names the root"])
            .await
            .with_context(|| tag.to_owned())?;
    }
    // These are taken, and mean something inside the layer only.
    let inside: Vec<(&str, Vec<Entry>)> = vec![
        (
            "absolute-link",
            vec![Entry::link("l", &outside), file("l").mode(0o777)],
        ),
        (
            "hard-link-mode",
            vec![Entry::link("l", &outside), Entry::hard("h", "l").mode(0o777)],
        ),
        (
            "directory-becomes-link",
            vec![
                dir("d"),
                file("d/first"),
                Entry::link("d", &w.lab.path().display().to_string()),
                file("d/victim").mode(0o777),
            ],
        ),
    ];
    for (tag, entries) in inside {
        let name = forge.image(tag, &[layer(&entries)?], |_| {})?;
        w.cri.pull(&name).await.with_context(|| tag.to_owned())?;
        run_slipway(&w.lab, &["rmi", &name])?.ok()?;
        ensure!(std::fs::read_to_string(&victim)? == "untouched", "{tag}");
        let mode = std::fs::metadata(&victim)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "{tag}: {mode:o}");
    }
    ensure!(!Path::new("/evil").exists() && !w.lab.join("evil").exists());
    w.finish().await
}

#[tokio::test]
async fn sizes_that_lie_are_refused_before_they_fill_the_disk() -> Result<()> {
    let w = World::new("host-size").await?;
    let registry = Registry::start(&w.lab, None)?;
    let forge = Forge::new(&registry.host(), "bad/size");
    let good = layer(&[Entry::file("a", &[1; 100_000])])?;
    let name = forge.image("short", std::slice::from_ref(&good), |m| {
        m["layers"][0]["size"] = (good.blob.len() - 10).into();
    })?;
    refused(&w, &name, &["longer", "bytes"]).await?;
    let name = forge.image("long", std::slice::from_ref(&good), |m| {
        m["layers"][0]["size"] = (good.blob.len() + 10).into();
    })?;
    refused(&w, &name, &["bytes"]).await?;
    // A header that claims more than the disk has, and one that claims more than the archive has.
    let huge = layer(&[Entry::file("a", b"x").claiming(0o77_777_777_777)])?;
    let name = forge.image("cut", &[huge], |_| {})?;
    refused(&w, &name, &["ends in the middle", "space", "hold"]).await?;
    let config = forge.image("config", std::slice::from_ref(&good), |m| {
        m["config"]["size"] = (1u64 << 40).into();
    })?;
    refused(&w, &config, &["bytes"]).await?;
    w.finish().await
}

/// CVE-2026-95839: a digest that is none, in an entry or an annotation. (How deep indexes are followed and how many of their
/// entries are looked into is counted beside the puller.)
#[tokio::test]
async fn bad_digests_are_refused_by_name() -> Result<()> {
    let w = World::new("host-index").await?;
    let registry = Registry::start(&w.lab, None)?;
    let forge = Forge::new(&registry.host(), "bad/index");
    let good = layer(&[Entry::file("a", b"1")])?;
    // Annotations are nobody's business: whatever they say, the image is the image.
    let name = forge.image("annotated", std::slice::from_ref(&good), |m| {
        let odd = serde_json::json!({
            "containerd.io/uncompressed": "sha256", "org.opencontainers.image.base.digest": ":",
            "containerd.io/distribution.source.": "x", "org.opencontainers.image.ref.name": "../../x\n",
        });
        m["annotations"] = odd.clone();
        m["layers"][0]["annotations"] = odd.clone();
        m["config"]["annotations"] = odd;
    })?;
    w.cri.pull(&name).await.context("odd annotations")?;
    run_slipway(&w.lab, &["rmi", &name])?.ok()?;
    run_slipway(&w.lab, &["prune"])?.ok()?;
    let image = |tag: &str| forge.image(tag, std::slice::from_ref(&good), |_| {});
    image("1")?;
    let manifest = serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:x", "size": 1,
    });
    let index = |entries: Vec<serde_json::Value>| {
        move |m: &mut serde_json::Value| {
            *m = serde_json::json!({
                "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries,
            });
        }
    };
    let sent = forge.image("bad-digest", &[], index(vec![manifest]));
    match sent {
        Ok(name) => refused(&w, &name, &["digest"]).await?,
        // The registry knows better, and says that it is the digest.
        Err(error) => {
            let said = format!("{error:#}").to_lowercase();
            anyhow::ensure!(said.contains("digest") || said.contains("manifest"), "{said}");
            eprintln!("the registry refuses it by itself: {said}");
        }
    }
    w.finish().await
}

/// CVE-2026-53488.
#[tokio::test]
async fn labels_of_an_image_never_become_labels_of_a_container() -> Result<()> {
    let w = World::new("host-label").await?;
    let context = w.lab.join("c");
    std::fs::create_dir_all(&context)?;
    std::fs::write(
        context.join("Dockerfile"),
        format!(
            "FROM {BUSYBOX}\nLABEL io.kubernetes.container.name=evil io.kubernetes.pod.uid=evil io.cri-containerd.kind=sandbox slipway.kind=sandbox io.containerd.image.restart=always\nRUN true\n"
        ),
    )?;
    run_slipway(
        &w.lab,
        &["build", "-t", "labelled:1", &context.display().to_string()],
    )?
    .ok()?;
    let (pod, id) = w
        .pod_with(
            "labelled",
            container_config("main", "labelled:1", &["sleep", "1000"]),
        )
        .await?;
    let status = w.cri.status(&id).await?;
    for (key, value) in status.labels.iter().chain(&status.annotations) {
        ensure!(!value.contains("evil") && value != "sandbox", "{key}={value}");
    }
    let list = w.cri.containers().await?;
    ensure!(list.len() == 1 && list[0].labels == status.labels, "{list:?}");
    let request = v1::ContainerStatusRequest {
        container_id: id.clone(),
        verbose: true,
    };
    let verbose = w
        .cri
        .runtime
        .clone()
        .container_status(request)
        .await?
        .into_inner();
    let info: serde_json::Value = serde_json::from_str(verbose.info.get("info").context("info")?)?;
    let spec = info["runtimeSpec"]["annotations"].to_string();
    ensure!(!spec.contains("evil") && !spec.contains("sandbox"), "{spec}");
    w.cri.remove_pod(&pod).await?;
    w.finish().await
}

fn peak_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// CVE-2026-47262, CVE-2025-4437.
#[tokio::test]
async fn a_huge_passwd_or_group_file_costs_no_memory_and_is_an_error() -> Result<()> {
    let w = World::new("host-passwd").await?;
    let registry = Registry::start(&w.lab, None)?;
    let forge = Forge::new(&registry.host(), "bad/passwd");
    let busybox = std::fs::read("/bin/busybox").or_else(|_| std::fs::read("/usr/bin/busybox"))?;
    let mut passwd = vec![b'x'; 300 << 20];
    passwd[..35].copy_from_slice(b"bob:x:7:7::/:/bin/sh\nroot:x:0:0::/\n");
    for (tag, path) in [("passwd", "etc/passwd"), ("group", "etc/group")] {
        let name = forge.image(
            tag,
            &[layer(&[
                Entry::file("bin/busybox", &busybox).mode(0o755),
                Entry::file(path, &passwd),
            ])?],
            |_| {},
        )?;
        w.cri.pull(&name).await?;
        let before = peak_kib(w.daemon.pid())?;
        let config = pod_config(tag, &w.lab, true);
        let pod = w.cri.run_pod(config.clone()).await?;
        let mut container = container_config("main", &name, &["/bin/busybox", "true"]);
        container
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default()
            .run_as_username = "bob".to_owned();
        let made = w.cri.create(&pod, container, config).await;
        let error = format!("{:#}", made.expect_err("a file without measure"));
        ensure!(error.contains(path), "{error}");
        let grown = peak_kib(w.daemon.pid())?.saturating_sub(before);
        ensure!(grown < 30_000, "slipwayd grew by {grown} KiB");
        w.cri.remove_pod(&pod).await?;

        let chown = format!(
            "COPY --chown={} f /f",
            if tag == "passwd" { "bob" } else { "0:bob" }
        );
        for line in ["RUN [\"/bin/busybox\", \"true\"]", &chown] {
            w.lab.write("c/f", "x")?;
            w.lab.write("c/Dockerfile", format!("FROM {name}\n{line}\n"))?;
            let script = format!(
                "ulimit -v 1500000; exec {} build --root {} --state {} --progress plain {}",
                lab::bin("slipway").display(),
                w.daemon.root().display(),
                w.daemon.state().display(),
                w.lab.join("c").display()
            );
            let o = cmd::run(&mut cmd::command("sh", ["-c", &script]), Duration::from_secs(60))?;
            ensure!(o.code != 0 && o.stderr.contains(path), "{line}: {o:?}");
        }
        run_slipway(&w.lab, &["rmi", &name])?.ok()?;
    }
    w.finish().await
}

fn build(w: &World, dockerfile: &str) -> Result<cmd::Output> {
    w.lab.write("c/f", "x")?;
    w.lab.write("c/Dockerfile", dockerfile)?;
    let dir = w.lab.join("c").display().to_string();
    run_slipway(&w.lab, &["build", "--no-cache", "--progress", "plain", &dir])
}

/// CVE-2024-23651: two steps share a cache, and one of them changes its directories into links while the other mounts.
#[tokio::test]
async fn a_cache_that_another_step_changes_into_links_never_shows_the_host() -> Result<()> {
    let w = World::new("host-race").await?;
    w.lab.write("host/secret", "of the host")?;
    let host = w.lab.join("host").display().to_string();
    let swap = format!(
        "i=0; while [ $i -lt 400 ]; do rm -rf /c/sub; ln -s {host} /c/sub; rm -rf /c/sub; mkdir /c/sub; ln -sfn {host} /c/other; i=$((i+1)); done; ln -sfn {host} /c/sub; echo swapped"
    );
    let mut looks = String::new();
    for _ in 0..8 {
        looks.push_str(
            "RUN --mount=type=cache,id=shared,target=/c --mount=type=cache,id=shared,target=/again cat /c/sub/secret /again/sub/secret /c/other/secret 2>/dev/null | tee -a /seen; true\n",
        );
    }
    let text = format!(
        "FROM {BUSYBOX} AS swap\nRUN --mount=type=cache,id=shared,target=/c {swap}\nFROM {BUSYBOX} AS look\n{looks}FROM {BUSYBOX}\nCOPY --from=swap /etc/passwd /1\nCOPY --from=look /seen /seen\nRUN if grep -q host /seen; then echo ESCAPED; else echo contained; fi\n"
    );
    let o = build(&w, &text)?.ok()?;
    let said = o.stdout + &o.stderr;
    ensure!(said.contains("swapped") && said.contains("contained"), "{said}");
    ensure!(!said.contains("of the host"), "{said}");
    // A part of a cache would have to be found by name while others change it: there is no such thing.
    let o = build(
        &w,
        &format!("FROM {BUSYBOX}\nRUN --mount=type=cache,id=shared,source=sub,target=/x ls /x\n"),
    )?;
    ensure!(
        o.code != 0 && o.stderr.contains("source") && o.stderr.contains("Dockerfile:2"),
        "{o:?}"
    );
    w.finish().await
}

/// CVE-2024-23652: the mount points made for a step are removed after it, whatever the step has put in their way.
#[tokio::test]
async fn what_a_step_leaves_in_place_of_its_mount_points_deletes_nothing_on_the_host() -> Result<()> {
    let w = World::new("host-stub").await?;
    let host = w.lab.join("host");
    std::fs::create_dir_all(host.join("dir"))?;
    for name in ["file", "hosts", "resolv.conf"] {
        std::fs::write(host.join(name), "")?;
    }
    let place = host.display();
    let text = format!(
        "FROM scratch\nCOPY --from={BUSYBOX} /bin /bin\nENV PATH=/bin\nRUN --mount=type=bind,source=f,target=/a/file --mount=type=tmpfs,target=/b/dir --mount=type=cache,target=/d/dir mv /a /a1 && mv /b /b1 && mv /d /d1 && ln -s {place} /a && ln -s {place} /b && ln -s ../../../../../../..{place} /d && mv /etc /etc1 && ln -s {place} /etc\nRUN ls -l / && echo done\n"
    );
    let o = build(&w, &text)?;
    for name in ["file", "hosts", "resolv.conf", "dir"] {
        ensure!(host.join(name).exists(), "{name} of the host is gone: {o:?}");
    }
    o.ok()?;
    w.finish().await
}

/// CVE-2024-23653: nothing in a Dockerfile gives a step more than every step has.
#[tokio::test]
async fn no_instruction_makes_a_step_privileged() -> Result<()> {
    let w = World::new("host-priv").await?;
    // The machine has that device, and nobody has granted it.
    let spec = r#"{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","devices":[{"name":"all","containerEdits":{"env":["GPU=1"]}}]}"#;
    w.lab.write("cdi/vendor.json", spec)?;
    let devices = w.lab.join("cdi").display().to_string();
    for (line, word) in [
        ("RUN --security=insecure echo ran", "security"),
        ("RUN --device=vendor.com/gpu=all echo ran", "device"),
    ] {
        for text in [
            format!("FROM {BUSYBOX}\n{line}\n"),
            format!("FROM {BUSYBOX}\nONBUILD {line}\n"),
        ] {
            w.lab.write("b/Dockerfile", &text)?;
            let dir = w.lab.join("b").display().to_string();
            let build = ["build", "--cdi-spec-dir", &devices, "-t", "trigger:1", &dir];
            let o = run_slipway(&w.lab, &build)?;
            let o = if text.contains("ONBUILD") {
                o.ok()?;
                w.lab.write("b/Dockerfile", "FROM trigger:1\nRUN true\n")?;
                run_slipway(&w.lab, &build)?
            } else {
                o
            };
            ensure!(o.code != 0 && o.stderr.contains(word), "{text}: {o:?}");
            let said = o.stdout + &o.stderr;
            ensure!(
                !said.lines().any(|l| l.ends_with(" ran") && !l.contains("echo")),
                "{said}"
            );
        }
    }
    w.finish().await
}
