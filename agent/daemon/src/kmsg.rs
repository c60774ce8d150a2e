//! The kernel's log, for what NVML does not tell of an XID: the process that was at it.
//!
//! ```text
//! <6>… NVRM: Xid (PCI:0000:19:00): 31, pid=4711, name=python3, Ch 00000008, …
//! ```

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, SeekFrom};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::Instant;

/// XIDs that are remembered.
const MAX: usize = 64;
/// How old one may be when NVML tells of it.
const OLD: Duration = Duration::from_secs(5);
/// Longest record of the kernel's.
const RECORD: usize = 8192;

/// What the kernel's log says of an XID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// `0000:19:00`.
    pub pci: String,
    /// Its number.
    pub xid: u64,
    /// The process, on the host; none: not known to the driver either.
    pub pid: Option<u32>,
    /// Its name.
    pub name: Option<String>,
}

/// The XID that a record tells of, if it does.
pub fn parse(record: &str) -> Option<Line> {
    let rest = record.split_once("NVRM: Xid (PCI:")?.1;
    let (pci, rest) = rest.split_once("): ")?;
    let mut parts = rest.split(',').map(str::trim);
    let xid = parts.next()?.parse().ok()?;
    let value = |key: &str| {
        let mut parts = rest.split(',').map(str::trim);
        let value = parts.find_map(|p| p.strip_prefix(key))?.trim_matches('\'');
        (!value.is_empty() && value != "<unknown>").then(|| value.to_owned())
    };
    Some(Line {
        pci: pci.to_owned(),
        xid,
        pid: value("pid=").and_then(|p| p.parse().ok()),
        name: value("name="),
    })
}

/// The XIDs of the last moments.
#[derive(Debug, Clone)]
pub struct Log {
    lines: Arc<Mutex<VecDeque<(Instant, Line)>>>,
    changed: watch::Receiver<()>,
}

impl Log {
    /// Follows the log from its end on. What cannot be read is told once, and nothing comes of it.
    pub fn follow(path: &Path) -> Log {
        let lines = Arc::<Mutex<VecDeque<_>>>::default();
        let (to, changed) = watch::channel(());
        match open(path) {
            Ok(kernel) => {
                tokio::spawn(read(kernel, Arc::clone(&lines), to));
            }
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(file = %path.display(), error, "the kernel's log cannot be read: XIDs are told without their process");
            }
        }
        Log { lines, changed }
    }

    /// What the log says of this XID of this GPU (`0000:19:00.0`), which NVML has just told; waits for it a little.
    pub async fn of(&self, pci: &str, xid: u64, patience: Duration) -> Option<Line> {
        let mut changed = self.changed.clone();
        let find = async {
            loop {
                changed.mark_unchanged();
                if let Some(line) = self.find(pci, xid) {
                    return Some(line);
                }
                changed.changed().await.ok()?;
            }
        };
        tokio::time::timeout(patience, find).await.ok().flatten()
    }

    fn find(&self, pci: &str, xid: u64) -> Option<Line> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = lines.iter().rev().take_while(|(at, _)| at.elapsed() < OLD);
        let mut same = recent.filter(|(_, l)| l.xid == xid && pci.starts_with(&l.pci));
        same.next().map(|(_, line)| line.clone())
    }
}

fn open(path: &Path) -> io::Result<pipe::Receiver> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    // What was said before is of another time. A pipe has no end to go to.
    let _ = rustix::fs::seek(&file, SeekFrom::End(0));
    // Not a pipe, but waited for and read like one.
    pipe::Receiver::from_owned_fd_unchecked(file)
}

async fn read(kernel: pipe::Receiver, lines: Arc<Mutex<VecDeque<(Instant, Line)>>>, to: watch::Sender<()>) {
    let mut buffer = vec![0; RECORD];
    loop {
        if kernel.readable().await.is_err() {
            return;
        }
        let read = match kernel.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => n,
            // EPIPE: the kernel has overwritten what comes next; it goes on behind that.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::BrokenPipe) => continue,
            Err(_) => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
        let mut kept = lines.lock().unwrap_or_else(PoisonError::into_inner);
        for line in text.lines().filter_map(parse) {
            kept.push_back((Instant::now(), line));
        }
        while kept.len() > MAX {
            kept.pop_front();
        }
        drop(kept);
        let _ = to.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_old_and_new_drivers_are_read_and_others_left_alone() {
        let line = |pid, name: Option<&str>, xid| {
            Some(Line {
                pci: "0000:19:00".into(),
                xid,
                pid,
                name: name.map(str::to_owned),
            })
        };
        let text = "4,1234,5678,-;NVRM: Xid (PCI:0000:19:00): 31, pid=4711, name=python3, Ch 00000008, intr";
        assert_eq!(parse(text), line(Some(4711), Some("python3"), 31));
        let text =
            "NVRM: Xid (PCI:0000:19:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.";
        assert_eq!(parse(text), line(None, None, 79));
        let text = "NVRM: Xid (PCI:0000:19:00): 48, pid='815', name='a b', DBE";
        assert_eq!(parse(text), line(Some(815), Some("a b"), 48));
        assert_eq!(parse("NVRM: loading NVIDIA UNIX Open Kernel Module"), None);
        assert_eq!(parse("NVRM: Xid (PCI:0000:19:00): many"), None);
    }
}
