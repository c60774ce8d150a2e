//! crictl attach.

use std::time::Duration;

use anyhow::Result;
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;
use harness::process::Running;
use harness::{Crictl, World, v1};

use crate::{SOON, TRANSPORTS, until};

/// Answers each line on both streams.
const ANSWER: &[&str] = &[
    "sh",
    "-c",
    "while read line; do echo got $line; echo err $line >&2; done; echo over",
];

fn interactive(name: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        stdin: true,
        ..container_config(name, BUSYBOX, command)
    }
}

fn attach(w: &World, args: &[&str]) -> Result<Running> {
    Running::start(&mut Crictl::of(&w.daemon).command([&["attach"], args].concat()))
}

async fn is_running(w: &World, id: &str) -> Result<bool> {
    Ok(w.cri.status(id).await?.state == v1::ContainerState::ContainerRunning as i32)
}

#[tokio::test]
async fn clients_come_and_go_beside_the_log_and_the_container_goes_on() -> Result<()> {
    let w = World::new("st-attach").await?;
    let (_, id) = w.pod_with("attach", interactive("attach", ANSWER)).await?;
    let mut told = 0;
    for transport in TRANSPORTS {
        let viewer = attach(&w, &["-r", transport, &id])?;
        let mut typist = attach(&w, &["-i", "-r", transport, &id])?;
        // Both are attached once both have seen something.
        while !(viewer.stdout().contains("got") && typist.stdout().contains("got")) {
            told += 1;
            assert!(
                told < 1000,
                "nothing comes: {} {}",
                viewer.stderr(),
                typist.stderr()
            );
            typist.write(format!("{told}\n"))?;
            typist.until(&format!("got {told}\n"), SOON)?;
        }
        told += 1;
        typist.write(format!("{told}\n"))?;
        viewer.until(&format!("got {told}\n"), SOON)?;
        typist.until(&format!("got {told}\n"), SOON)?;
        until("stderr arrives", async || {
            Ok(viewer.stderr().contains(&format!("err {told}\n")))
        })
        .await?;
        assert!(!viewer.stdout().contains("err"));

        // One is cut off, the other types on.
        typist.kill()?;
        let mut typist = attach(&w, &["-i", "-r", transport, &id])?;
        told += 1;
        typist.write(format!("{told}\n"))?;
        viewer.until(&format!("got {told}\n"), SOON)?;

        // The end of input is a detach.
        typist.close_stdin();
        assert_eq!(typist.wait(SOON)?, 0, "{transport}: {}", typist.stderr());
        assert!(is_running(&w, &id).await?);
    }
    // What clients have seen of one stream says nothing of the other in the log.
    let last = format!("err {told}");
    until("the log has the last line", async || {
        Ok(w.log("attach")?.iter().any(|l| l.text == last))
    })
    .await?;
    let log = w.log("attach")?;
    let of = |stream| {
        log.iter()
            .filter(|l| l.stream == stream)
            .map(|l| l.text.clone())
            .collect::<Vec<_>>()
    };
    let expected = |word: &str| (1..=told).map(|n| format!("{word} {n}")).collect::<Vec<_>>();
    assert_eq!(
        (of("stdout"), of("stderr")),
        (expected("got"), expected("err")),
        "the log has it all"
    );

    // A viewer's session ends with the container.
    let mut viewer = attach(&w, &[&id])?;
    let mut typist = attach(&w, &["-i", &id])?;
    while !viewer.stdout().contains("got") {
        typist.write("again\n")?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    w.cri.stop(&id, 0).await?;
    assert_eq!(viewer.wait(SOON)?, 0, "{}", viewer.stderr());
    assert_eq!(typist.wait(SOON)?, 0, "{}", typist.stderr());
    let o = Crictl::of(&w.daemon).run(&["attach", &id])?;
    assert!(o.code != 0 && o.stderr.contains("exited"), "{}", o.stderr);
    w.finish().await
}

#[tokio::test]
async fn stdin_that_is_open_once_ends_with_its_first_client() -> Result<()> {
    let w = World::new("st-once").await?;
    for transport in TRANSPORTS {
        let name = format!("once-{transport}");
        let config = v1::ContainerConfig {
            stdin_once: true,
            ..interactive(&name, ANSWER)
        };
        let (_, id) = w.pod_with(&name, config).await?;
        let mut client = attach(&w, &["-i", "-r", transport, &id])?;
        client.write("one\ntwo\n")?;
        client.close_stdin();
        assert_eq!(client.wait(SOON)?, 0, "{transport}: {}", client.stderr());
        assert_eq!(client.stdout(), "got one\ngot two\nover\n", "{transport}");
        assert_eq!(client.stderr(), "err one\nerr two\n", "{transport}");
        assert_eq!(w.cri.wait_exit(&id, SOON).await?.exit_code, 0);
    }
    // A client that breaks off ends it too.
    let config = v1::ContainerConfig {
        stdin_once: true,
        ..interactive("cut", ANSWER)
    };
    let (_, id) = w.pod_with("cut", config).await?;
    let mut client = attach(&w, &["-i", &id])?;
    client.write("one\n")?;
    client.until("got one\n", SOON)?;
    client.kill()?;
    assert_eq!(w.cri.wait_exit(&id, SOON).await?.exit_code, 0);
    w.finish().await
}

#[tokio::test]
async fn a_terminal_is_shared_and_left_by_its_escape_keys() -> Result<()> {
    let w = World::new("st-atty").await?;
    let config = v1::ContainerConfig {
        tty: true,
        ..interactive("tty", &["sh"])
    };
    let (_, id) = w.pod_with("tty", config).await?;
    let crictl = Crictl::of(&w.daemon);
    for transport in TRANSPORTS {
        let args = ["attach", "-it", "-r", transport, &id];
        let mut shell = Running::start(&mut crictl.on_terminal(&args, 99, 33))?;
        shell.write("\n")?;
        shell.until("# ", SOON)?;
        shell.write("until stty size | grep '33 99'; do sleep 0.05; done; echo $((6*7))\n")?;
        shell.until("33 99", SOON)?;
        shell.until("42", SOON)?;
        shell.write("\x10\x11")?;
        shell.wait(SOON)?;
        assert!(is_running(&w, &id).await?, "{transport}: leaving it ended it");
    }
    let mut shell = Running::start(&mut crictl.on_terminal(&["attach", "-it", &id], 80, 24))?;
    shell.write("\n")?;
    shell.until("# ", SOON)?;
    shell.write("exit 5\n")?;
    shell.wait(SOON)?;
    assert_eq!(w.cri.wait_exit(&id, SOON).await?.exit_code, 5);
    w.finish().await
}

#[tokio::test]
async fn a_client_that_does_not_read_does_not_hold_up_the_container() -> Result<()> {
    let w = World::new("st-slow").await?;
    let pod = pod_config("slow", &w.lab, true);
    let sandbox = w.cri.run_pod(pod.clone()).await?;
    let script = "read line; yes 0123456789abcde | head -c 32000000; exit 6";
    let config = interactive("slow", &["sh", "-c", script]);
    let id = w.cri.run(&sandbox, config, pod).await?;
    let mut client = attach(&w, &["-i", &id])?;
    client.write("go\n")?;
    client.until("0123456789abcde", SOON)?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(client.pid())?).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
    let s = w.cri.wait_exit(&id, Duration::from_secs(60)).await?;
    assert_eq!(s.exit_code, 6);
    let log = w.log("slow")?;
    assert_eq!(log.len(), 2_000_000, "the log has every line");
    rustix::process::kill_process(pid, rustix::process::Signal::CONT)?;
    assert_eq!(client.wait(Duration::from_secs(60))?, 0, "{}", client.stderr());
    w.finish().await
}

