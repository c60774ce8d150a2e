//! Running one plugin once: its environment, its input, its bounded output, its deadline.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::error::PluginError;

/// Most standard output that is taken; results have a few hundred bytes.
const MAX_STDOUT: usize = 1 << 20;

/// How much of standard error is kept, for error messages.
const KEPT_STDERR: usize = 4 << 10;

/// How long a dead plugin's descendants may keep its pipes open.
const STRAGGLERS: Duration = Duration::from_millis(500);

/// One call of a plugin.
pub(crate) struct Call<'a> {
    pub(crate) program: &'a Path,
    pub(crate) command: &'static str,
    /// CNI_* but CNI_COMMAND.
    pub(crate) env: Vec<(&'static str, String)>,
    pub(crate) stdin: Vec<u8>,
    pub(crate) deadline: Duration,
}

/// Runs the plugin and returns what it wrote to standard output.
///
/// Its environment is the call's and PATH, nothing else. Past the deadline, or when this future is
/// dropped, it and whatever it started in its process group are killed.
pub(crate) async fn run(call: Call<'_>) -> Result<Vec<u8>, PluginError> {
    let failed = |source: io::Error| PluginError::Run {
        program: call.program.to_owned(),
        source,
    };
    let child = Command::new(call.program)
        .env_clear()
        .env("PATH", search_path())
        .env("CNI_COMMAND", call.command)
        .envs(call.env.iter().map(|(k, v)| (*k, v)))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    // It waits for its input still.
    if let Some(pid) = child.id() {
        slipway_sys::exec::give_usual_descriptors(pid);
    }
    let mut running = Running { child };
    let mut output = Output::default();
    match tokio::time::timeout(call.deadline, talk(&mut running.child, call.stdin, &mut output)).await {
        Ok(Ok(status)) => finish(status, output),
        Ok(Err(source)) => Err(failed(source)),
        Err(_elapsed) => {
            running.kill_group();
            // Killed: its exit is only a matter of being collected.
            let _ = tokio::time::timeout(Duration::from_secs(5), running.child.wait()).await;
            Err(PluginError::Timeout {
                after: call.deadline,
                stderr: output.stderr_text(),
            })
        }
    }
}

/// A plugin that may be running. Dropped while it is (the caller's future was), its process group
/// is killed.
struct Running {
    child: Child,
}

impl Running {
    /// Kills the plugin and what it started, unless it has been collected (its id may be another
    /// process's by then).
    fn kill_group(&self) {
        let pid = self
            .child
            .id()
            .and_then(|p| rustix::process::Pid::from_raw(i32::try_from(p).ok()?));
        if let Some(pid) = pid {
            // Failing means that it has just died by itself.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group();
    }
}

#[derive(Default)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    too_much: bool,
}

impl Output {
    fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().replace('\n', "; ")
    }
}

/// Writes the input, collects the output, and sees the plugin's end.
async fn talk(child: &mut Child, input: Vec<u8>, output: &mut Output) -> io::Result<ExitStatus> {
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A plugin that ends without reading (VERSION) is no error.
            let _ = stdin.write_all(&input).await;
        }
    };
    let Output {
        stdout: out,
        stderr: err,
        too_much,
    } = output;
    let read = async {
        tokio::join!(
            write,
            collect(stdout, out, MAX_STDOUT, Some(too_much)),
            keep_tail(stderr, err)
        );
    };
    tokio::pin!(read);
    let status = tokio::select! {
        status = child.wait() => status?,
        () = &mut read => return child.wait().await,
    };
    // What it wrote before its end is in the pipes; what its descendants hold open is not waited for.
    let _ = tokio::time::timeout(STRAGGLERS, read).await;
    Ok(status)
}

async fn collect(
    from: Option<impl AsyncRead + Unpin>,
    into: &mut Vec<u8>,
    limit: usize,
    full: Option<&mut bool>,
) {
    let Some(mut from) = from else { return };
    let mut buffer = [0u8; 8192];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if into.len() + n > limit {
            if let Some(full) = full {
                *full = true;
            }
            return;
        }
        into.extend_from_slice(&buffer[..n]);
    }
}

async fn keep_tail(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0u8; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        into.extend_from_slice(&buffer[..n]);
        if into.len() > KEPT_STDERR {
            into.drain(..into.len() - KEPT_STDERR);
        }
    }
}

/// PATH of this process: plugins call iptables and the like. Nothing else of the environment goes.
fn search_path() -> std::ffi::OsString {
    std::env::var_os("PATH")
        .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into())
}

fn finish(status: ExitStatus, output: Output) -> Result<Vec<u8>, PluginError> {
    if output.too_much {
        return Err(PluginError::TooMuchOutput { limit: MAX_STDOUT });
    }
    if status.success() {
        return Ok(output.stdout);
    }
    // The specification says standard error; every plugin built on its library writes to standard output.
    let answer = [&output.stdout, &output.stderr]
        .into_iter()
        .find_map(|b| serde_json::from_slice::<Answer>(b).ok());
    match answer {
        Some(a) if !(a.msg.is_empty() && a.details.is_empty() && a.code == 0) => Err(PluginError::Answer {
            code: a.code,
            msg: a.msg,
            details: a.details,
        }),
        _ => {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(signal)) => format!("killed by signal {signal}"),
                (None, None) => "ended".to_owned(),
            };
            Err(PluginError::Failed {
                status: how,
                stderr: output.stderr_text(),
            })
        }
    }
}

/// An error of the protocol.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// Finds a plugin's binary.
pub(crate) fn find(kind: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    dirs.iter().map(|d| d.join(kind)).find(|p| p.is_file())
}
