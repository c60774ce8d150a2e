//! The program: the exit code. Everything else is the library's.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match slipway_agent::main() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("slipway-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
