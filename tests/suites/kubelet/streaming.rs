//! kubectl exec, attach, cp, port-forward, debug and logs -f through the API server: over WebSocket, which kubectl takes by
//! itself and kubelet makes SPDY of, and over SPDY, which the API server and kubelet pass through as it is.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::leftovers;
use harness::process::{Running, forget_peak, peak};
use serde_json::json;

use crate::follow::Followed;
use crate::kube::{IMAGE, Kube};

const LIMIT: Duration = Duration::from_secs(60);

pub async fn exec_with_terminal_input_and_exit_codes(k: Kube) -> Result<()> {
    k.pod("main", "exec sleep 1000", json!({}), json!({}))?;
    k.ready("main").await?;
    for wire in WIRES {
        let script = "echo out; echo err >&2; exit 42";
        let mut c = over(&k, wire, &["exec", "main", "--", "sh", "-c", script]);
        let o = harness::cmd::run(&mut c, LIMIT)?;
        ensure!(o.code == 42, "{wire}: {o:?}");
        ensure!(
            o.stdout == "out\n" && o.stderr.starts_with("err\n"),
            "{wire}: {o:?}"
        );
        // Input reaches its end: cat ends by itself.
        let args = ["exec", "-i", "main", "--", "sh", "-c", "cat; echo end"];
        let o = piped(over(&k, wire, &args), "some input\n")?;
        ensure!(o == "some input\nend\n", "{wire}: {o:?}");
        let args = ["exec", "-i", "main", "--", "wc", "-c"];
        let o = piped(over(&k, wire, &args), &"x".repeat(5_000_000))?;
        ensure!(o.trim() == "5000000", "{wire}: {o:?}");
        // A terminal, whose size is told when it begins and when it changes.
        let mut shell = OnTerminal::kubectl(&k, wire, &["exec", "-it", "main", "--", "sh"])?;
        shell.is_a_terminal().context(wire)?;
        let mut shell = shell.program;
        shell.write("exit 3\n")?;
        let code = shell.wait(LIMIT)?;
        ensure!(code == 3, "{wire}: {code}: {}", shell.stdout());
    }
    Ok(())
}

pub async fn attach_and_debug_have_a_terminal(k: Kube) -> Result<()> {
    k.pod(
        "main",
        "exec sh",
        json!({}),
        json!({ "stdin": true, "tty": true }),
    )?;
    k.ready("main").await?;
    for wire in WIRES {
        let mut shell = OnTerminal::kubectl(&k, wire, &["attach", "-it", "main"])?;
        // The prompt was shown before anybody was there.
        shell.program.write("\n")?;
        shell.is_a_terminal().context(wire)?;
        // Whoever hangs up leaves it as it is.
        shell.program.kill()?;
        ensure!(k.field("pod/main", ".status.phase")? == "Running", "{wire}");
    }
    for (n, wire) in WIRES.into_iter().enumerate() {
        let name = format!("dbg{n}");
        let image = ["--image", IMAGE, "--target", "main", "-c", &name];
        let args = [&["debug", "-it", "main"], &image[..], &["--", "sh"]].concat();
        let mut shell = OnTerminal::kubectl(&k, wire, &args)?;
        shell.program.write("\n")?;
        shell.is_a_terminal().context(wire)?;
        let mut shell = shell.program;
        // Its target is its init, whose terminal is another one.
        shell.write(
            "readlink /proc/1/exe /proc/self/ns/pid; echo init=$(cat /proc/1/comm) self=$$; exit 0\n",
        )?;
        shell.wait(LIMIT)?;
        let said = shell.stdout();
        ensure!(
            said.contains("init=sh self=") && !said.contains("self=1\r"),
            "{wire}: {said}"
        );
    }
    Ok(())
}

/// What kubectl speaks.
const WIRES: [&str; 2] = ["websocket", "spdy"];

/// kubectl that speaks it.
fn over(k: &Kube, wire: &str, args: &[&str]) -> Command {
    let mut c = k.command(args);
    for (name, value) in wired(wire) {
        c.env(name, value);
    }
    c
}

