//! Runs a program to its end with a deadline and keeps what it said.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a finished program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + signal when a signal ended it.
    pub code: i32,
    /// Standard output, as UTF-8 with replacements.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// Wall time.
    pub took: Duration,
}

impl Output {
    /// The output of a program that had to succeed.
    ///
    /// # Errors
    /// Its exit code and both streams, when it did not.
    pub fn ok(self) -> Result<Output> {
        if self.code != 0 {
            bail!(
                "exit code {}\n--- stdout\n{}\n--- stderr\n{}",
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self)
    }
}

/// A command with the program's arguments.
pub fn command<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Command {
    let mut c = Command::new(program);
    c.args(args).stdin(Stdio::null());
    c
}

/// Runs `c` for at most `limit`; past it the program is killed and an error says so.
///
/// # Errors
/// The program could not be started, or ran past the limit.
pub fn run(c: &mut Command, limit: Duration) -> Result<Output> {
    let what = format!("{c:?}");
    let began = Instant::now();
    let mut child = c
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {what}"))?;
    let (out, err) = (
        child.stdout.take().expect("piped"),
        child.stderr.take().expect("piped"),
    );
    let read = |mut r: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut v = Vec::new();
            let _ = r.read_to_end(&mut v);
            String::from_utf8_lossy(&v).into_owned()
        })
    };
    let (out, err) = (read(Box::new(out)), read(Box::new(err)));
    let status = loop {
        if let Some(s) = child.try_wait()? {
            break s;
        }
        if began.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            bail!(
                "{what} ran past {limit:?}\n{}\n{}",
                out.join().unwrap_or_default(),
                err.join().unwrap_or_default()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let took = began.elapsed();
    use std::os::unix::process::ExitStatusExt;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(Output {
        code,
        stdout: out.join().unwrap_or_default(),
        stderr: err.join().unwrap_or_default(),
        took,
    })
}

/// Runs a program that must succeed within a minute; its standard output.
///
/// # Errors
/// As [`run`], and a non-zero exit.
pub fn sh(line: &str) -> Result<String> {
    Ok(run(&mut command("sh", ["-c", line]), Duration::from_secs(60))?
        .ok()
        .with_context(|| line.to_owned())?
        .stdout)
}
