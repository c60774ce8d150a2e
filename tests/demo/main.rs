//! `make run`: the main job before your eyes. A Dockerfile becomes an image in the node's store and runs as a pod.
//!
//! Uses the programs as a person and kubelet would: `slipway build`, then slipwayd over the CRI. Everything lives in
//! one directory and under names of the demo's own; at the end the host is searched for them, and the demo fails if
//! anything stayed.
#![forbid(unsafe_code)]

mod host;
mod screen;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(work) = std::env::args_os().nth(1).map(PathBuf::from) else {
        screen::error("usage: demo DIRECTORY (make run calls it)");
        return ExitCode::from(2);
    };
    let began = Instant::now();
    let told = tokio::select! {
        r = story::tell(&work) => r,
        r = interruption() => r.and_then(|signal| Err(anyhow::anyhow!("interrupted by {signal}"))),
    };
    let cleaned = story::tear_down(&work).await;
    let clean = story::prove_clean(&work);
    let failures: Vec<_> = [told, cleaned, clean]
        .into_iter()
        .filter_map(Result::err)
        .collect();
    for e in &failures {
        screen::error(&format!("\nmake run failed: {e:#}"));
    }
    if !failures.is_empty() {
        return ExitCode::FAILURE;
    }
    screen::line(&format!(
        "\nFrom Dockerfile to a trained model and back to a clean machine in {:.1} s.",
        began.elapsed().as_secs_f64()
    ));
    screen::line("\nThat was all of it. Next: `make test`, or README.md for using it on a node.");
    ExitCode::SUCCESS
}

/// Waits for a signal that asks for the end, also that of a terminal which hangs up; its name.
async fn interruption() -> Result<&'static str> {
    let heard = |kind| signal(kind).context("listening for signals");
    let mut interrupt = heard(SignalKind::interrupt())?;
    let mut terminate = heard(SignalKind::terminate())?;
    let mut hangup = heard(SignalKind::hangup())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
    })
}
