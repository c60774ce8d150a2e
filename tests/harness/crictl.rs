//! The real crictl, pointed at an instance.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::cmd::{self, Output};
use crate::{Daemon, lab};

/// Runs crictl against one slipwayd.
#[derive(Debug, Clone)]
pub struct Crictl {
    socket: PathBuf,
}

impl Crictl {
    /// For this instance.
    #[must_use]
    pub fn of(daemon: &Daemon) -> Crictl {
        Crictl {
            socket: daemon.socket(),
        }
    }

    /// A crictl command; its stdin is empty unless it is given one.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut c = cmd::command(lab::tool("crictl"), [] as [&str; 0]);
        let endpoint = format!("unix://{}", self.socket.display());
        c.args([
            "--config",
            "/dev/null",
            "--timeout",
            "30s",
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
        ]);
        c.args(args);
        c
    }

    /// The same, on a terminal of `columns` × `rows`: what is written to its stdin is typed.
    pub fn on_terminal(&self, args: &[&str], columns: u16, rows: u16) -> Command {
        let quoted = |word: &OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
        let inner = self.command(args);
        let mut line = format!(
            "stty cols {columns} rows {rows}; exec {}",
            quoted(inner.get_program())
        );
        for word in inner.get_args() {
            line.push(' ');
            line.push_str(&quoted(word));
        }
        cmd::command("script", ["-qefc", &line, "/dev/null"])
    }

    /// Runs it for at most a minute.
    ///
    /// # Errors
    /// It could not be started, or ran for longer.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        cmd::run(&mut self.command(args), Duration::from_secs(60))
    }
}