#[tokio::test]
async fn a_container_without_stdin_is_attached_to_for_what_it_says() -> Result<()> {
    let w = World::new("st-nostdin").await?;
    let command = ["sh", "-c", "while :; do echo tick; sleep 0.1; done"];
    let (_, id) = w
        .pod_with("mute", container_config("mute", BUSYBOX, &command))
        .await?;
    let client = attach(&w, &["-i", &id])?;
    client.until("tick\ntick\n", SOON)?;
    drop(client);
    assert!(is_running(&w, &id).await?);
    w.finish().await
}

#[tokio::test]
async fn a_container_without_a_log_is_attached_to_and_never_held_up() -> Result<()> {
    let w = World::new("st-nolog").await?;
    // More than a pipe or a terminal holds, before anybody attaches.
    let command = [
        "sh",
        "-c",
        "head -c 1000000 /dev/zero; while :; do echo tick; sleep 0.1; done",
    ];
    for (name, tty) in [("pipes", false), ("terminal", true)] {
        let mut config = container_config(name, BUSYBOX, &command);
        config.log_path = String::new();
        config.tty = tty;
        let (_, id) = w.pod_with(name, config).await?;
        let client = attach(&w, &[&id])?;
        client.until("tick", SOON)?;
        drop(client);
        assert!(is_running(&w, &id).await?);
    }
    w.finish().await
}

#[tokio::test]
async fn a_terminal_that_nobody_has_open_for_a_while_is_read_again() -> Result<()> {
    let w = World::new("st-console").await?;
    let script = "echo first; exec <&- >&- 2>&-; sleep 0.5; head -c 200000 /dev/zero > /dev/console; \
                  echo again > /dev/console; sleep 100000";
    let mut config = container_config("console", BUSYBOX, &["sh", "-c", script]);
    config.tty = true;
    let (_, id) = w.pod_with("console", config).await?;
    until("what is said later is in the log", async || {
        Ok(w.log("console")?.iter().any(|line| line.text.contains("again")))
    })
    .await?;
    assert!(w.log("console")?[0].text.contains("first"));
    assert!(is_running(&w, &id).await?);
    w.finish().await
}
