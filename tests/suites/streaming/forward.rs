//! crictl port-forward.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::cri::pod_config;
use harness::process::{Running, forget_peak, peak};
use harness::{Crictl, World, v1};

use crate::{SOON, TRANSPORTS, shim};

const MUCH: usize = 1 << 30;

/// What is said of it at once.
const PART: usize = 1 << 20;
/// A length that divides no buffer's: what is lost, repeated or swapped is at a place where other bytes belong.
const PERIOD: usize = 65_521;

/// The bytes of [`MUCH`] from this place on: they depend on it, with neighbouring periods all the same and nothing less.
fn part(from: usize) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let byte = |at: usize| ((at % PERIOD).wrapping_mul(2_654_435_761) >> 11) as u8;
        (0..PART + PERIOD).map(byte).collect()
    });
    &BYTES[from % PERIOD..][..PART]
}

/// What listens in a pod's network.
struct Served {
    pod: String,
    /// Echoes.
    echo: u16,
    /// Echoes, on IPv6 alone.
    echo6: u16,
    /// Says [`MUCH`].
    flood: u16,
    /// Says how much it was told.
    count: u16,
}

/// A pod with servers of the test's own in its network.
async fn serving(w: &World, name: &str, host_network: bool) -> Result<Served> {
    let pod = w.cri.run_pod(pod_config(name, &w.lab, host_network)).await?;
    let netns = (!host_network).then(|| w.daemon.state().join("pods").join(&pod).join("ns/net"));
    let listen = move || -> Result<[TcpListener; 4]> {
        if let Some(path) = netns {
            let netns = std::fs::File::open(path)?;
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(netns.as_fd(), kind)?;
        }
        Ok([
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("[::1]:0")?,
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("127.0.0.1:0")?,
        ])
    };
    // A thread of its own, which has entered the pod's network and ends there.
    let [echo, echo6, flood, count] = std::thread::spawn(listen).join().expect("no panic")?;
    Ok(Served {
        pod,
        echo: serve(echo, echo_back)?,
        echo6: serve(echo6, echo_back)?,
        flood: serve(flood, |mut c| {
            (0..MUCH / PART).try_for_each(|n| c.write_all(part(n * PART)))
        })?,
        count: serve(count, |mut c| {
            let total = std::io::copy(&mut c, &mut std::io::sink())?;
            c.write_all(total.to_string().as_bytes())
        })?,
    })
}

fn echo_back(mut connection: TcpStream) -> std::io::Result<()> {
    std::io::copy(&mut connection.try_clone()?, &mut connection).map(drop)
}

/// Serves each connection in a thread; the port. Ends with the test.
fn serve(listener: TcpListener, each: fn(TcpStream) -> std::io::Result<()>) -> Result<u16> {
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            std::thread::spawn(move || each(connection));
        }
    });
    Ok(port)
}

