//! A runtime that runs nothing: its commands are written here, and its pods are this machine.

use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use slipway_stream::{
    Attach, AttachRequest, Config, Exec, ExecRequest, Forward, PortForwardRequest, Runtime, Server, Urls,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("no program {0:?}")]
    NoProgram(String),
    #[error("container {0} is not running")]
    NotRunning(String),
    #[error("nothing listens on port {port}")]
    NotListening { port: u16, source: io::Error },
    #[error("a stream broke")]
    Stream {
        #[from]
        source: io::Error,
    },
}

/// How many sessions are with the runtime.
#[derive(Debug, Default)]
pub struct Running(AtomicUsize);

impl Running {
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    fn enter(self: &Arc<Self>) -> impl Drop + use<> {
        struct Guard(Arc<Running>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.0.fetch_add(1, Ordering::SeqCst);
        Guard(self.clone())
    }
}

#[derive(Debug, Default)]
pub struct Fake(Arc<Running>);

/// The byte at a place of the stream that `flood` writes and `sink` reads.
pub fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

/// 64 KiB of the pattern from a place on.
pub fn block(at: usize) -> &'static [u8] {
    static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..(64 << 10) + 251).map(pattern).collect());
    &PATTERN[at % 251..][..64 << 10]
}

impl Runtime for Fake {
    type Error = Failure;

    async fn exec(&self, exec: Exec) -> Result<u8, Failure> {
        let _running = self.0.enter();
        let Exec {
            command,
            mut stdio,
            tty,
            ..
        } = exec;
        let argument = |index: usize| {
            command
                .get(index)
                .and_then(|word| word.parse().ok())
                .unwrap_or(0usize)
        };
        let print = async |stdio: &mut slipway_stream::Stdio, text: String| match &mut stdio.stdout {
            Some(stdout) => stdout.write_all(text.as_bytes()).await,
            None => Ok(()),
        };
        match command[0].as_str() {
            "echo" => print(&mut stdio, format!("{}\n", command[1..].join(" "))).await?,
            "exit" => return Ok(argument(1) as u8),
            "both" => {
                print(&mut stdio, "out\n".to_owned()).await?;
                stdio.stderr.as_mut().unwrap().write_all(b"err\n").await?;
                return Ok(3);
            }
            "cat" => drop(copy(stdio.stdin.as_mut().unwrap(), stdio.stdout.as_mut().unwrap()).await?),
            "describe" => {
                let has = |there: bool| if there { "yes" } else { "no" };
                let (stdin, stderr) = (has(stdio.stdin.is_some()), has(stdio.stderr.is_some()));
                print(
                    &mut stdio,
                    format!("tty {} stdin {stdin} stderr {stderr}", has(tty)),
                )
                .await?;
            }
            "sizes" => {
                for _ in 0..argument(1) {
                    let Some(size) = stdio.resizes.next().await else {
                        break;
                    };
                    print(&mut stdio, format!("{}x{}\n", size.width, size.height)).await?;
                }
            }
            "flood" => {
                let total = argument(1);
                let stdout = stdio.stdout.as_mut().unwrap();
                let mut at = 0;
                while at < total {
                    let count = (64 << 10).min(total - at);
                    stdout.write_all(&block(at)[..count]).await?;
                    at += count;
                }
            }
            "sink" => {
                let (mut at, mut wrong, mut chunk) = (0, 0, vec![0; 64 << 10]);
                loop {
                    let count = stdio.stdin.as_mut().unwrap().read(&mut chunk).await?;
                    if count == 0 {
                        break;
                    }
                    wrong +=
                        usize::from(chunk[0] != pattern(at) || chunk[count - 1] != pattern(at + count - 1));
                    at += count;
                }
                print(&mut stdio, format!("{at} bytes, {wrong} wrong")).await?;
            }
            "ignore" => {
                drop(stdio.stdin.take());
                tokio::time::sleep(Duration::from_millis(argument(1) as u64)).await;
            }
            "wait" => stdio.hangup.wait().await,
            "stuck" => std::future::pending().await,
            program => return Err(Failure::NoProgram(program.to_owned())),
        }
        Ok(0)
    }

    async fn attach(&self, attach: Attach) -> Result<(), Failure> {
        let _running = self.0.enter();
        let Attach {
            container, mut stdio, ..
        } = attach;
        if container == "gone" {
            return Err(Failure::NotRunning(container));
        }
        let stdout = stdio.stdout.as_mut().unwrap();
        stdout
            .write_all(format!("attached to {container}\n").as_bytes())
            .await?;
        match &mut stdio.stdin {
            Some(stdin) => drop(copy(stdin, stdout).await?),
            None => stdio.hangup.wait().await,
        }
        Ok(())
    }

    async fn port_forward(&self, forward: Forward) -> Result<(), Failure> {
        let _running = self.0.enter();
        let Forward {
            port,
            mut input,
            mut output,
            ..
        } = forward;
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .map_err(|source| Failure::NotListening { port, source })?;
        let (mut from_pod, mut to_pod) = stream.split();
        let up = async {
            copy(&mut input, &mut to_pod).await?;
            to_pod.shutdown().await
        };
        let down = async {
            copy(&mut from_pod, &mut output).await?;
            output.shutdown().await
        };
        tokio::try_join!(up, down)?;
        Ok(())
    }
}

/// A server with a fake runtime, stopped when dropped.
pub struct World {
    pub urls: Urls,
    pub running: Arc<Running>,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl World {
    pub async fn start() -> World {
        World::with(Config {
            abandon_after: Duration::from_millis(200),
            ..Config::default()
        })
        .await
    }

    pub async fn with(config: Config) -> World {
        let running = Arc::new(Running::default());
        let server = Server::bind(config, Fake(running.clone())).await.unwrap();
        let (urls, stop) = (server.urls(), CancellationToken::new());
        let server = tokio::spawn(server.run(stop.clone().cancelled_owned()));
        World {
            urls,
            running,
            stop,
            server,
        }
    }

    /// Stops the server and waits for it.
    pub async fn stop(self) {
        self.stop.cancel();
        self.server.await.unwrap();
    }

    /// The URL of a command with all streams, or with a terminal.
    pub fn exec(&self, command: &[&str], tty: bool) -> String {
        let request = ExecRequest {
            container: "c1".to_owned(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        self.urls.exec(request).unwrap()
    }

    pub fn attach(&self, container: &str, stdin: bool) -> String {
        let container = container.to_owned();
        let request = AttachRequest {
            container,
            tty: false,
            stdin,
            stdout: true,
            stderr: true,
        };
        self.urls.attach(request).unwrap()
    }

    pub fn port_forward(&self) -> String {
        self.urls
            .port_forward(PortForwardRequest { pod: "p1".to_owned() })
            .unwrap()
    }

    /// Waits until nothing is going on any more.
    pub async fn settled(&self) {
        for _ in 0..1200 {
            if self.urls.connections() == 0 && self.running.count() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!(
            "{} connections, {} sessions",
            self.urls.connections(),
            self.running.count()
        );
    }
}
