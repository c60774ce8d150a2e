//! The program: flags, the async runtime's size, the exit code. Everything else is the library's.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match slipwayd::main() {
        Ok(code) => code,
        Err(error) => {
            // One line a cause: this is what an operator reads when the unit fails to start.
            eprintln!("slipwayd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
