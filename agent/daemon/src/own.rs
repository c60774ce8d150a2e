//! Which file this program is. An upgrade puts another in its place while it runs, by rename: Linux says of the one that runs that
//! it is deleted then, and under its name is the next version.

use std::path::PathBuf;

/// The very file that runs, for starting it once more: what lies under its name may be of another version by now.
pub const ITSELF: &str = "/proc/self/exe";

/// What Linux puts behind the name of a file that is not there any more (proc(5), /proc/pid/exe).
const DELETED: &str = " (deleted)";

/// The path under which this program was started, for others to start what is there: to be found out once, at the start.
pub fn path() -> PathBuf {
    named(std::env::current_exe().unwrap_or_else(|_| "/usr/local/bin/slipway-agent".into()))
}

/// The name without what Linux has put behind it.
fn named(path: PathBuf) -> PathBuf {
    match path.to_str().and_then(|p| p.strip_suffix(DELETED)) {
        Some(name) if !path.exists() => name.into(),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_replaced_keeps_its_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("slipway-agent");
        let deleted = dir.path().join("slipway-agent (deleted)");
        assert_eq!(named(path.clone()), path);
        assert_eq!(named(deleted.clone()), path);
        std::fs::write(&deleted, "").expect("written");
        assert_eq!(named(deleted.clone()), deleted, "a strange name, but its own");
    }
}
