//! Processes that outlive the program that starts them: a pid file with the start time, a log, and an end that is sure.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Named processes whose pid files and logs lie below one directory.
#[derive(Debug, Clone)]
pub struct Processes {
    dir: PathBuf,
}

impl Processes {
    /// Those of `dir`.
    pub fn of(dir: &Path) -> Processes {
        Processes { dir: dir.to_owned() }
    }

    /// Where the process `name` writes what it says.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(name)
    }

    /// Starts `command` in a session of its own, its output appended to the log of `name`.
    ///
    /// # Errors
    /// It could not be started, or one of that name runs.
    pub fn start(&self, name: &str, command: &Command) -> Result<()> {
        if self.alive(name) {
            bail!("{name} of {} runs already", self.dir.display());
        }
        for d in ["log", "pid"] {
            std::fs::create_dir_all(self.dir.join(d))?;
        }
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(name))?;
        // setsid becomes the program itself: the pid stays.
        let mut c = Command::new("setsid");
        c.arg(command.get_program()).args(command.get_args());
        for (k, v) in command.get_envs() {
            match v {
                Some(v) => c.env(k, v),
                None => c.env_remove(k),
            };
        }
        if let Some(d) = command.get_current_dir() {
            c.current_dir(d);
        }
        let child = c
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let pid = child.id();
        let started = stat(pid).map(|s| s.started).unwrap_or_default();
        std::fs::write(self.dir.join("pid").join(name), format!("{pid} {started}"))?;
        Ok(())
    }

    /// The pid of `name` while it runs.
    pub fn pid(&self, name: &str) -> Option<u32> {
        let text = std::fs::read_to_string(self.dir.join("pid").join(name)).ok()?;
        let (pid, started) = text.split_once(' ')?;
        let pid = pid.parse().ok()?;
        // A zombie has ended, though whoever started it has not looked, unless it is a first thread whose others still have
        // its locks and sockets; another start time is another process.
        let s = stat(pid)?;
        (s.started == started && (s.state != "Z" || s.threads > 1)).then_some(pid)
    }

    /// Whether it runs.
    pub fn alive(&self, name: &str) -> bool {
        self.pid(name).is_some()
    }

    /// Sends a signal to it, where it runs.
    pub fn signal(&self, name: &str, signal: Signal) {
        if let Some(pid) = self.pid(name).and_then(|p| Pid::from_raw(p.cast_signed())) {
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGTERM, after `grace` SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// It survives SIGKILL for ten seconds.
    pub fn end(&self, name: &str, grace: Duration) -> Result<()> {
        let began = Instant::now();
        self.signal(name, Signal::TERM);
        let mut killed = false;
        while self.alive(name) {
            if !killed && began.elapsed() > grace {
                killed = true;
                self.signal(name, Signal::KILL);
            }
            if began.elapsed() > grace + Duration::from_secs(10) {
                bail!("{name} of {} does not end", self.dir.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = std::fs::remove_file(self.dir.join("pid").join(name));
        Ok(())
    }

    /// The last lines it said.
    pub fn tail(&self, name: &str, lines: usize) -> String {
        let text = std::fs::read_to_string(self.log(name)).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

struct Stat {
    state: String,
    threads: usize,
    started: String,
}

/// Fields 3, 20 and 22 of /proc/PID/stat (proc_pid_stat(5)).
fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = text.rsplit_once(')')?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        state: (*fields.first()?).to_owned(),
        threads: fields.get(17)?.parse().ok()?,
        started: (*fields.get(19)?).to_owned(),
    })
}
