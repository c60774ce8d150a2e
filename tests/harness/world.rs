//! A whole small world for one test: a corner of the machine, a busybox image in the store, slipwayd on it, a client.

use anyhow::{Context, Result};

use crate::cri::Cri;
use crate::daemon::{Daemon, Setup};
use crate::lab::Lab;
use crate::{image, v1};

/// What most tests start from. End it with [`World::finish`], which proves that nothing is left.
pub struct World {
    /// The corner.
    pub lab: Lab,
    /// The instance.
    pub daemon: Daemon,
    /// A client of it.
    pub cri: Cri,
}

impl World {
    /// With a busybox image ([`image::BUSYBOX`]) and the pod network.
    ///
    /// # Errors
    /// The image could not be built or slipwayd did not start.
    pub async fn new(what: &str) -> Result<World> {
        World::with(what, &Setup::default()).await
    }

    /// The same, with slipwayd started as `setup` says.
    ///
    /// # Errors
    /// As [`World::new`].
    pub async fn with(what: &str, setup: &Setup) -> Result<World> {
        let lab = Lab::new(what)?;
        image::busybox(&lab)?;
        let daemon = Daemon::start(&lab, setup).await?;
        let cri = daemon.cri().await?;
        Ok(World { lab, daemon, cri })
    }

    /// The same, with CDI folders of its own: `cdi-static` and, of higher priority, `cdi-dynamic` below the lab.
    ///
    /// # Errors
    /// As [`World::new`].
    pub async fn with_cdi(what: &str) -> Result<World> {
        let lab = Lab::new(what)?;
        let dirs = ["cdi-static", "cdi-dynamic"].map(|d| lab.join(d));
        for dir in &dirs {
            std::fs::create_dir_all(dir)?;
        }
        image::busybox(&lab)?;
        let setup = Setup {
            config: format!("[cdi]\nspec_dirs = {:?}\n", dirs.map(|d| d.display().to_string())),
            ..Setup::default()
        };
        let daemon = Daemon::start(&lab, &setup).await?;
        let cri = daemon.cri().await?;
        Ok(World { lab, daemon, cri })
    }

    /// Starts slipwayd again on the same root and state, after a kill or a stop.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn restart(&mut self, setup: &Setup) -> Result<()> {
        self.daemon = Daemon::start(&self.lab, setup).await?;
        self.cri = self.daemon.cri().await?;
        Ok(())
    }

    /// A pod on the host's network with one running container; their ids.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn pod_with(&self, name: &str, container: v1::ContainerConfig) -> Result<(String, String)> {
        let config = crate::cri::pod_config(name, &self.lab, true);
        let pod = self.cri.run_pod(config.clone()).await?;
        let id = self.cri.run(&pod, container, config).await?;
        Ok((pod, id))
    }

    /// Runs `script` by busybox's shell in a pod of its own until it ends; exit code and log lines without their tags.
    ///
    /// # Errors
    /// As the runtime answers, or it ran for more than 30 seconds.
    pub async fn shell(
        &self,
        name: &str,
        change: impl FnOnce(&mut v1::ContainerConfig),
        script: &str,
    ) -> Result<(i32, Vec<String>)> {
        let mut c = crate::cri::container_config(name, image::BUSYBOX, &["sh", "-c", script]);
        change(&mut c);
        let (pod, id) = self.pod_with(name, c).await?;
        let s = self
            .cri
            .wait_exit(&id, std::time::Duration::from_secs(30))
            .await?;
        let lines = self.log(name)?;
        self.cri.remove_pod(&pod).await?;
        Ok((s.exit_code, lines.into_iter().map(|l| l.text).collect()))
    }

    /// The parsed CRI log of the container `name` in the pod `name` (as [`World::shell`] and `container_config` name it).
    ///
    /// # Errors
    /// It is not there, or a line of it is no CRI log line.
    pub fn log(&self, name: &str) -> Result<Vec<LogLine>> {
        read_log(&self.lab.join("logs").join(name).join(name).join("0.log"))
    }

    /// Removes every pod, stops slipwayd, and proves that nothing is left.
    ///
    /// # Errors
    /// Something is.
    pub async fn finish(mut self) -> Result<()> {
        self.daemon.drain().await?;
        let Self { lab, daemon, .. } = self;
        let log = daemon.log_tail();
        drop(daemon);
        lab.finish().with_context(|| log)
    }
}

/// A line of a CRI log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// RFC 3339 with nanoseconds.
    pub time: String,
    /// stdout or stderr.
    pub stream: String,
    /// Whether the line goes on in the next (`P`).
    pub partial: bool,
    /// What was written.
    pub text: String,
}

/// Reads a CRI log file.
///
/// # Errors
/// It is not there, or a line of it is no CRI log line.
pub fn read_log(path: &std::path::Path) -> Result<Vec<LogLine>> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .map(|l| {
            let mut f = l.splitn(4, ' ');
            let (time, stream, tag, text) = (f.next(), f.next(), f.next(), f.next());
            match (time, stream, tag, text) {
                (Some(t), Some(s @ ("stdout" | "stderr")), Some(g @ ("F" | "P")), Some(x))
                    if t.ends_with('Z') || t.contains('+') =>
                {
                    Ok(LogLine {
                        time: t.into(),
                        stream: s.into(),
                        partial: g == "P",
                        text: x.into(),
                    })
                }
                _ => Err(anyhow::anyhow!("{}: no CRI log line: {l:?}", path.display())),
            }
        })
        .collect()
}
