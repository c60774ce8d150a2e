//! Network configurations: which file in the folder is the network, what it says, and whether it
//! has changed. The first file by name is the network, as for every other runtime; when it cannot
//! be used the network is not ready, rather than silently another one (a half-written file of the
//! real network must not put pods on the second).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

use crate::attachment::PluginConfig;

/// Versions of the CNI protocol spoken here, oldest first.
pub(crate) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Largest file that is read.
const MAX_FILE: u64 = 1 << 20;

/// One network.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Network {
    pub(crate) name: String,
    /// Versions the configuration offers and we speak, newest first; never empty.
    pub(crate) versions: Vec<String>,
    pub(crate) disable_check: bool,
    pub(crate) disable_gc: bool,
    pub(crate) plugins: Vec<PluginConfig>,
}

/// Parses a `.conflist`.
pub(crate) fn parse_list(bytes: &[u8]) -> Result<(Network, bool), String> {
    let top: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| format!("it is not a JSON object: {e}"))?;
    let plugins = match top.get("plugins") {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(list)) => list.as_slice(),
        Some(_) => return Err("plugins is not a list".to_owned()),
    };
    let plugins = plugins.iter().map(plugin).collect::<Result<Vec<_>, _>>()?;
    let inlined_only = flag(&top, "loadOnlyInlinedPlugins")?;
    let network = Network {
        name: name(&top)?,
        versions: versions(&top)?,
        disable_check: flag(&top, "disableCheck")?,
        disable_gc: flag(&top, "disableGC")?,
        plugins,
    };
    Ok((network, inlined_only))
}

/// Parses a `.conf` or `.json` of a single plugin.
pub(crate) fn parse_single(bytes: &[u8]) -> Result<Network, String> {
    let top: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| format!("it is not a JSON object: {e}"))?;
    if top.contains_key("plugins") {
        return Err("it is a list of plugins: name it .conflist".to_owned());
    }
    let (name, versions) = (name(&top)?, versions(&top)?);
    let plugins = vec![plugin(&Value::Object(top))?];
    Ok(Network {
        name,
        versions,
        disable_check: false,
        disable_gc: false,
        plugins,
    })
}

fn plugin(value: &Value) -> Result<PluginConfig, String> {
    let config = value.as_object().ok_or("a plugin is not an object")?;
    let kind = config.get("type").and_then(Value::as_str).unwrap_or("");
    if kind.is_empty() {
        return Err("a plugin has no type".to_owned());
    }
    if kind.contains(['/', '\\', '\0']) || kind == "." || kind == ".." {
        return Err(format!("the plugin type {kind:?} is not a file name"));
    }
    Ok(PluginConfig {
        kind: kind.to_owned(),
        config: config.clone(),
    })
}

fn name(top: &Map<String, Value>) -> Result<String, String> {
    let name = top.get("name").and_then(Value::as_str).unwrap_or("");
    if name.is_empty() {
        return Err("it has no name".to_owned());
    }
    if is_identifier(name) {
        Ok(name.to_owned())
    } else {
        Err(format!("the name {name:?} has characters it may not have"))
    }
}

/// CNI's rule for network names and container ids.
pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// The versions offered that we speak, newest first. No version at all is 0.1.0 by the letter and
/// a configuration of before 2017 in practice: refused.
fn versions(top: &Map<String, Value>) -> Result<Vec<String>, String> {
    let mut offered: Vec<&str> = match top.get("cniVersions") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        Some(_) => return Err("cniVersions is not a list".to_owned()),
    };
    offered.extend(top.get("cniVersion").and_then(Value::as_str));
    let known: Vec<String> = VERSIONS
        .iter()
        .rev()
        .filter(|v| offered.contains(v))
        .map(|v| (*v).to_owned())
        .collect();
    match (known.is_empty(), offered.is_empty()) {
        (false, _) => Ok(known),
        (true, true) => Err("it has no cniVersion".to_owned()),
        (true, false) => Err(format!(
            "cniVersion {} is not supported (0.3.0 to 1.1.0 are)",
            offered.join(", ")
        )),
    }
}