fn wired(wire: &str) -> [(&'static str, String); 2] {
    let websocket = (wire == "websocket").to_string();
    [
        ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websocket.clone()),
        ("KUBECTL_PORT_FORWARD_WEBSOCKETS", websocket),
    ]
}

/// A program on a terminal of its own, 99 × 33, which becomes 120 × 44 when it is told.
struct OnTerminal {
    program: Running,
    /// When this file is there.
    widen: PathBuf,
}

impl OnTerminal {
    /// kubectl, on a terminal that script(1) makes.
    fn kubectl(k: &Kube, wire: &str, args: &[&str]) -> Result<OnTerminal> {
        let widen = k.cluster.dir().join(format!("widen-{}", k.space));
        let _ = std::fs::remove_file(&widen);
        let inner = over(k, wire, args);
        let words = std::iter::once(inner.get_program()).chain(inner.get_args());
        let line: Vec<String> = words
            .map(|word| format!("'{}'", word.to_string_lossy()))
            .collect();
        let later = format!(
            "(until [ -e {} ]; do sleep 0.05; done; stty rows 44 cols 120 </dev/tty) &",
            widen.display()
        );
        let line = format!("stty rows 33 cols 99; {later} exec {}", line.join(" "));
        let mut c = harness::cmd::command("script", ["-qefc", &line, "/dev/null"]);
        for (name, value) in inner.get_envs() {
            c.env(name, value.unwrap_or_default());
        }
        let program = Running::start(&mut c)?;
        Ok(OnTerminal { program, widen })
    }

    /// Finds the shell that it shows on a terminal, of the size that it has and then of the one that it gets.
    fn is_a_terminal(&mut self) -> Result<()> {
        self.program.until("# ", LIMIT)?;
        self.program
            .write("tty; until stty size | grep '33 99'; do sleep 0.1; done\n")?;
        self.program.until("/dev/", LIMIT)?;
        self.program.until("33 99\r\n", LIMIT)?;
        std::fs::write(&self.widen, "")?;
        self.program
            .write("until stty size | grep '44 120'; do sleep 0.1; done\n")?;
        self.program.until("44 120\r\n", LIMIT)
    }
}

