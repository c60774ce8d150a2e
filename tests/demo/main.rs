//! `make run`: the main job before your eyes. A Dockerfile becomes an image in the node's store and runs as a pod.
//!
//! Uses the programs as a person and kubelet would: `slipway build`, then slipwayd over the CRI. Everything lives in
//! one directory; at the end the host is compared with what it was before, and the demo fails if anything stayed.
#![forbid(unsafe_code)]

mod host;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(work) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: demo DIRECTORY (make run calls it)");
        return ExitCode::from(2);
    };
    let before = host::Picture::take();
    let told = tokio::select! {
        r = story::tell(&work) => r,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    let cleaned = story::tear_down(&work).await;
    let clean = story::prove_clean(&work, &before);
    for outcome in [told, cleaned, clean] {
        if let Err(e) = outcome {
            eprintln!("\nmake run failed: {e:#}");
            return ExitCode::FAILURE;
        }
    }
    println!("\nThat was all of it. Next: `make test`, or README.md for using it on a node.");
    ExitCode::SUCCESS
}
