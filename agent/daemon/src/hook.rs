//! `slipway-agent cdi-hook`: the CDI file's hooks, for container runtimes that do not do them themselves.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// Larger ones are no container's state, and no configuration.
const MAX_STATE: u64 = 1 << 20;
const MAX_CONFIG: u64 = 16 << 20;

#[derive(Deserialize)]
struct State {
    bundle: PathBuf,
}

#[derive(Deserialize)]
struct Config {
    root: Root,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

/// Does what the verb and its flags ask for to the container whose state a runtime gives on stdin. Only where a hook of
/// `createContainer` is run: in the container's mount namespace, before its root is changed.
///
/// # Errors
/// They make no sense, the state does not lead to a container, or the hook failed.
pub fn run(args: &[String]) -> Result<()> {
    let hook = slipway_hooks::parse(args)?;
    let root = root(std::io::stdin().lock())?;
    slipway_hooks::run(&[hook], &root)?;
    Ok(())
}

fn root(state: impl Read) -> Result<PathBuf> {
    let state: State = serde_json::from_reader(state.take(MAX_STATE))
        .context("read the container's state from stdin, where a runtime gives it")?;
    let path = state.bundle.join("config.json");
    let read = |path: &Path| {
        let file = std::fs::File::open(path)?;
        serde_json::from_reader(file.take(MAX_CONFIG)).map_err(std::io::Error::from)
    };
    let config: Config = read(&path).with_context(|| format!("read {}", path.display()))?;
    let root = state.bundle.join(config.root.path);
    let real = root
        .canonicalize()
        .with_context(|| format!("find the container's root {}", root.display()))?;
    if real == Path::new("/") {
        bail!("the container's root is this machine's: refused");
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_leads_to_the_root_and_never_to_the_machines() {
        let dir = tempfile::tempdir().expect("a directory");
        let bundle = dir.path();
        std::fs::create_dir(bundle.join("rootfs")).expect("made");
        let state = format!(r#"{{"ociVersion":"1.2.0","bundle":{bundle:?}}}"#);
        let with = |path: &str| {
            let text = format!(r#"{{"root":{{"path":"{path}"}}}}"#);
            std::fs::write(bundle.join("config.json"), text).expect("written");
            root(state.as_bytes())
        };
        let wanted = bundle.join("rootfs").canonicalize().expect("there");
        assert_eq!(with("rootfs").expect("a root"), wanted);
        for (path, said) in [("/", "refused"), ("/..", "refused"), ("absent", "absent")] {
            let error = with(path).expect_err("no root");
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
        assert!(format!("{:#}", root(&b"{}"[..]).expect_err("no state")).contains("stdin"));
    }
}