/// crictl forwarding free local ports to `ports`; the local ports.
fn forward(w: &World, pod: &str, transport: &str, ports: &[u16]) -> Result<(Running, Vec<u16>)> {
    let mut args = vec![
        "port-forward".to_owned(),
        "-r".to_owned(),
        transport.to_owned(),
        pod.to_owned(),
    ];
    args.extend(ports.iter().map(|port| format!(":{port}")));
    let client = Running::start(&mut Crictl::of(&w.daemon).command(args))?;
    let mut local = Vec::new();
    for port in ports {
        client.until(&format!("-> {port}\n"), SOON)?;
        let said = client.stdout();
        let line = said
            .lines()
            .find(|l| l.contains("127.0.0.1:") && l.ends_with(&format!("-> {port}")))
            .context("no line of IPv4")?;
        let port = line
            .split("127.0.0.1:")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        local.push(port.context("no port")?.parse()?);
    }
    Ok((client, local))
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

/// Sends `data`, ends its side, and reads to the end.
fn ask(port: u16, data: &[u8]) -> Result<Vec<u8>> {
    let mut stream = connect(port)?;
    let mut sending = stream.try_clone()?;
    let data = data.to_vec();
    let sender = std::thread::spawn(move || {
        sending.write_all(&data)?;
        sending.shutdown(Shutdown::Write)
    });
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    sender.join().expect("no panic")?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_forwarded_into_the_pods_network_many_at_once() -> Result<()> {
    let w = World::new("st-forward").await?;
    let Served { pod, echo, echo6, .. } = serving(&w, "net", false).await?;
    for transport in TRANSPORTS {
        let (client, local) = forward(&w, &pod, transport, &[echo, echo6])?;
        let clients: Vec<_> = (0..40u8)
            .map(|n| {
                let port = local[0];
                std::thread::spawn(move || {
                    let data = vec![n; 100_000 + usize::from(n)];
                    ask(port, &data).map(|answer| answer == data)
                })
            })
            .collect();
        for client in clients {
            assert!(
                client.join().expect("no panic")?,
                "{transport}: another answer came back"
            );
        }
        assert_eq!(
            ask(local[1], b"six")?,
            b"six",
            "{transport}: IPv6 where IPv4 is refused"
        );
        assert_eq!(client.stderr(), "", "{transport}");
    }
    w.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_arrives_whole_with_memory_bounded() -> Result<()> {
    let w = World::new("st-giga").await?;
    let served = serving(&w, "giga", false).await?;
    let pids = [w.daemon.pid(), shim(&w)?];
    for transport in TRANSPORTS {
        let (_client, local) = forward(
            &w,
            &served.pod,
            transport,
            &[served.echo, served.flood, served.count],
        )?;
        ask(local[0], b"what is allocated once has been")?;
        let before = pids.map(|pid| forget_peak(pid).and_then(|()| peak(pid)));
        let mut stream = connect(local[1])?;
        let mut chunk = vec![0; PART];
        let mut got = 0;
        loop {
            match stream.read(&mut chunk)? {
                0 => break,
                n => {
                    assert!(
                        chunk[..n] == part(got)[..n],
                        "{transport}: other bytes from {got} on"
                    );
                    got += n;
                }
            }
            if got < 64 << 20 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(got, MUCH, "{transport}");
        let sent = vec![7; 100 << 20];
        let counted = String::from_utf8(ask(local[2], &sent)?)?;
        assert_eq!(counted.trim(), sent.len().to_string(), "{transport}");
        for (pid, before) in pids.into_iter().zip(before) {
            let grown = peak(pid)?.saturating_sub(before?);
            assert!(grown < 8 << 10, "{transport}: process {pid} grew by {grown} KiB");
        }
    }
    w.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_hosts_network_is_forwarded_to_as_well() -> Result<()> {
    let w = World::new("st-host").await?;
    let Served { pod, echo, echo6, .. } = serving(&w, "host", true).await?;
    for transport in TRANSPORTS {
        let (_client, local) = forward(&w, &pod, transport, &[echo, echo6])?;
        for port in local {
            assert_eq!(ask(port, b"hello")?, b"hello", "{transport}");
        }
    }
    w.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_nobody_listens_on_is_an_error_and_a_stopped_pod_is_refused() -> Result<()> {
    let w = World::new("st-refused").await?;
    let pod = w.cri.run_pod(pod_config("refused", &w.lab, false)).await?;
    for transport in TRANSPORTS {
        let (client, local) = forward(&w, &pod, transport, &[81])?;
        assert_eq!(ask(local[0], b"anybody?").unwrap_or_default(), b"", "{transport}");
        crate::until("crictl says why", async || {
            Ok(client.stderr().contains("refused"))
        })
        .await?;
        let said = client.stderr();
        assert!(
            said.contains("port 81") && said.contains(&pod),
            "{transport}: {said}"
        );
    }
    let mut runtime = w.cri.runtime.clone();
    let request = |id: &str| v1::PortForwardRequest {
        pod_sandbox_id: id.to_owned(),
        port: vec![],
    };
    let unknown = runtime.port_forward(request("nobody")).await.expect_err("nobody");
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    let stop = v1::StopPodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    runtime.stop_pod_sandbox(stop).await?;
    let stopped = runtime
        .port_forward(request(&pod))
        .await
        .expect_err("it is stopped");
    assert_eq!(stopped.code(), tonic::Code::FailedPrecondition);
    w.finish().await
}
