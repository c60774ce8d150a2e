//! Failpoints: places at which a test can make slipwayd die, err or wait. Always compiled, one atomic load when off.
//!
//! `SLIPWAY_FAILPOINTS="run_pod_sandbox.after_cni=kill;create_container.after_snapshot=error*1"`: entries are divided by
//! `;` or `,`, an action is `kill` (SIGKILL to ourselves), `error`, or `sleep:<ms>`; `*<n>` limits it to the first n
//! passes. Names are `<verb>.<step>` and stand in [`ALL`], which `slipwayd failpoints` prints; a name that is not there is
//! refused.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// The environment variable that turns failpoints on.
pub const VARIABLE: &str = "SLIPWAY_FAILPOINTS";

/// Every point, in the order in which a pod's life passes them.
pub const ALL: &[&str] = &[
    "pull_image.before_pull",
    "pull_image.after_manifest",
    "pull_image.before_commit",
    "pull_image.after_pull",
    "run_pod_sandbox.after_intent",
    "run_pod_sandbox.after_directory",
    "run_pod_sandbox.after_shim",
    "run_pod_sandbox.after_namespaces",
    "run_pod_sandbox.before_cni",
    "run_pod_sandbox.after_cni",
    "run_pod_sandbox.after_files",
    "run_pod_sandbox.after_record",
    "create_container.after_intent",
    "create_container.after_snapshot",
    "create_container.after_mount",
    "create_container.after_bundle",
    "create_container.after_create",
    "create_container.after_record",
    "start_container.before_start",
    "start_container.answer",
    "start_container.after_start",
    "start_container.after_record",
    "update_container_resources.after_record",
    "update_container_resources.after_apply",
    "fail_container.after_record",
    "fail_container.after_kill",
    "container_stats.count_layer",
    "stop_pod_sandbox.after_intent",
    "stop_pod_sandbox.after_kill",
    "stop_pod_sandbox.after_cni_del",
    "stop_pod_sandbox.after_release",
    "stop_pod_sandbox.after_shutdown",
    "stop_pod_sandbox.after_record",
    "remove_pod_sandbox.after_intent",
    "remove_pod_sandbox.after_containers",
    "remove_pod_sandbox.after_files",
    "remove_pod_sandbox.after_record",
    "recover.follow",
];

static ON: AtomicBool = AtomicBool::new(false);
static POINTS: OnceLock<Mutex<HashMap<String, Point>>> = OnceLock::new();

/// A failpoint said so.
#[derive(Debug, Clone, thiserror::Error)]
#[error("failpoint {name} is set to fail")]
pub struct Injected {
    pub name: &'static str,
}

/// The variable's text is not a list of failpoints.
#[derive(Debug, thiserror::Error)]
#[error(
    "{VARIABLE}: {entry:?} is not name=kill, name=error or name=sleep:MS, perhaps followed by *COUNT, with a name that \
     `slipwayd failpoints` lists"
)]
pub struct ParseError {
    entry: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Kill,
    Error,
    Sleep(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Point {
    action: Action,
    left: Option<u32>,
}

/// Reads the environment once, at start.
pub fn init_from_env() -> Result<(), ParseError> {
    let Ok(text) = std::env::var(VARIABLE) else {
        return Ok(());
    };
    let points = parse(&text)?;
    tracing::warn!(?points, "failpoints are on");
    let _ = POINTS.set(Mutex::new(points));
    ON.store(true, Ordering::Release);
    Ok(())
}

/// A place where a test may interfere.
///
/// # Errors
/// When the point's action is `error`.
pub async fn point(name: &'static str) -> Result<(), Injected> {
    if !ON.load(Ordering::Acquire) {
        return Ok(());
    }
    match hit(name) {
        None => Ok(()),
        Some(Action::Sleep(time)) => {
            tokio::time::sleep(time).await;
            Ok(())
        }
        Some(Action::Error) => Err(Injected { name }),
        Some(Action::Kill) => die(name),
    }
}

/// As [`point`], for code that runs on a blocking thread.
pub fn blocking_point(name: &'static str) -> Result<(), Injected> {
    if !ON.load(Ordering::Acquire) {
        return Ok(());
    }
    match hit(name) {
        None => Ok(()),
        Some(Action::Sleep(time)) => {
            std::thread::sleep(time);
            Ok(())
        }
        Some(Action::Error) => Err(Injected { name }),
        Some(Action::Kill) => die(name),
    }
}

/// What happens at this pass, counting it.
fn hit(name: &'static str) -> Option<Action> {
    debug_assert!(ALL.contains(&name), "{name} is missing from fail::ALL");
    tracing::debug!(name, "failpoint passed");
    let mut points = POINTS.get()?.lock().unwrap_or_else(PoisonError::into_inner);
    let point = points.get_mut(name)?;
    match &mut point.left {
        Some(0) => None,
        Some(left) => {
            *left -= 1;
            Some(point.action)
        }
        None => Some(point.action),
    }
}

/// As `kill -9` would: no destructor, no flush, no graceful anything.
fn die(name: &str) -> ! {
    eprintln!("slipwayd: failpoint {name}: killing myself");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    loop {
        std::thread::park();
    }
}

fn parse(text: &str) -> Result<HashMap<String, Point>, ParseError> {
    text.split([';', ','])
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .map(|entry| {
            parse_entry(entry).ok_or_else(|| ParseError {
                entry: entry.to_owned(),
            })
        })
        .collect()
}

fn parse_entry(entry: &str) -> Option<(String, Point)> {
    let (name, rest) = entry.split_once('=')?;
    let (action, left) = match rest.split_once('*') {
        Some((action, count)) => (action, Some(count.parse().ok()?)),
        None => (rest, None),
    };
    let action = match action {
        "kill" => Action::Kill,
        "error" => Action::Error,
        other => Action::Sleep(Duration::from_millis(other.strip_prefix("sleep:")?.parse().ok()?)),
    };
    ALL.contains(&name)
        .then(|| (name.to_owned(), Point { action, left }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_name_a_point_an_action_and_perhaps_a_count() {
        let text = "run_pod_sandbox.after_cni=kill; pull_image.after_pull=sleep:20*3,start_container.after_start=error";
        let points = parse(text).unwrap();
        assert_eq!(
            points["run_pod_sandbox.after_cni"],
            Point {
                action: Action::Kill,
                left: None
            }
        );
        let slow = Point {
            action: Action::Sleep(Duration::from_millis(20)),
            left: Some(3),
        };
        assert_eq!(points["pull_image.after_pull"], slow);
        assert_eq!(points["start_container.after_start"].action, Action::Error);
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn a_misspelt_entry_is_named() {
        let name = "run_pod_sandbox.after_cni";
        let bad = [
            name.to_owned(),
            format!("{name}=explode"),
            format!("{name}=sleep:x"),
            format!("{name}=error*many"),
        ];
        for text in bad
            .into_iter()
            .chain(["=kill".to_owned(), "no_such_verb.step=kill".to_owned()])
        {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_point_does_nothing_when_failpoints_are_off() {
        point("run_pod_sandbox.after_cni").await.unwrap();
    }
}
