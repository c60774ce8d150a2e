//! `kubectl logs -f`, read while it runs.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kube::Kube;

/// A line, and when it was seen after the follower's start.
type Line = (String, Duration);

/// A log that is being followed; the follower is ended when this is dropped.
pub struct Followed {
    child: Child,
    seen: Arc<Mutex<Vec<Line>>>,
    reader: Option<JoinHandle<()>>,
}

impl Followed {
    /// That of the pod's first container.
    pub fn of(k: &Kube, pod: &str) -> Result<Followed> {
        let mut child = k
            .command(&["logs", "-f", pod])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let out = BufReader::new(child.stdout.take().context("piped")?);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (began, into) = (Instant::now(), seen.clone());
        let reader = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                into.lock()
                    .expect("nobody panics holding it")
                    .push((line, began.elapsed()));
            }
        });
        Ok(Followed {
            child,
            seen,
            reader: Some(reader),
        })
    }

    fn so_far(&self) -> Vec<Line> {
        self.seen.lock().expect("nobody panics holding it").clone()
    }

    /// Waits until a line contains `what`.
    pub async fn until(&self, what: &str, limit: Duration) -> Result<()> {
        let began = Instant::now();
        while !self.so_far().iter().any(|(l, _)| l.contains(what)) {
            if began.elapsed() > limit {
                bail!("{what:?} is not seen within {limit:?} in {:?}", self.so_far());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Every line, once the container has ended and with it the follower.
    pub fn lines(mut self) -> Result<Vec<Line>> {
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("kubectl logs -f goes on after its container: {:?}", self.so_far());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if let Some(r) = self.reader.take() {
            let _ = r.join();
        }
        Ok(self.so_far())
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
