//! CDI devices of RUN: which of the machine's are meant by a name, whether whoever started the build has granted them, and
//! what they change in a container. Knows nothing of files' formats, nor of what becomes of the changes.
//!
//! A Dockerfile cannot give itself a device of the node: one that it names must be granted by the build
//! ([`DeviceGrants`]), or by the node's administrator, in an annotation of the CDI file. Names mean what they mean to
//! BuildKit, and so do the annotations.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use slipway_cdi::{Cache, ContainerEdits, ListedDevice, ResolveError};
use slipway_dockerfile::instruction::{DeviceName, Mount, MountKind};
use slipway_dockerfile::step::RunStep;

use crate::error::{DeviceError, StepError};
use crate::request::BuildRequest;

/// Puts a device into a class, by which RUN may ask for it.
const CLASS: &str = "org.mobyproject.buildkit.device.class";
/// "true": every build may use the device.
const AUTO_ALLOW: &str = "org.mobyproject.buildkit.device.autoallow";

/// The devices that RUN steps may ask for besides those that every step gets.
#[derive(Debug, Clone, Default)]
pub struct DeviceGrants {
    /// Any.
    pub all: bool,
    /// These.
    pub names: BTreeSet<DeviceName>,
    /// These, by other names: what a Dockerfile calls a device, and what it is here.
    pub aliases: BTreeMap<String, DeviceName>,
}

/// What a step gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Given {
    /// Full names, each once, in the order in which their edits are applied.
    pub names: Vec<String>,
    /// What the step asked for and can do without, and this machine does not have.
    pub absent: Vec<String>,
}

/// The machine's devices, as they are when a build first asks.
pub(crate) struct Devices {
    cache: Arc<Cache>,
    listed: OnceLock<Vec<ListedDevice>>,
}

impl Devices {
    pub fn new(cache: Arc<Cache>) -> Devices {
        Devices {
            cache,
            listed: OnceLock::new(),
        }
    }

