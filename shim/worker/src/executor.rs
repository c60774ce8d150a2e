//! The end of the container's init's way, in our hands: confined by the code that confines an exec, then executed.
//!
//! libcontainer calls `validate` when all namespaces and mounts are there and the user is changed, before it says that the
//! container is created; then `setup_envs`, which does nothing here; and `exec` after the start.

use crate::report::Report;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use slipway_sys::exec::Confinement;
use std::collections::HashMap;
use std::rc::Rc;

/// What libcontainer's error text begins with when it is one of ours: the rest is `code` and the error.
pub const MARK: &str = "slipway-exec-error";

/// Confines and executes.
#[derive(Clone)]
pub struct Confined {
    confinement: Rc<Confinement>,
    report: Rc<Report>,
}

impl Confined {
    /// `report` is kept until the exec.
    pub fn new(confinement: Confinement, report: Report) -> Confined {
        Confined {
            confinement: Rc::new(confinement),
            report: Rc::new(report),
        }
    }
}

impl Executor for Confined {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.confinement.enter().map_err(|e| {
            // libcontainer passes errors between its processes as text, so the code travels in it.
            let code = e.exit_code().unwrap_or(0);
            ExecutorValidationError::ArgValidationError(format!("{MARK} {code} {}", crate::report::chain(&e)))
        })
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let error = self.confinement.replace();
        let _ = self.report.not_executed(&error);
        // Nobody hears libcontainer any more: the exit code says it as a shell's would.
        std::process::exit(i32::try_from(error.exit_code().unwrap_or(126)).unwrap_or(126))
    }
}

/// Finds an error of ours in libcontainer's text.
pub fn parse_mark(text: &str) -> Option<(Option<u32>, &str)> {
    let (_, rest) = text.split_once(MARK)?;
    let (code, error) = rest.trim_start().split_once(' ')?;
    let code: u32 = code.parse().ok()?;
    Some(((code != 0).then_some(code), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_errors_are_found_in_what_libcontainer_makes_of_them() {
        let text = format!("failed to create container: {MARK} 127 no such program in the container: x");
        assert_eq!(
            parse_mark(&text),
            Some((Some(127), "no such program in the container: x"))
        );
        assert_eq!(parse_mark(&format!("{MARK} 0 a: b")), Some((None, "a: b")));
        assert_eq!(parse_mark("something else"), None);
    }
}
