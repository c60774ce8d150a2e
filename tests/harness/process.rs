//! What the kernel says of a process: its memory, its descriptors, its threads; and children whose output is read while
//! they run.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holds {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory in KiB.
    pub resident: usize,
}

impl Holds {
    /// Of a process that runs.
    ///
    /// # Errors
    /// It does not.
    pub fn of(pid: u32) -> Result<Holds> {
        let count = |dir: &str| -> Result<usize> {
            let dir = format!("/proc/{pid}/{dir}");
            Ok(std::fs::read_dir(&dir).context(dir)?.count())
        };
        Ok(Holds {
            descriptors: count("fd")?,
            threads: count("task")?,
            resident: status_kib(pid, "VmRSS:")?,
        })
    }
}

/// From now on [`peak`] counts anew.
///
/// # Errors
/// The process does not run.
pub fn forget_peak(pid: u32) -> Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").with_context(|| format!("process {pid}"))
}

/// The most resident memory a process has had since [`forget_peak`], in KiB.
///
/// # Errors
/// The process does not run.
pub fn peak(pid: u32) -> Result<usize> {
    status_kib(pid, "VmHWM:")
}

fn status_kib(pid: u32, field: &str) -> Result<usize> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    Ok(number
        .with_context(|| format!("no {field} of process {pid}"))?
        .parse()?)
}

/// What one stream of a child has said so far.
#[derive(Default)]
struct Said {
    bytes: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

/// A program that runs beside the test. Killed when dropped.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    out: Arc<Said>,
    err: Arc<Said>,
}

impl Running {
    /// Starts it with all three streams held by the test.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start(c: &mut Command) -> Result<Running> {
        let mut child = c
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {c:?}"))?;
        let out = collect(child.stdout.take().expect("piped"));
        let err = collect(child.stderr.take().expect("piped"));
        let stdin = child.stdin.take();
        Ok(Running {
            child,
            stdin,
            out,
            err,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its stdin.
    ///
    /// # Errors
    /// It reads no more, or its stdin was closed.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its stdin was closed")?;
        stdin.write_all(bytes.as_ref())?;
        Ok(stdin.flush()?)
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        text(&self.out)
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        text(&self.err)
    }

    /// Waits until its stdout contains `what`.
    ///
    /// # Errors
    /// It has not within `limit`, or has ended.
    pub fn until(&self, what: &str, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut said = self.out.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if String::from_utf8_lossy(&said.0).contains(what) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if said.1 || left.is_zero() {
                let so_far = String::from_utf8_lossy(&said.0).into_owned();
                drop(said);
                bail!(
                    "no {what:?} in its stdout:\n{so_far}\n--- stderr\n{}",
                    self.stderr()
                );
            }
            said = self
                .out
                .more
                .wait_timeout(said, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for its end; its exit code, 128 + signal when a signal ended it.
    ///
    /// # Errors
    /// It has not ended within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt;
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                for said in [&self.out, &self.err] {
                    let lock = said.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                    let ended = said
                        .more
                        .wait_timeout_while(lock, Duration::from_secs(5), |said| !said.1);
                    drop(ended);
                }
                return Ok(status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
            }
            if began.elapsed() > limit {
                bail!(
                    "it has not ended within {limit:?}\n--- stdout\n{}\n--- stderr\n{}",
                    self.stdout(),
                    self.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It could not be signalled.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(said: &Said) -> String {
    let said = said.bytes.lock().unwrap_or_else(PoisonError::into_inner);
    String::from_utf8_lossy(&said.0).into_owned()
}

fn collect(mut from: impl Read + Send + 'static) -> Arc<Said> {
    let said = Arc::new(Said::default());
    let to = said.clone();
    std::thread::spawn(move || {
        let mut chunk = [0; 16 << 10];
        loop {
            let count = from.read(&mut chunk).unwrap_or(0);
            let mut said = to.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            said.0.extend_from_slice(&chunk[..count]);
            said.1 = count == 0;
            to.more.notify_all();
            if count == 0 {
                return;
            }
        }
    });
    said
}