    /// The devices that every RUN of the build gets.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn of_build(&self, request: &BuildRequest) -> Result<Vec<String>, DeviceError> {
        let mut names = Vec::new();
        for wanted in &request.devices {
            names.extend(self.required(wanted)?);
        }
        Ok(once(names))
    }

    /// The devices that a step gets.
    ///
    /// # Errors
    /// One is not there, or not granted.
    pub fn of_step(&self, request: &BuildRequest, step: &RunStep) -> Result<Given, StepError> {
        let (mut names, mut absent) = (self.of_build(request)?, Vec::new());
        let grants = &request.allow_devices;
        let granted: BTreeSet<String> = grants
            .names
            .iter()
            .flat_map(|name| self.matching(name))
            .chain(names.iter().cloned())
            .collect();
        let mut refused = Vec::new();
        for device in &step.devices {
            let alias = grants.aliases.get(&device.name.to_string());
            let wanted = alias.unwrap_or(&device.name);
            let found = match device.required {
                true => self.required(wanted)?,
                false => self.matching(wanted),
            };
            if found.is_empty() {
                absent.push(self.missing(wanted).to_string());
            }
            let free = |name: &String| {
                grants.all || alias.is_some() || granted.contains(name) || self.is_for_everybody(name)
            };
            if !found.iter().all(free) {
                refused.push(device.name.to_string());
            }
            names.extend(found);
        }
        match once(refused) {
            refused if refused.is_empty() => Ok(Given {
                names: once(names),
                absent,
            }),
            refused => Err(not_granted(&refused)),
        }
    }

    /// Why what the build grants is of no use: each grant that names nothing here.
    pub fn empty_grants(&self, request: &BuildRequest) -> Vec<String> {
        let grants = &request.allow_devices;
        let names = grants.names.iter().chain(grants.aliases.values());
        names
            .filter(|name| self.matching(name).is_empty())
            .map(|name| format!("--allow=device={name}: {}", self.missing(name)))
            .collect()
    }

    /// That a step can have its devices, as far as that can be known before it runs.
    ///
    /// # Errors
    /// One has gone, or a node or file of it, or brings what a step cannot have.
    pub fn check(&self, names: &[String], step: &RunStep) -> Result<(), StepError> {
        let edits = self.edits(names)?;
        let mounts = edits.iter().flat_map(|e| &e.mounts).map(|m| &m.container_path);
        let nodes = edits.iter().flat_map(|e| &e.device_nodes).map(|n| &n.path);
        // Hooks that we know make everything else below whatever is mounted.
        let loader: Vec<String> = edits
            .iter()
            .flat_map(|e| &e.hooks)
            .filter_map(|hook| slipway_hooks::recognise(Path::new(&hook.path), &hook.args))
            .flat_map(|hook| match hook {
                slipway_hooks::Hook::UpdateLdcache { mut folders, .. } => {
                    folders.push("/etc/ld.so.cache".to_owned());
                    folders
                }
                _ => Vec::new(),
            })
            .collect();
        let kept = |mount: &&Mount| matches!(mount.kind, MountKind::Cache { .. }) && !mount.read_only;
        for cache in step.mounts.iter().filter(kept).filter_map(|m| m.target.as_ref()) {
            if let Some(path) = mounts
                .clone()
                .chain(nodes.clone())
                .find(|p| Path::new(p).starts_with(cache))
            {
                return Err(StepError::DeviceInCache {
                    path: path.into(),
                    cache: cache.into(),
                });
            }
            if let Some(path) = loader.iter().find(|p| Path::new(p).starts_with(cache)) {
                return Err(StepError::LoaderInCache {
                    path: path.into(),
                    cache: cache.into(),
                });
            }
        }
        Ok(())
    }

    /// What the devices change in a container, in order.
    ///
    /// # Errors
    /// One has gone, or a node or file of it.
    pub fn edits(&self, names: &[String]) -> Result<Vec<ContainerEdits>, StepError> {
        let edits = self.cache.resolve(names, &slipway_cdi::host::lookup);
        let edits = edits.map_err(DeviceError::new)?;
        // They would stay in the stage's network, where other steps are.
        if edits.iter().any(|e| !e.net_devices.is_empty()) {
            let brings = |name: &&String| {
                let own = self
                    .cache
                    .resolve(std::slice::from_ref(*name), &slipway_cdi::host::lookup);
                own.is_ok_and(|own| own.iter().any(|e| !e.net_devices.is_empty()))
            };
            let name = names.iter().find(brings).map_or("", String::as_str);
            return Err(StepError::Unsupported {
                what: format!("RUN with {name}, a device that brings a network interface,"),
            });
        }
        // The container's error would not say whose they are.
        let mounts = edits.iter().flat_map(|e| &e.mounts);
        for mount in mounts.filter(|m| matches!(m.kind.as_str(), "" | "none" | "bind")) {
            std::fs::metadata(&mount.host_path).map_err(|source| StepError::DeviceFile {
                path: mount.host_path.clone().into(),
                source,
            })?;
        }
        Ok(edits)
    }

    fn listed(&self) -> &[ListedDevice] {
        self.listed.get_or_init(|| self.cache.listed())
    }

    fn required(&self, wanted: &DeviceName) -> Result<Vec<String>, DeviceError> {
        let found = self.matching(wanted);
        if !found.is_empty() {
            return Ok(found);
        }
        Err(DeviceError::new(self.missing(wanted)))
    }

    /// Why a name means nothing.
    fn missing(&self, wanted: &DeviceName) -> ResolveError {
        let name = wanted.to_string();
        let why = match wanted {
            // It may be there twice.
            DeviceName::One { .. } => self
                .cache
                .resolve(std::slice::from_ref(&name), &slipway_cdi::host::lookup)
                .err(),
            _ => None,
        };
        why.unwrap_or_else(|| self.cache.unknown(&name))
    }

    /// The full names of the devices that a name means; none where there are none.
    fn matching(&self, wanted: &DeviceName) -> Vec<String> {
        let text = wanted.to_string();
        let named = |listed: &&ListedDevice| match wanted {
            DeviceName::One { kind, device } => (&listed.name.kind, &listed.name.device) == (kind, device),
            DeviceName::First(kind) | DeviceName::All(kind) => listed.name.kind == *kind,
            DeviceName::Class(_) => false,
        };
        let most = match wanted {
            DeviceName::First(_) => 1,
            _ => usize::MAX,
        };
        let names = |found: &mut dyn Iterator<Item = &ListedDevice>| -> Vec<String> {
            found.map(|listed| listed.name.to_string()).collect()
        };
        let found = names(&mut self.listed().iter().filter(named).take(most));
        if !found.is_empty() {
            return found;
        }
        let in_class = |listed: &&ListedDevice| listed.annotations.get(CLASS) == Some(&text);
        names(&mut self.listed().iter().filter(in_class))
    }

    fn is_for_everybody(&self, name: &str) -> bool {
        let listed = self
            .listed()
            .iter()
            .find(|listed| listed.name.to_string() == name);
        let allowed = listed.and_then(|listed| listed.annotations.get(AUTO_ALLOW));
        allowed.is_some_and(|text| matches!(text.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True"))
    }
}

/// `refused` are as the Dockerfile has them: granted so, they mean the same devices.
fn not_granted(refused: &[String]) -> StepError {
    // A shell would take a star for a pattern.
    let quoted = |flag: String| match flag.contains('*') {
        true => format!("'{flag}'"),
        false => flag,
    };
    let flags = |flag: &str| {
        let flags = refused.iter().map(|name| quoted(format!("{flag}={name}")));
        flags.collect::<Vec<_>>().join(" ")
    };
    StepError::NotGranted {
        what: format!(
            "{} {} (RUN --device)",
            match refused {
                [_] => "the device",
                _ => "each of the devices",
            },
            refused.join(", ")
        ),
        flag: format!(
            "{} (or {}, for all its steps)",
            flags("--allow=device"),
            flags("--device")
        ),
    }
}

/// Each name where it first stands.
fn once(names: Vec<String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    names
        .into_iter()
        .filter(|name| seen.insert(name.clone()))
        .collect()
}

impl DeviceError {
    fn new(source: ResolveError) -> DeviceError {
        DeviceError {
            source: Box::new(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_dockerfile::instruction::{Device, Network, Security, Sharing};
    use slipway_dockerfile::step::Source;

    struct Machine {
        dir: tempfile::TempDir,
        devices: Devices,
        request: BuildRequest,
    }

    fn machine() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(vec![dir.path().to_path_buf(), "/nowhere/cdi".into()]);
        std::fs::write(
            dir.path().join("a.json"),
            r#"{"cdiVersion":"0.6.0","kind":"v.com/gpu","devices":[
                {"name":"1","containerEdits":{"env":["ONE=1"]}},
                {"name":"0","containerEdits":{"env":["NULL=1"]},
                 "annotations":{"org.mobyproject.buildkit.device.class":"fast"}},
                {"name":"free","containerEdits":{"env":["FREE=1"]},
                 "annotations":{"org.mobyproject.buildkit.device.autoallow":"true"}}]}"#,
        )
        .unwrap();
        for file in ["b.json", "c.json"] {
            let twice = r#"{"cdiVersion":"0.6.0","kind":"v.com/nic","devices":[{"name":"0","containerEdits":{"env":["A=1"]}}]}"#;
            std::fs::write(dir.path().join(file), twice).unwrap();
        }
        Machine {
            dir,
            devices: Devices::new(Arc::new(cache)),
            request: crate::tests_as_root::request(Path::new("/")),
        }
    }

    impl Machine {
        /// A step that asks for these; with a `!`: requires.
        fn step(asked: &[&str]) -> RunStep {
            let devices = asked.iter().map(|name| Device {
                name: name.trim_end_matches('!').parse().unwrap(),
                required: name.ends_with('!'),
            });
            RunStep {
                argv: vec!["true".into()],
                env: vec![],
                proxy_env: vec![],
                cwd: "/".into(),
                user: String::new(),
                mounts: vec![],
                network: Network::Default,
                security: Security::Sandbox,
                devices: devices.collect(),
                script: None,
            }
        }

        /// What such a step gets, or why not.
        fn ask(&self, asked: &[&str]) -> Result<Given, String> {
            let step = Machine::step(asked);
            let given = self.devices.of_step(&self.request, &step);
            given.map_err(|e| crate::chain(&e).to_string())
        }

        fn names(&self, asked: &[&str]) -> Vec<String> {
            self.ask(asked).unwrap().names
        }
    }

    #[test]
    fn a_name_means_one_device_the_first_all_of_a_kind_or_those_of_a_class() {
        let mut machine = machine();
        machine.request.allow_devices.all = true;
        for (name, want) in [
            ("v.com/gpu=1", &["v.com/gpu=1"][..]),
            ("v.com/gpu", &["v.com/gpu=0"]),
            ("v.com/gpu=*", &["v.com/gpu=0", "v.com/gpu=1", "v.com/gpu=free"]),
            ("fast", &["v.com/gpu=0"]),
        ] {
            assert_eq!(machine.names(&[name]), want, "{name}");
        }
        // Each once, in the order in which they are asked for.
        assert_eq!(
            machine.names(&["v.com/gpu=1", "fast", "v.com/gpu=*"]),
            ["v.com/gpu=1", "v.com/gpu=0", "v.com/gpu=free"]
        );
        let edits = machine
            .devices
            .edits(&machine.names(&["v.com/gpu=1", "fast"]))
            .unwrap();
        assert_eq!(edits[0].env, ["ONE=1"]);
        assert_eq!(edits[1].env, ["NULL=1"]);
    }

    #[test]
    fn a_step_has_only_what_is_granted_to_its_build() {
        let mut machine = machine();
        let refused = machine.ask(&["v.com/gpu=1"]).unwrap_err();
        assert_eq!(
            refused,
            "the device v.com/gpu=1 (RUN --device) is not granted to this build; give slipway build \
             --allow=device=v.com/gpu=1 (or --device=v.com/gpu=1, for all its steps) to allow it"
        );
        // As it is asked for, however many that are; and a grant of that is enough.
        let refused = machine.ask(&["v.com/gpu=*!", "fast", "v.com/gpu"]).unwrap_err();
        assert_eq!(
            refused,
            "each of the devices v.com/gpu=*, fast, v.com/gpu (RUN --device) is not granted to this build; give slipway \
             build '--allow=device=v.com/gpu=*' --allow=device=fast --allow=device=v.com/gpu (or '--device=v.com/gpu=*' \
             --device=fast --device=v.com/gpu, for all its steps) to allow it"
        );
        for name in ["v.com/gpu=*", "fast", "v.com/gpu"] {
            machine.request.allow_devices.names = BTreeSet::from([name.parse().unwrap()]);
            assert!(!machine.names(&[name]).is_empty(), "{name}");
        }
        machine.request.allow_devices.names.clear();
        assert_eq!(machine.names(&["v.com/gpu=free!"]), ["v.com/gpu=free"]);
        let grants = &mut machine.request.allow_devices;
        grants.names.insert("v.com/gpu".parse().unwrap());
        grants
            .aliases
            .insert("v.com/mine=x".into(), "v.com/gpu=1".parse().unwrap());
        assert_eq!(machine.names(&["v.com/gpu=0"]), ["v.com/gpu=0"]);
        assert!(machine.ask(&["v.com/gpu=1"]).is_err());
        assert_eq!(machine.names(&["v.com/mine=x!"]), ["v.com/gpu=1"]);
    }

    #[test]
    fn what_every_step_gets_comes_first_and_may_be_asked_for() {
        let mut machine = machine();
        machine.request.devices = vec!["v.com/gpu=1".parse().unwrap()];
        assert_eq!(machine.names(&[]), ["v.com/gpu=1"]);
        assert_eq!(
            machine.names(&["v.com/gpu=free", "v.com/gpu=1"]),
            ["v.com/gpu=1", "v.com/gpu=free"]
        );
        machine.request.devices = vec!["v.com/gpu=7".parse().unwrap()];
        let error = machine.devices.of_build(&machine.request).unwrap_err();
        let said = crate::chain(&error).to_string();
        assert!(
            said.contains("CDI device v.com/gpu=7 is not defined in /") && said.contains("/nowhere/cdi"),
            "{said}"
        );
    }

    #[test]
    fn what_is_not_there_is_an_error_where_it_is_required() {
        let machine = machine();
        let given = machine.ask(&["v.com/gpu=7", "slow", "v.com/gpu=free"]).unwrap();
        assert_eq!(given.names, ["v.com/gpu=free"]);
        assert_eq!(given.absent.len(), 2);
        assert!(given.absent[0].starts_with("CDI device v.com/gpu=7 is not defined in "));
        for name in ["v.com/gpu=7!", "v.com/tpu!", "v.com/tpu=*!", "slow!"] {
            let said = machine.ask(&[name]).unwrap_err();
            assert!(said.contains(name.trim_end_matches('!')), "{said}");
            assert!(said.contains("--cdi-spec-dir"), "{said}");
        }
        // What is there twice is not what is not there.
        let said = machine.ask(&["v.com/nic=0!"]).unwrap_err();
        assert!(said.contains("b.json") && said.contains("c.json"), "{said}");
        assert!(!said.contains("--cdi-spec-dir"), "{said}");
        let absent = machine.ask(&["v.com/nic=0"]).unwrap().absent;
        assert!(
            absent[0].contains("b.json") && absent[0].contains("c.json"),
            "{absent:?}"
        );
        std::fs::write(machine.dir.path().join("bad.json"), "{").unwrap();
        let said = machine.ask(&["v.com/gpu=7!"]).unwrap_err();
        assert!(said.contains("bad.json cannot be used"), "{said}");
    }

    #[test]
    fn a_grant_that_names_nothing_is_told() {
        let mut machine = machine();
        assert!(machine.devices.empty_grants(&machine.request).is_empty());
        let grants = &mut machine.request.allow_devices;
        for name in ["v.com/gpu=0", "v.com/gpu=7", "v.com/nic=0", "fast"] {
            grants.names.insert(name.parse().unwrap());
        }
        grants.aliases.insert("mine".into(), "slow".parse().unwrap());
        let said = machine.devices.empty_grants(&machine.request);
        assert_eq!(said.len(), 3, "{said:?}");
        let all = said.join("\n");
        assert!(
            all.contains("--allow=device=v.com/gpu=7: CDI device v.com/gpu=7 is not defined in "),
            "{all}"
        );
        assert!(
            all.contains("--allow=device=v.com/nic=0: ") && all.contains("c.json"),
            "{all}"
        );
        assert!(all.contains("--allow=device=slow: "), "{all}");
    }

    #[test]
    fn what_a_step_cannot_have_of_a_device_is_refused_before_it_runs() {
        let machine = machine();
        let file = r#"{"cdiVersion":"1.1.0","kind":"w.com/x","devices":[
            {"name":"lib","containerEdits":{"mounts":[{"hostPath":"/etc/passwd","containerPath":"/usr/lib/v/libv.so.1"}]}},
            {"name":"links","containerEdits":{"hooks":[{"hookName":"createContainer","path":"/usr/bin/nvidia-cdi-hook",
             "args":["nvidia-cdi-hook","create-symlinks","--link","a::/opt/v/b"]}]}},
            {"name":"loader","containerEdits":{"hooks":[{"hookName":"createContainer","path":"/usr/bin/nvidia-cdi-hook",
             "args":["nvidia-cdi-hook","update-ldcache","--folder","/opt/v/lib"]}]}},
            {"name":"gone","containerEdits":{"mounts":[{"hostPath":"/no/such/file","containerPath":"/opt/f"}]}},
            {"name":"node","containerEdits":{"deviceNodes":[{"path":"/opt/null","hostPath":"/dev/null"}]}},
            {"name":"nic","containerEdits":{"netDevices":[{"hostInterfaceName":"eth7","name":"net1"}]}}]}"#;
        std::fs::write(machine.dir.path().join("w.json"), file).unwrap();
        let check = |names: &[&str], cache: &str, read_only: bool| {
            let names: Vec<_> = names.iter().map(|n| format!("w.com/x={n}")).collect();
            let mut step = Machine::step(&[]);
            step.mounts.push(Mount {
                target: Some(cache.to_owned()),
                read_only,
                kind: MountKind::Cache {
                    id: "c".into(),
                    sharing: Sharing::Shared,
                    from: Source::Scratch,
                    source: "/".into(),
                    mode: None,
                    uid: None,
                    gid: None,
                },
            });
            let checked = machine.devices.check(&names, &step);
            checked.map_err(|e| crate::chain(&e).to_string())
        };
        check(&["lib", "node"], "/usr/lib/vv", false).unwrap();
        check(&["lib"], "/usr/lib/v", true).unwrap();
        // A link is made below what is mounted; the loader's program sees the mounts.
        check(&["links", "loader"], "/opt/v/links", false).unwrap();
        check(&["links"], "/opt/v", false).unwrap();
        check(&["loader"], "/opt/v", true).unwrap();
        for (names, cache, wanted) in [
            (
                &["lib"][..],
                "/usr/lib/v",
                &["/usr/lib/v/libv.so.1 ", " cache mount /usr/lib/v,"][..],
            ),
            (&["node"], "/opt", &["/opt/null ", " cache mount /opt,"]),
            (&["loader"], "/opt/v", &["/opt/v/lib ", " cache mount /opt/v,"]),
            (&["loader"], "/etc", &["/etc/ld.so.cache ", " cache mount /etc,"]),
            (&["lib", "gone"], "/c", &["/no/such/file", "No such file"]),
            (
                &["lib", "nic"],
                "/c",
                &["w.com/x=nic, a device that brings a network interface, is not built yet"],
            ),
        ] {
            let said = check(names, cache, false).unwrap_err();
            assert!(wanted.iter().all(|part| said.contains(part)), "{said}");
        }
    }
}
