//! The child process that talks to NVML: one line of JSON a message, requests on stdin, answers and events on stdout.
//!
//! Requests are done one after another. Each GPU is watched by a thread of its own; all of them end with the process, which
//! ends with its stdin: whatever hangs in the driver, the parent is rid of it by closing a pipe and sending a signal, and a
//! parent that was killed leaves none that hangs.

use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

use crate::model::{Look, Sample, System};
use crate::nvml::{GpuEvent, Library};

/// The longest line that is understood; a thousand processes have some 100 KiB.
pub const MAX_LINE: usize = 4 << 20;

/// How long a request that is being done may take when stdin has ended.
const LAST: Duration = Duration::from_secs(1);

/// What the parent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// What the driver says of itself.
    System,
    /// What the GPU of this index is and whether it is well.
    Look(u32),
    /// Tell what happens to this GPU from now on.
    Watch(u32, String),
    /// What this GPU does.
    Sample(u32, String),
}

impl Ask {
    /// The index of the GPU that is asked.
    pub fn gpu(&self) -> Option<u32> {
        match self {
            Ask::System => None,
            Ask::Look(index) | Ask::Watch(index, _) | Ask::Sample(index, _) => Some(*index),
        }
    }
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Which answer belongs to it.
    pub id: u64,
    /// What.
    pub ask: Ask,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Ask::System`].
    System(System),
    /// To [`Ask::Look`].
    Look(Box<Look>),
    /// To [`Ask::Watch`].
    Watching,
    /// To [`Ask::Sample`].
    Sample(Box<Sample>),
    /// NVML cannot be loaded, or said this instead.
    Failed(String),
}

/// A line to the parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// An answer to the request of this number.
    Answer(u64, Answer),
    /// Something happened.
    Event(GpuEvent),
}

/// What the child process runs: serves until stdin ends. `library` is the path of libnvidia-ml, `sys` of /sys.
///
/// # Errors
/// stdin or stdout broke.
pub fn serve(library: &Path, sys: &Path) -> io::Result<()> {
    let mut served = Served {
        library: library.to_owned(),
        sys: sys.to_owned(),
        nvml: None,
    };
    for line in lines() {
        let request: Request = serde_json::from_str(&line?)?;
        let answer = served.answer(request.ask);
        say(&Line::Answer(request.id, answer))?;
    }
    Ok(())
}

/// The lines of stdin. Some time after its end the process is killed: whoever asks may hang in the driver.
fn lines() -> Receiver<io::Result<String>> {
    let (to, lines) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            // Nobody listens: the process is ending.
            let _ = to.send(line);
        }
        drop(to);
        std::thread::sleep(LAST);
        let _ = kill_process(getpid(), Signal::KILL);
    });
    lines
}

/// Whole lines, whoever says them.
fn say(line: &Line) -> io::Result<()> {
    static OUT: Mutex<()> = Mutex::new(());
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let _one = OUT.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

struct Served {
    library: PathBuf,
    sys: PathBuf,
    /// Once it is loaded: a driver that is not there yet is tried for again with the next request.
    nvml: Option<Arc<Library>>,
}

impl Served {
    fn answer(&mut self, ask: Ask) -> Answer {
        let nvml = match &self.nvml {
            Some(nvml) => Arc::clone(nvml),
            None => match Library::open(&self.library) {
                Ok(nvml) => Arc::clone(self.nvml.insert(Arc::new(nvml))),
                Err(e) => return Answer::Failed(format!("load {}: {e}", self.library.display())),
            },
        };
        match ask {
            Ask::System => match nvml.system() {
                Ok(system) => Answer::System(system),
                Err(e) => Answer::Failed(e.to_string()),
            },
            Ask::Look(index) => Answer::Look(Box::new(nvml.look(index, &self.sys))),
            Ask::Watch(index, uuid) => watch(nvml, index, uuid),
            Ask::Sample(index, uuid) => match nvml.sample(index, &uuid) {
                Ok(sample) => Answer::Sample(Box::new(sample)),
                Err(e) => Answer::Failed(e.to_string()),
            },
        }
    }
}

/// Answers when the GPU is watched: from then on nothing is missed.
fn watch(nvml: Arc<Library>, index: u32, uuid: String) -> Answer {
    let (to, ready) = std::sync::mpsc::channel();
    let work = move || {
        let tell = |begun: Result<(), _>| {
            drop(to.send(begun.map_err(|e: nvml_wrapper::error::NvmlError| e.to_string())))
        };
        nvml.watch(index, &uuid, tell, &|event| {
            // The parent is gone: the main thread sees it too.
            let _ = say(&Line::Event(event));
        });
    };
    let thread = std::thread::Builder::new()
        .name("watch".into())
        .stack_size(128 << 10);
    match thread.spawn(work).map_err(|e| e.to_string()) {
        Err(e) => Answer::Failed(format!("start a thread: {e}")),
        Ok(_) => match ready.recv() {
            Ok(Ok(())) => Answer::Watching,
            Ok(Err(e)) => Answer::Failed(e),
            Err(_) => Answer::Failed("the thread that was to watch ended".into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::EventKind;

    #[test]
    fn lines_are_what_the_other_side_reads() {
        for line in [
            Line::Answer(7, Answer::Failed("no".into())),
            Line::Answer(8, Answer::Watching),
            Line::Event(GpuEvent {
                uuid: "GPU-1".into(),
                kind: EventKind::Xid {
                    xid: 79,
                    instance: Some((1, 0)),
                    recovery: None,
                },
            }),
        ] {
            let text = serde_json::to_string(&line).expect("JSON");
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<Line>(&text).expect("a line"), line);
        }
    }
}
