//! kubectl exec, attach, cp, port-forward, debug and logs -f through the API server.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::follow::Followed;
use crate::kube::{IMAGE, Kube};

const LIMIT: Duration = Duration::from_secs(60);

pub async fn exec_with_terminal_input_and_exit_codes(k: Kube) -> Result<()> {
    k.pod("main", "exec sleep 1000", json!({}), json!({}))?;
    k.ready("main").await?;
    let o = k.run(
        &[
            "exec",
            "main",
            "--",
            "sh",
            "-c",
            "echo out; echo err >&2; exit 42",
        ],
        LIMIT,
    )?;
    ensure!(o.code == 42, "{o:?}");
    ensure!(o.stdout == "out\n" && o.stderr.starts_with("err\n"), "{o:?}");
    // Input reaches its end: cat ends by itself.
    let o = piped(
        &k,
        &["exec", "-i", "main", "--", "sh", "-c", "cat; echo end"],
        "some input\n",
    )?;
    ensure!(o == "some input\nend\n", "{o:?}");
    let o = piped(
        &k,
        &["exec", "-i", "main", "--", "wc", "-c"],
        &"x".repeat(5_000_000),
    )?;
    ensure!(o.trim() == "5000000", "{o:?}");
    // A terminal, which kubectl gives only where it has one itself: script(1) makes it one.
    let kubectl = harness::lab::tool("kubectl");
    let line = format!(
        "{} -n {} exec -it main -- sh -c 'tty; stty size; exit 3'",
        kubectl.display(),
        k.space
    );
    let mut c = harness::cmd::command(
        "script",
        ["-qec", &format!("stty rows 33 cols 99; {line}"), "/dev/null"],
    );
    c.env("KUBECONFIG", k.cluster.kubeconfig());
    let o = harness::cmd::run(&mut c, LIMIT)?;
    ensure!(o.code == 3, "{o:?}");
    ensure!(o.stdout.contains("/dev/pts/0"), "{o:?}");
    ensure!(o.stdout.contains("33 99"), "the window's size arrives: {o:?}");
    Ok(())
}

/// What kubectl prints when it is given `input`.
fn piped(k: &Kube, args: &[&str], input: &str) -> Result<String> {
    let mut child = k
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("piped")?;
    let text = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let o = child.wait_with_output()?;
    let written = writer.join();
    ensure!(
        o.status.success() && matches!(written, Ok(Ok(()))),
        "kubectl {args:?}: {}\n{}",
        o.status,
        String::from_utf8_lossy(&o.stderr)
    );
    Ok(String::from_utf8_lossy(&o.stdout).into_owned())
}

pub async fn attach_reads_and_writes(k: Kube) -> Result<()> {
    k.pod(
        "main",
        "while read line; do echo got $line; [ \"$line\" = end ] && exit 5; done; exit 6",
        json!({}),
        json!({ "stdin": true }),
    )?;
    k.ready("main").await?;
    // The first client goes away without closing anything: the container and the next client are none the worse.
    let mut child = k
        .command(&["attach", "-i", "main"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdin = child.stdin.take().context("piped")?;
    let mut out = BufReader::new(child.stdout.take().context("piped")?);
    stdin.write_all(b"one\n")?;
    let mut line = String::new();
    out.read_line(&mut line)?;
    ensure!(line == "got one\n", "{line:?}");
    child.kill()?;
    child.wait()?;
    drop(stdin);
    ensure!(k.field("pod/main", ".status.phase")? == "Running");
    let mut child = k
        .command(&["attach", "-i", "main"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdin = child.stdin.take().context("piped")?;
    stdin.write_all(b"two\nend\n")?;
    let mut text = String::new();
    child.stdout.take().context("piped")?.read_to_string(&mut text)?;
    child.wait()?;
    ensure!(
        text.contains("got two\n") && text.contains("got end\n"),
        "{text:?}"
    );
    k.until(
        "pod/main",
        ".status.containerStatuses[0].state.terminated.exitCode",
        "5",
    )
    .await
}

pub async fn cp_carries_a_file_both_ways(k: Kube) -> Result<()> {
    k.pod("main", "exec sleep 1000", json!({}), json!({}))?;
    k.ready("main").await?;
    let there = k.cluster.dir().join("cp-there");
    let back = k.cluster.dir().join("cp-back");
    harness::cmd::sh(&format!("head -c 64000000 /dev/urandom > {}", there.display()))?;
    let (there, back) = (there.display().to_string(), back.display().to_string());
    k.ok(&["cp", &there, "main:/tmp/file"])?;
    k.ok(&["cp", "main:/tmp/file", &back])?;
    harness::cmd::sh(&format!("cmp {there} {back} && rm {there} {back}"))?;
    Ok(())
}

pub async fn port_forward_reaches_a_server_in_the_pod(k: Kube) -> Result<()> {
    k.pod(
        "web",
        "mkdir -p /www && head -c 20000000 /dev/zero > /www/big && echo hello > /www/index.html && exec httpd -f -p 8080 -h /www",
        json!({}),
        json!({ "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 } }),
    )?;
    k.ready("web").await?;
    let mut child = k
        .command(&["port-forward", "pod/web", ":8080", "--address", "127.0.0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    // Read on to the end: kubectl says each connection, and ends where nobody takes that.
    let mut line = String::new();
    let mut said = BufReader::new(child.stdout.take().context("piped")?);
    said.read_line(&mut line)?;
    let rest = std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    let asked = (|| {
        let port = line
            .split("127.0.0.1:")
            .nth(1)
            .and_then(|p| p.split(' ').next())
            .with_context(|| format!("no port in {line:?}"))?;
        let url = format!("http://127.0.0.1:{port}");
        // Many at once, small and large.
        harness::cmd::sh(&format!(
            "for i in 1 2 3 4 5 6 7 8; do curl -sf --max-time 30 {url}/ & done; curl -sf --max-time 50 {url}/big | wc -c; wait"
        ))
    })();
    child.kill()?;
    child.wait()?;
    let _ = rest.join();
    let text = asked?;
    ensure!(
        text.matches("hello").count() == 8 && text.contains("20000000"),
        "{text}"
    );
    Ok(())
}

pub async fn debug_adds_a_container_that_sees_its_target(k: Kube) -> Result<()> {
    k.pod("main", "exec sleep 4321", json!({}), json!({}))?;
    k.ready("main").await?;
    k.ok(&[
        "debug",
        "main",
        "--image",
        IMAGE,
        "--target",
        "main",
        "-c",
        "dbg",
        "--",
        "sh",
        "-c",
        "ps; cat /proc/1/root/etc/passwd | head -1",
    ])?;
    let ended = ".status.ephemeralContainerStatuses[0].state.terminated.exitCode";
    k.until("pod/main", ended, "0").await?;
    let log = k.ok(&["logs", "main", "-c", "dbg"])?;
    ensure!(log.contains("sleep 4321"), "{log}");
    Ok(())
}

pub async fn logs_are_followed_live(k: Kube) -> Result<()> {
    k.pod(
        "main",
        "i=0; while [ $i -lt 10 ]; do echo tick $i; i=$((i+1)); sleep 0.5; done",
        json!({}),
        json!({}),
    )?;
    k.ready("main").await?;
    let seen = Followed::of(&k, "main")?;
    seen.until("tick 9", LIMIT).await?;
    let seen = seen.lines()?;
    ensure!(seen.len() == 10, "{seen:?}");
    let live = seen[9].1.saturating_sub(seen[5].1);
    ensure!(
        live > Duration::from_millis(500),
        "the lines came as they were written: {seen:?}"
    );
    Ok(())
}