/// A boolean, or one written as text, as libcni accepts them.
fn flag(top: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match top.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(Value::String(s)) if s.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(s)) if s.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(format!("{key} is neither true nor false")),
    }
}

/// What tells one state of the folder from another.
type Listing = BTreeMap<PathBuf, (u64, u64, i64, i64, i64, i64)>;

/// The folder of configurations, read again when it has changed.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    listing: Option<Listing>,
    network: Option<Result<Arc<Network>, String>>,
}

impl Folder {
    pub(crate) fn new(dir: PathBuf) -> Folder {
        Folder {
            dir,
            state: Mutex::default(),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The network, or why there is none.
    pub(crate) fn network(&self) -> Result<Arc<Network>, String> {
        let listing = list(&self.dir).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => format!(
                "no network configuration in {}: the folder does not exist",
                self.dir.display()
            ),
            _ => format!("read {}: {e}", self.dir.display()),
        });
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let listing = match listing {
            Ok(listing) => listing,
            Err(reason) => {
                *state = State::default();
                return Err(reason);
            }
        };
        if let Some(network) = &state.network
            && state.listing.as_ref() == Some(&listing)
        {
            return network.clone();
        }
        let network = load(&self.dir, &listing).map(Arc::new);
        *state = State {
            listing: Some(listing),
            network: Some(network.clone()),
        };
        network
    }
}

fn is_config(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e == "conf" || e == "conflist" || e == "json")
}

/// Files that may be configurations, of the folder and of its sub-folders (plugins of a list).
fn list(dir: &Path) -> io::Result<Listing> {
    let mut found = Listing::new();
    let mut add = |path: PathBuf| {
        if let Ok(m) = fs::metadata(&path)
            && m.is_file()
        {
            found.insert(
                path,
                (
                    m.ino(),
                    m.len(),
                    m.mtime(),
                    m.mtime_nsec(),
                    m.ctime(),
                    m.ctime_nsec(),
                ),
            );
        }
    };
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if is_config(&path) {
            add(path);
        } else if path.is_dir() {
            for inner in fs::read_dir(&path).into_iter().flatten().flatten() {
                if inner.path().extension().is_some_and(|e| e == "conf") {
                    add(inner.path());
                }
            }
        }
    }
    Ok(found)
}

