//! The agent's own socket, for root alone: has it let go of NVML and take it up again, so that somebody can divide a GPU or
//! unload the driver meanwhile. What kubelet has of the GPUs stays as it is.
//!
//! ```text
//! <paths.state>/control.sock    0600; one line to it ("release SECONDS", "resume", "status"), one line back ("ok …", "error …")
//! ```

use std::io::{self, BufRead, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::cause::chain;
use crate::config::Paths;
use crate::status::Status;

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the agent may take: what it asks of a GPU is answered or given up before it lets go.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest line.
const LINE: u64 = 64;
/// Between two attempts to serve.
const AGAIN: Duration = Duration::from_secs(30);
/// Most seconds until the agent takes NVML up again by itself.
pub const MAX_SECONDS: u64 = 24 * 3600;

/// Where the socket is.
pub fn socket(paths: &Paths) -> PathBuf {
    paths.state.join("control.sock")
}

/// Serves for ever. What cannot be served is told once and tried again: the GPUs do not depend on it.
pub async fn serve(path: PathBuf, status: Arc<Status>) {
    let mut told = false;
    let listener = loop {
        match listen(&path) {
            Ok(listener) => break listener,
            Err(e) if !told => {
                told = true;
                let error = &e as &dyn std::error::Error;
                tracing::warn!(socket = %path.display(), error, "\"slipway-agent gpu\" cannot be served; trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    };
    let mut control = Control { status, timer: None };
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // One after the other: they change one thing.
        if let Err(e) = control.talk(stream).await {
            tracing::debug!(
                error = &e as &dyn std::error::Error,
                "a client of the control socket"
            );
        }
    }
}

/// A socket in the place of one that nobody serves any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another agent serves it",
        ));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

struct Control {
    status: Arc<Status>,
    /// Takes NVML up again when nobody does.
    timer: Option<JoinHandle<()>>,
}

impl Control {
    async fn talk(&mut self, stream: UnixStream) -> io::Result<()> {
        let uid = stream.peer_cred()?.uid();
        let (from, mut to) = stream.into_split();
        let answer = if uid == 0 || uid == rustix::process::geteuid().as_raw() {
            let mut line = String::new();
            let mut from = BufReader::new(from.take(LINE));
            timeout(PATIENCE, from.read_line(&mut line)).await??;
            self.answer(line.trim()).await
        } else {
            Err("only root may say this".to_owned())
        };
        let text = match answer {
            Ok(said) => format!("ok {said}\n"),
            Err(why) => format!("error {why}\n"),
        };
        timeout(PATIENCE, to.write_all(text.as_bytes())).await?
    }

    async fn answer(&mut self, line: &str) -> Result<String, String> {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["status"] => Ok(match self.status.released() {
                true => "NVML is released".into(),
                false => "NVML is in use".into(),
            }),
            ["release", seconds] => {
                let seconds = seconds.parse().ok().filter(|s| (1..=MAX_SECONDS).contains(s));
                let seconds = seconds.ok_or_else(|| format!("the time must be from 1 to {MAX_SECONDS} s"))?;
                self.release(Duration::from_secs(seconds)).await
            }
            ["resume"] => {
                self.stop_timer();
                resume(&self.status).await.map(|()| "NVML is in use again".into())
            }
            _ => Err(format!("{line:?} is not understood")),
        }
    }

    async fn release(&mut self, time: Duration) -> Result<String, String> {
        let Some(supervisor) = self.status.handle() else {
            return Ok("there is no driver yet: nothing was in use".into());
        };
        self.stop_timer();
        let done = supervisor.release().await;
        self.status.set_released(true);
        let status = Arc::clone(&self.status);
        self.timer = Some(tokio::spawn(async move {
            tokio::time::sleep(time).await;
            tracing::warn!(
                seconds = time.as_secs(),
                "NVML was not taken up again in time: it is now"
            );
            if let Err(error) = resume(&status).await {
                tracing::warn!(error, "NVML cannot be taken up again");
            }
        }));
        tracing::info!(
            seconds = time.as_secs(),
            "NVML is released: until it is taken up again, no XID is heard and no GPU is looked at"
        );
        done.map_err(|e| chain(&e))?;
        Ok(format!(
            "NVML is released for {} s at most; the GPUs stay as they are for kubelet, and no XID is heard",
            time.as_secs()
        ))
    }

    fn stop_timer(&mut self) {
        if let Some(timer) = self.timer.take() {
            timer.abort();
        }
    }
}

async fn resume(status: &Status) -> Result<(), String> {
    if let Some(supervisor) = status.handle() {
        supervisor.resume().await.map_err(|e| chain(&e))?;
    }
    if status.set_released(false) {
        tracing::info!("NVML is taken up again");
        status.look_again();
    }
    Ok(())
}

/// Says a line to the agent that runs with this configuration; what it answers.
///
/// # Errors
/// It does not run, or cannot do it.
pub fn ask(paths: &Paths, line: &str) -> Result<String> {
    let path = socket(paths);
    let mut stream = std::os::unix::net::UnixStream::connect(&path).with_context(|| {
        format!(
            "ask the agent at {}: is it running, with this configuration, and are you root?",
            path.display()
        )
    })?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    std::io::BufReader::new(stream)
        .read_line(&mut answer)
        .with_context(|| format!("wait for the agent's answer to {line:?}"))?;
    match answer.trim_end().split_once(' ') {
        Some(("ok", said)) => Ok(said.to_owned()),
        Some(("error", why)) => bail!("{why}"),
        _ => bail!("the agent broke off: see its log"),
    }
}
