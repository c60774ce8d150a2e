//! Hooks of CDI files that are done here instead of by the program they name ([`slipway_hooks`]).
//!
//! A run of such hooks becomes one: this program's verb `native`, behind `hook` like any other, so that it has a time, no
//! environment, and its last words in the error. Hooks of others keep their place between them.

use libcontainer::oci_spec::runtime::Hook;
use slipway_hooks::recognise;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What libcontainer is given in place of the program: the file this process was executed from, which nobody can write to.
const OURSELVES: &str = "/proc/self/exe";

/// Replaces what is recognised among the hooks of the moment before the pivot; `root` is the container's root by then.
pub fn replace(hooks: &mut Vec<Hook>, root: &Path) {
    let mut kept: Vec<Hook> = Vec::new();
    let mut run: Vec<Vec<String>> = Vec::new();
    let mut seconds = 0;
    for hook in std::mem::take(hooks) {
        let args = hook.args().clone().unwrap_or_default();
        if recognise(hook.path(), &args).is_some() {
            seconds = seconds.max(crate::hook::seconds(&hook));
            run.push([vec![hook.path().display().to_string()], args].concat());
        } else {
            kept.extend(together(&mut run, &mut seconds, root));
            kept.push(hook);
        }
    }
    kept.extend(together(&mut run, &mut seconds, root));
    *hooks = kept;
}

fn together(run: &mut Vec<Vec<String>>, seconds: &mut i64, root: &Path) -> Option<Hook> {
    if run.is_empty() {
        return None;
    }
    let lines = serde_json::to_string(&std::mem::take(run)).ok()?;
    let args = ["slipway-runc", "native", &root.display().to_string(), &lines];
    let mut hook = Hook::default();
    hook.set_path(PathBuf::from(OURSELVES))
        .set_args(Some(args.map(str::to_owned).into()))
        .set_timeout(Some(std::mem::take(seconds)));
    Some(hook)
}

/// How a hook is called to people.
pub fn name(path: &Path) -> &Path {
    if path == Path::new(OURSELVES) {
        Path::new("slipway-runc")
    } else {
        path
    }
}

/// `native ROOT LINES`: does what the command lines say; our exit code.
pub fn run(args: &[OsString]) -> i32 {
    let [root, lines] = args else { return 2 };
    let lines: Option<Vec<Vec<String>>> = lines.to_str().and_then(|l| serde_json::from_str(l).ok());
    let hooks = lines.into_iter().flatten().map(|line| {
        let (program, args) = line.split_first()?;
        recognise(Path::new(program), args)
    });
    let Some(hooks) = hooks.collect::<Option<Vec<_>>>() else {
        return 2;
    };
    match slipway_hooks::run(&hooks, Path::new(root)) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("{}", e.chain());
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_hooks_become_one_and_others_keep_their_place() {
        let mut hooks: Vec<Hook> = serde_json::from_str(
            r#"[{"path":"/usr/bin/nvidia-cdi-hook","args":["nvidia-cdi-hook","create-symlinks","--link","a::/b"]},
                {"path":"/usr/bin/nvidia-cdi-hook","args":["nvidia-cdi-hook","update-ldcache"],"timeout":7},
                {"path":"/usr/bin/other","args":["other"]},
                {"path":"/usr/bin/nvidia-cdi-hook","args":["nvidia-cdi-hook","unheard-of"]},
                {"path":"/usr/bin/nvidia-ctk","args":["nvidia-ctk","hook","chmod","--mode","755"]}]"#,
        )
        .expect("hooks");
        replace(&mut hooks, Path::new("/the/root"));
        let paths: Vec<&Path> = hooks.iter().map(|h| h.path().as_path()).collect();
        assert_eq!(
            paths,
            [OURSELVES, "/usr/bin/other", "/usr/bin/nvidia-cdi-hook", OURSELVES].map(Path::new)
        );
        // The longest that any of them may take: 10 where one does not say.
        assert_eq!((hooks[0].timeout(), hooks[3].timeout()), (Some(10), Some(10)));
        let args = hooks[0].args().clone().expect("arguments");
        assert_eq!(args[..3], ["slipway-runc", "native", "/the/root"]);
        let lines: Vec<Vec<String>> = serde_json::from_str(&args[3]).expect("lines");
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[1],
            ["/usr/bin/nvidia-cdi-hook", "nvidia-cdi-hook", "update-ldcache"]
        );
    }

    #[test]
    fn a_container_without_such_hooks_is_left_alone() {
        let mut hooks: Vec<Hook> = serde_json::from_str(r#"[{"path":"/h"},{"path":"/g"}]"#).expect("hooks");
        let before = hooks.clone();
        replace(&mut hooks, Path::new("/"));
        assert_eq!(hooks, before);
    }
}