fn load(dir: &Path, listing: &Listing) -> Result<Network, String> {
    let first = listing.keys().find(|p| p.parent() == Some(dir) && is_config(p));
    let first = first.ok_or_else(|| format!("no network configuration in {}", dir.display()))?;
    let of = |reason: String| format!("{} cannot be used: {reason}", first.display());
    let bytes = read(first).map_err(of)?;
    if first.extension().is_none_or(|e| e != "conflist") {
        return parse_single(&bytes).map_err(of);
    }
    let (mut network, inlined_only) = parse_list(&bytes).map_err(of)?;
    if !inlined_only {
        let folder = dir.join(&network.name);
        for path in listing.keys().filter(|p| p.parent() == Some(&folder)) {
            let of = |reason: String| format!("{} cannot be used: {reason}", path.display());
            let value: Value = serde_json::from_slice(&read(path).map_err(of)?)
                .map_err(|e| of(format!("it is not JSON: {e}")))?;
            network.plugins.push(plugin(&value).map_err(of)?);
        }
    }
    if network.plugins.is_empty() {
        return Err(of("it has no plugins".to_owned()));
    }
    Ok(network)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > MAX_FILE {
        return Err(format!("it has {size} bytes, more than 1 MiB"));
    }
    fs::read(path).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"b0"},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;

    #[test]
    fn a_list_is_read_with_its_plugins_in_order_and_untouched() {
        let (network, _) = parse_list(LIST.as_bytes()).unwrap();
        assert_eq!(
            (network.name.as_str(), network.versions.as_slice()),
            ("net", &["1.0.0".to_owned()][..])
        );
        assert_eq!(
            network
                .plugins
                .iter()
                .map(|p| p.kind.as_str())
                .collect::<Vec<_>>(),
            ["bridge", "portmap"]
        );
        assert_eq!(network.plugins[0].config["bridge"], "b0");
        assert!(
            network.plugins[1].has_capability("portMappings")
                && !network.plugins[0].has_capability("portMappings")
        );
    }

    #[test]
    fn versions_offered_are_kept_newest_first_and_unknown_ones_passed_over() {
        let text = r#"{"cniVersion":"0.4.0","cniVersions":["0.3.1","1.1.0","9.0.0"],"name":"n","plugins":[{"type":"x"}]}"#;
        assert_eq!(
            parse_list(text.as_bytes()).unwrap().0.versions,
            ["1.1.0", "0.4.0", "0.3.1"]
        );
    }

    #[test]
    fn broken_configurations_are_refused_with_the_reason() {
        for (text, reason) in [
            ("{", "JSON"),
            (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "name"),
            (
                r#"{"cniVersion":"1.0.0","name":"a/b","plugins":[]}"#,
                "characters",
            ),
            (r#"{"name":"n","plugins":[]}"#, "no cniVersion"),
            (
                r#"{"cniVersion":"0.2.0","name":"n","plugins":[]}"#,
                "0.2.0 is not supported",
            ),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#, "no type"),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../x"}]}"#,
                "file name",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","disableCheck":3,"plugins":[]}"#,
                "disableCheck",
            ),
        ] {
            let error = parse_list(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(parse_single(LIST.as_bytes()).unwrap_err().contains(".conflist"));
    }

    #[test]
    fn the_first_file_by_name_is_the_network_and_changes_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().to_owned());
        assert!(folder.network().unwrap_err().contains("no network configuration"));

        let single = |name: &str| format!(r#"{{"cniVersion":"0.4.0","name":"{name}","type":"ptp"}}"#);
        fs::write(dir.path().join("20-b.conf"), single("second")).unwrap();
        assert_eq!(folder.network().unwrap().name, "second");
        fs::write(dir.path().join("10-a.conflist"), LIST).unwrap();
        assert_eq!(folder.network().unwrap().name, "net");
        assert!(Arc::ptr_eq(
            &folder.network().unwrap(),
            &folder.network().unwrap()
        ));

        fs::write(dir.path().join("10-a.conflist"), &LIST[..20]).unwrap();
        let reason = folder.network().unwrap_err();
        assert!(
            reason.contains("10-a.conflist") && reason.contains("JSON"),
            "{reason}"
        );
        fs::remove_file(dir.path().join("10-a.conflist")).unwrap();
        assert_eq!(folder.network().unwrap().name, "second");
    }

    #[test]
    fn plugins_of_the_sibling_folder_are_appended_unless_only_inlined_ones_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("net")).unwrap();
        fs::write(dir.path().join("net/20-x.conf"), r#"{"type":"tuning"}"#).unwrap();
        fs::write(dir.path().join("10-a.conflist"), LIST).unwrap();
        let folder = Folder::new(dir.path().to_owned());
        let types = |n: &Network| n.plugins.iter().map(|p| p.kind.clone()).collect::<Vec<_>>();
        assert_eq!(types(&folder.network().unwrap()), ["bridge", "portmap", "tuning"]);
        let only = LIST.replacen('{', r#"{"loadOnlyInlinedPlugins":true,"#, 1);
        fs::write(dir.path().join("10-a.conflist"), only).unwrap();
        assert_eq!(types(&folder.network().unwrap()), ["bridge", "portmap"]);
    }

    #[test]
    fn a_missing_folder_is_told_and_noticed_when_it_appears() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("net.d");
        let folder = Folder::new(conf.clone());
        assert!(folder.network().unwrap_err().contains("does not exist"));
        fs::create_dir(&conf).unwrap();
        fs::write(conf.join("a.conflist"), LIST).unwrap();
        assert_eq!(folder.network().unwrap().name, "net");
    }
}
