//! An instance of slipwayd with a root, state and network of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cri::Cri;
use crate::lab::{self, Lab};

/// How an instance is started.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Environment beside the test's own (failpoints, …).
    pub env: Vec<(String, String)>,
    /// More arguments.
    pub args: Vec<String>,
    /// Lines for the end of its config file.
    pub config: String,
    /// Where the store is; `None`: root/ below the lab.
    pub root: Option<PathBuf>,
    /// No CNI configuration is written.
    pub no_network: bool,
    /// Another slipwayd than the one built.
    pub program: Option<PathBuf>,
}

/// A running slipwayd. Killed when dropped; [`Daemon::stop`] ends it as systemd would.
pub struct Daemon {
    child: Option<Child>,
    root: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts an instance below `lab` and waits until it answers Version.
    ///
    /// # Errors
    /// It did not come up within 20 seconds: its log is in the error.
    pub async fn start(lab: &Lab, setup: &Setup) -> Result<Daemon> {
        let cni = if setup.no_network {
            std::fs::create_dir_all(lab.join("cni"))?;
            lab.join("cni")
        } else {
            lab.write_cni_config()?
        };
        let root = setup.root.clone().unwrap_or_else(|| lab.join("root"));
        let (state, log) = (lab.join("state"), lab.join("slipwayd.log"));
        let config = lab.write("config.toml", &setup.config)?;
        let program = setup.program.clone().unwrap_or_else(|| lab::bin("slipwayd"));
        let out = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let child = std::process::Command::new(&program)
            .arg("--config")
            .arg(config)
            .arg("--root")
            .arg(&root)
            .arg("--state")
            .arg(&state)
            .arg("--socket")
            .arg(state.join("slipwayd.sock"))
            .args(if setup.args.iter().any(|a| a == "--log-level") {
                &[][..]
            } else {
                &["--log-level", "debug"][..]
            })
            .arg("--cni-conf-dir")
            .arg(cni)
            .arg("--cni-bin-dir")
            .arg(lab::cni_bin())
            .args(&setup.args)
            .envs(setup.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting {} (make build makes it)", program.display()))?;
        let mut d = Daemon {
            child: Some(child),
            root,
            state,
            log,
        };
        d.wait_ready().await?;
        Ok(d)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            if let Ok(c) = Cri::connect(&self.socket()).await {
                let r = slipway_cri_api::v1::VersionRequest { version: "v1".into() };
                if c.runtime.clone().version(r).await.is_ok() {
                    return Ok(());
                }
            }
            if let Some(child) = self.child.as_mut()
                && let Some(s) = child.try_wait()?
            {
                self.child = None;
                bail!("slipwayd ended with {s}:\n{}", self.log_tail());
            }
            if began.elapsed() > Duration::from_secs(20) {
                bail!("slipwayd does not answer:\n{}", self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.state.join("slipwayd.sock")
    }

    /// The store's root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// A client.
    ///
    /// # Errors
    /// It does not listen.
    pub async fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket()).await
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Its whole log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has logged a line with all of these.
    ///
    /// # Errors
    /// It has not within 20 seconds.
    pub async fn until_logged(&self, words: &[&str]) -> Result<()> {
        let began = Instant::now();
        while !self.log().lines().any(|l| words.iter().all(|w| l.contains(w))) {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("slipwayd does not log {words:?}:\n{}", self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// SIGKILL, as a crash would.
    ///
    /// # Errors
    /// It could not be signalled.
    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut c) = self.child.take() {
            c.kill()?;
            c.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It does not end within 10 seconds.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut c) = self.child.take() else {
            return Ok(());
        };
        if let Some(pid) = rustix::process::Pid::from_raw(i32::try_from(c.id())?) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        let began = Instant::now();
        while c.try_wait()?.is_none() {
            if began.elapsed() > Duration::from_secs(10) {
                c.kill()?;
                c.wait()?;
                bail!(
                    "slipwayd did not end within 10 s of SIGTERM:\n{}",
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits until it has ended by itself (a failpoint, say).
    ///
    /// # Errors
    /// It has not within `limit`.
    pub async fn wait_end(&mut self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        while let Some(c) = self.child.as_mut() {
            if c.try_wait()?.is_some() {
                self.child = None;
                break;
            }
            if began.elapsed() > limit {
                bail!("slipwayd is still running after {limit:?}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Removes every pod and container, stops the instance: what a test ends with before [`Lab::finish`].
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn drain(&mut self) -> Result<()> {
        let c = self.cri().await?;
        for p in c.pods().await? {
            c.remove_pod(&p.id).await.with_context(|| self.log_tail())?;
        }
        let left = c.containers().await?;
        if !left.is_empty() {
            bail!("containers left after their pods were removed: {left:?}");
        }
        self.stop()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut c) = self.child.take() {
            let _ = c.kill();
            let _ = c.wait();
        }
        // A failed test must not leave its shims and mounts to the next one.
        if std::thread::panicking() {
            eprintln!("--- slipwayd's log\n{}", self.log_tail());
        }
    }
}
