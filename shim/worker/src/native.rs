//! Hooks of CDI files that are done here instead of by the program they name ([`slipway_hooks`]).
//!
//! A run of such hooks becomes one: this program's verb `native`, behind `hook` like any other, so that it has a time, no
//! environment, and its last words in the error. Hooks of others keep their place between them.

use libcontainer::oci_spec::runtime::Hook;
use slipway_hooks::{limits_memory, recognise};
use std::ffi::OsString;
use std::io;
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

/// What a container's process is given to have its GPUs' memory limited.
const MEMORY: [&str; 2] = ["NVIDIA_GPU_MEMORY_REQUEST", "NVIDIA_GPU_MEMORY_LIMIT"];

/// Takes out the hooks that would limit the GPU memory of a container that asks for no limit (`env` is its process's): they do
/// nothing, and their program need not be there for that. Those of one that asks are left to their program.
///
/// # Errors
/// It asks, and the program is not there: who asked for a limit is not to run without.
pub fn without_idle_limits(hooks: &mut Vec<Hook>, env: &[String]) -> io::Result<()> {
    let given = |name: &&str| {
        env.iter()
            .any(|e| e.split_once('=').is_some_and(|(n, _)| n == *name))
    };
    let asks = MEMORY.iter().all(given);
    let is_limit = |h: &Hook| limits_memory(h.path(), h.args().as_deref().unwrap_or_default());
    if !asks {
        hooks.retain(|h| !is_limit(h));
        return Ok(());
    }
    let absent = |h: &&Hook| is_limit(h) && !h.path().exists();
    let Some(hook) = hooks.iter().find(absent) else {
        return Ok(());
    };
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!(
            "{} limits the container's GPU memory, which only NVIDIA's own program can have the driver do, and {} is not there: \
             install nvidia-container-toolkit 1.20.1 or newer, or take the variable out",
            MEMORY[1],
            hook.path().display()
        ),
    ))
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
    fn a_limit_of_gpu_memory_is_neither_in_the_way_nor_forgotten() {
        let limits = |program: &str| {
            let text = format!(
                r#"[{{"path":"{program}","args":["nvidia-ctk","hook","apply-cuda-memory-limits","--driver-root","","--gpu-id","GPU-1"]}},
                    {{"path":"/usr/bin/other","args":["other"]}}]"#
            );
            serde_json::from_str::<Vec<Hook>>(&text).expect("hooks")
        };
        let env = |names: &[&str]| names.iter().map(|n| format!("{n}=1024")).collect::<Vec<_>>();
        for asked in [&[][..], &MEMORY[..1], &MEMORY[1..], &["NVIDIA_GPU_MEMORY_LIMITS"]] {
            let mut hooks = limits("/no/such/nvidia-ctk");
            without_idle_limits(&mut hooks, &env(asked)).expect("nothing to do");
            assert_eq!(hooks.len(), 1, "{asked:?}");
        }
        let refused = without_idle_limits(&mut limits("/no/such/nvidia-ctk"), &env(&MEMORY));
        let said = refused.expect_err("it cannot be done").to_string();
        assert!(
            said.contains("NVIDIA_GPU_MEMORY_LIMIT") && said.contains("/no/such/nvidia-ctk"),
            "{said}"
        );
        let dir = tempfile::tempdir().expect("a directory");
        let program = dir.path().join("nvidia-ctk");
        std::fs::write(&program, "").expect("a program");
        let mut hooks = limits(&program.display().to_string());
        without_idle_limits(&mut hooks, &env(&MEMORY)).expect("its program does it");
        assert_eq!(hooks.len(), 2);
    }

    #[test]
    fn a_container_without_such_hooks_is_left_alone() {
        let mut hooks: Vec<Hook> = serde_json::from_str(r#"[{"path":"/h"},{"path":"/g"}]"#).expect("hooks");
        let before = hooks.clone();
        replace(&mut hooks, Path::new("/"));
        assert_eq!(hooks, before);
    }
}