/// What kubectl prints when it is given `input`.
fn piped(mut c: Command, input: &str) -> Result<String> {
    let mut child = c
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
        "{c:?}: {}\n{}",
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

/// What slipwayd and the shim may grow by while a file goes through, in KiB, however large it is.
const GROWTH: usize = 8 << 10;

/// What goes over each wire, in MiB: over the first, which is kubectl's own choice, a gigabyte. `SLIPWAY_CP_MIB`: so much over both.
const SIZES: [usize; 2] = [1024, 64];

pub async fn a_file_goes_through_cp_and_port_forward_whole_with_memory_bounded(k: Kube) -> Result<()> {
    let sizes = std::env::var("SLIPWAY_CP_MIB").map_or(Ok(SIZES), |n| n.parse().map(|n| [n; 2]))?;
    let node = crate::SECOND;
    let web = "mkdir -p /www && exec httpd -f -p 8080 -h /www";
    k.pod(
        "main",
        web,
        json!({ "nodeSelector": { "kubernetes.io/hostname": format!("node{node}") } }),
        json!({ "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 } }),
    )?;
    k.ready("main").await?;
    let there = k.cluster.dir().join("cp-there");
    let back = k.cluster.dir().join("cp-back");
    // Whatever is allocated once has been.
    k.ok(&["exec", "main", "--", "true"])?;
    let daemon = k
        .cluster
        .processes()
        .pid(&k.cluster.runtime(node))
        .context("slipwayd has ended")?;
    let shims = leftovers::processes_naming(&k.cluster.node_dir(node));
    let shims = shims.into_iter().filter(|(_, c)| c.contains("containerd-shim-"));
    let pids: Vec<u32> = std::iter::once(daemon).chain(shims.map(|(pid, _)| pid)).collect();
    for (wire, mib) in WIRES.into_iter().zip(sizes) {
        harness::cmd::sh(&format!("head -c {mib}M /dev/urandom > {}", there.display()))?;
        let limit = LIMIT + Duration::from_millis(200) * u32::try_from(mib)?;
        let sh = |line: String| -> Result<String> {
            let o = harness::cmd::run(&mut harness::cmd::command("sh", ["-c", &line]), limit)?;
            Ok(o.ok()?.stdout)
        };
        let digest = |path: &Path| sh(format!("sha256sum < {}", path.display()));
        let wanted = digest(&there)?;
        let mut before = Vec::new();
        for pid in &pids {
            forget_peak(*pid)?;
            before.push(peak(*pid)?);
        }
        let bounded = |what: &str| -> Result<()> {
            for (pid, before) in pids.iter().zip(&before) {
                let peak = peak(*pid)?;
                println!(
                    "{mib} MiB {what} over {wire}: process {pid} has {peak} KiB at its peak, {before} before"
                );
                ensure!(
                    peak < before + GROWTH,
                    "{what} over {wire}: process {pid} grew from {before} to {peak} KiB"
                );
            }
            Ok(())
        };
        let cp = |from: &str, to: &str| -> Result<()> {
            harness::cmd::run(&mut over(&k, wire, &["cp", from, to]), limit)?.ok()?;
            Ok(())
        };
        cp(&there.display().to_string(), "main:/www/file")?;
        let inside = k.ok(&["exec", "main", "--", "sha256sum", "/www/file"])?;
        ensure!(
            inside[..64] == wanted[..64],
            "{wire}: another file is in the container"
        );
        bounded("into the container")?;
        cp("main:/www/file", &back.display().to_string())?;
        ensure!(digest(&back)? == wanted, "{wire}: another file came back");
        bounded("out of the container")?;
        let forwarding = Forwarding::to(&k, wire, "pod/main")?;
        let url = forwarding.url();
        let got = sh(format!("curl -sf {url}/file | sha256sum"))?;
        ensure!(got == wanted, "{wire}: another file came through port-forward");
        bounded("through port-forward")?;
    }
    harness::cmd::sh(&format!("rm {} {}", there.display(), back.display()))?;
    Ok(())
}

/// `kubectl port-forward` to port 8080 of something; ended when this is dropped.
struct Forwarding {
    child: Child,
    port: u16,
}

impl Forwarding {
    fn to(k: &Kube, wire: &str, what: &str) -> Result<Forwarding> {
        let mut child = over(
            k,
            wire,
            &["port-forward", what, ":8080", "--address", "127.0.0.1"],
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
        // Read on to the end: kubectl says each connection, and ends where nobody takes that.
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().context("piped")?);
        said.read_line(&mut line)?;
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let mut forwarding = Forwarding { child, port: 0 };
        let port = line.split("127.0.0.1:").nth(1).and_then(|p| p.split(' ').next());
        forwarding.port = port.with_context(|| format!("no port in {line:?}"))?.parse()?;
        Ok(forwarding)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn port_forward_reaches_a_server_in_the_pod(k: Kube) -> Result<()> {
    k.pod(
        "web",
        "mkdir -p /www && head -c 20000000 /dev/zero > /www/big && echo hello > /www/index.html && exec httpd -f -p 8080 -h /www",
        json!({}),
        json!({ "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 } }),
    )?;
    k.ready("web").await?;
    for wire in WIRES {
        let forwarding = Forwarding::to(&k, wire, "pod/web")?;
        let url = forwarding.url();
        // Many at once, small and large.
        let text = harness::cmd::sh(&format!(
            "for i in 1 2 3 4 5 6 7 8; do curl -sf --max-time 30 {url}/ & done; curl -sf --max-time 50 {url}/big | wc -c; wait"
        ))?;
        ensure!(
            text.matches("hello").count() == 8 && text.contains("20000000"),
            "{wire}: {text}"
        );
    }
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
