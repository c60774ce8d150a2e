//! The agent's own socket, for root alone: has it let go of NVML and take it up again, so that somebody can divide a GPU or
//! unload the driver meanwhile. What kubelet has of the GPUs stays as it is.
//!
//! ```text
//! <paths.state>/control.sock    0600; one line to it ("release SECONDS", "resume", "status"), one line back ("ok …", "error …")
//! <paths.state>/released.json   until when it is released, of one boot: an agent that is started meanwhile leaves it so
//! ```

use std::io::{self, BufRead, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
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

/// The record of a release.
#[derive(Debug, Clone)]
pub struct Record {
    file: PathBuf,
    boot_id: String,
}

#[derive(Serialize, Deserialize)]
struct Page {
    boot_id: String,
    /// Seconds since 1970.
    until: u64,
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

impl Record {
    /// In the state folder.
    pub fn of(paths: &Paths, boot_id: String) -> Record {
        Record {
            file: paths.state.join("released.json"),
            boot_id,
        }
    }

    /// How long it is still released; none: it is not. A record that cannot be read is none.
    pub fn left(&self) -> Option<Duration> {
        let page: Page = serde_json::from_slice(&std::fs::read(&self.file).ok()?).ok()?;
        let left = Duration::from_secs(page.until).checked_sub(now())?;
        (page.boot_id == self.boot_id).then_some(left.min(Duration::from_secs(MAX_SECONDS)))
    }

    /// Of the same boot, it needs not survive the machine.
    fn write(&self, time: Duration) -> io::Result<()> {
        let page = Page {
            boot_id: self.boot_id.clone(),
            until: (now() + time).as_secs(),
        };
        let new = self.file.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&page)?)?;
        std::fs::rename(new, &self.file)
    }

    fn remove(&self) {
        if let Err(e) = std::fs::remove_file(&self.file)
            && e.kind() != io::ErrorKind::NotFound
        {
            let error = &e as &dyn std::error::Error;
            tracing::warn!(file = %self.file.display(), error, "remove the record of a release");
        }
    }
}

/// Serves for ever. What cannot be served is told once and tried again: the GPUs do not depend on it.
pub async fn serve(path: PathBuf, status: Arc<Status>, record: Record) {
    let mut control = Control {
        status,
        record,
        timer: None,
    };
    if let Some(left) = control.record.left() {
        control.resume_after(left);
    }
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
    record: Record,
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
                resume(&self.status, &self.record)
                    .await
                    .map(|()| "NVML is in use again".into())
            }
            _ => Err(format!("{line:?} is not understood")),
        }
    }

    async fn release(&mut self, time: Duration) -> Result<String, String> {
        let Some(supervisor) = self.status.handle() else {
            return Ok("there is no driver yet: nothing was in use".into());
        };
        self.stop_timer();
        if let Err(e) = self.record.write(time) {
            let error = &e as &dyn std::error::Error;
            tracing::warn!(file = %self.record.file.display(), error, "write the record of a release: an agent that is restarted takes NVML up again");
        }
        let done = supervisor.release().await;
        self.status.set_released(true);
        self.resume_after(time);
        tracing::info!(
            seconds = time.as_secs(),
            "NVML is released: until it is taken up again, no XID is heard and no GPU is looked at"
        );
        let said = format!(
            "NVML is released for {} s at most; the GPUs stay as they are for kubelet, and no XID is heard",
            time.as_secs()
        );
        match done {
            Ok(()) => Ok(said),
            Err(e) => Err(format!("{}; all the same {said}", chain(&e))),
        }
    }

    fn resume_after(&mut self, time: Duration) {
        let (status, record) = (Arc::clone(&self.status), self.record.clone());
        self.timer = Some(tokio::spawn(async move {
            tokio::time::sleep(time).await;
            tracing::warn!("NVML was not taken up again in time: it is now");
            if let Err(error) = resume(&status, &record).await {
                tracing::warn!(error, "NVML cannot be taken up again");
            }
        }));
    }

    fn stop_timer(&mut self) {
        if let Some(timer) = self.timer.take() {
            timer.abort();
        }
    }
}

async fn resume(status: &Status, record: &Record) -> Result<(), String> {
    record.remove();
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
