//! Streams over TLS, with the real crictl.

use anyhow::Result;
use harness::cri::container_config;
use harness::image::BUSYBOX;
use harness::process::Running;
use harness::{Crictl, Setup, World, cmd, v1};

use crate::{SLEEP, SOON, TRANSPORTS};

#[tokio::test]
async fn streams_go_over_tls_to_who_trusts_the_certificate() -> Result<()> {
    let mut w = World::new("st-tls").await?;
    let dir = w.lab.join("tls");
    std::fs::create_dir_all(&dir)?;
    let of = |name: &str| dir.join(name).display().to_string();
    for name in ["server", "other"] {
        cmd::sh(&format!(
            "cd {} && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name} \
             -addext subjectAltName=IP:127.0.0.1,DNS:localhost -keyout {name}.key -out {name}.pem",
            dir.display()
        ))?;
    }
    let config = format!(
        "[streaming]\ntls_certificate = \"{}\"\ntls_key = \"{}\"\n",
        of("server.pem"),
        of("server.key")
    );
    w.daemon.stop()?;
    w.restart(&Setup {
        config,
        ..Default::default()
    })
    .await?;
    let (pod, id) = w.pod_with("tls", container_config("tls", BUSYBOX, SLEEP)).await?;
    let echo = v1::ContainerConfig {
        stdin: true,
        ..container_config("echo", BUSYBOX, &["cat"])
    };
    let (_, cat) = w.pod_with("echo", echo).await?;
    let crictl = Crictl::of(&w.daemon);
    // crictl wants a certificate of its own as well; slipwayd does not ask for it.
    let trusting = |name: &str| {
        ["ca", "cert", "key"]
            .map(|what| {
                let file = if what == "key" { "key" } else { "pem" };
                [format!("--tls-{what}"), of(&format!("{name}.{file}"))]
            })
            .concat()
    };
    let with = |name: &str, verb: &str, transport: &str, rest: &[&str]| {
        let mut args = vec![verb.to_owned(), "-r".to_owned(), transport.to_owned()];
        args.extend(trusting(name));
        args.extend(rest.iter().map(|arg| (*arg).to_owned()));
        crictl.command(args)
    };
    for transport in TRANSPORTS {
        let mut c = with(
            "server",
            "exec",
            transport,
            &[&id, "sh", "-c", "echo out; echo err >&2; exit 7"],
        );
        let o = cmd::run(&mut c, SOON)?;
        assert_eq!(o.stdout, "out\n", "{transport}: {}", o.stderr);
        assert!(
            o.stderr.starts_with("err\n") && o.stderr.contains("exit code 7"),
            "{transport}: {}",
            o.stderr
        );
        let o = cmd::run(&mut with("other", "exec", transport, &[&id, "true"]), SOON)?;
        assert!(
            o.code != 0 && o.stderr.contains("certificate"),
            "{transport}: {}",
            o.stderr
        );

        let mut typist = Running::start(&mut with("server", "attach", transport, &["-i", &cat]))?;
        typist.write("hello\n")?;
        typist.until("hello\n", SOON)?;
        typist.close_stdin();
        assert_eq!(typist.wait(SOON)?, 0, "{transport}: {}", typist.stderr());

        // Nobody listens, which the pod's side of the session says: it has been reached.
        let forwarding = Running::start(&mut with("server", "port-forward", transport, &[&pod, ":1"]))?;
        forwarding.until("-> 1\n", SOON)?;
        let said = forwarding.stdout();
        let port = said
            .split("127.0.0.1:")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        drop(std::net::TcpStream::connect(format!(
            "127.0.0.1:{}",
            port.unwrap_or("no port")
        ))?);
        crate::until("crictl is told", async || {
            Ok(forwarding.stderr().contains("nothing accepts a connection"))
        })
        .await?;
    }
    w.finish().await
}
