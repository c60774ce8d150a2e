//! The cache key of a step: everything that determines what it makes, nothing else. Pure.
//!
//! ```text
//! key(step) = H(version, key(what is below), action, platform, contents of the files it takes, network, epoch, devices)
//! ```
//! The key below a stage is the chain of its base image's layers, so that the key knows contents, not names.
//! Actions come after expansion, in the Dockerfile crate's own JSON: environment, user, directory, shell and
//! mounts are in it, proxies are not. Contents have no times. Devices are in it by the names of those that the step gets,
//! as with BuildKit: not as the Dockerfile asks for them, and neither what a name stands for on this machine nor the version
//! of its driver.

use sha2::{Digest as _, Sha256};
use slipway_dockerfile::instruction::MountKind;
use slipway_dockerfile::step::Source;
use slipway_dockerfile::{Action, Platform};
use slipway_image::{ChainId, Digest};

use crate::copy::digest::framed;
use crate::error::StepError;
use crate::request::Network;

/// Changes when a step of the same key would make something else: part of every key.
const VERSION: &str = "slipway step 1";

/// What determines every key of a stage.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The stage's platform.
    pub platform: Platform,
    /// The build's network for RUN.
    pub network: Network,
    /// No file is newer: it changes the layers.
    pub epoch: Option<i64>,
    /// Full names of the devices that the step gets; empty for all but RUN.
    pub devices: Vec<String>,
}

/// The key of an empty root file system.
#[must_use]
pub fn scratch() -> Digest {
    hash(&[b"scratch"])
}

/// The key of an image's root file system.
#[must_use]
pub fn image(chain: Option<&ChainId>) -> Digest {
    match chain {
        Some(chain) => hash(&[b"chain", chain.digest().as_bytes()]),
        None => scratch(),
    }
}

impl Scope {
    /// The key of a step by the contents of the files it takes (`contents` is empty for WORKDIR; of a RUN it has one for
    /// each bind and each cache mount).
    ///
    /// # Errors
    /// When the action cannot be written as JSON.
    pub fn step(&self, below: &Digest, action: &Action, contents: &[[u8; 32]]) -> Result<Digest, StepError> {
        self.key(b"contents", below, action, contents)
    }

    /// The key of a COPY --from, or of a RUN with a stage's files mounted, by the layers that its files come from, so that
    /// on a hit they need not be read.
    ///
    /// # Errors
    /// When the action cannot be written as JSON.
    pub fn shortcut(
        &self,
        below: &Digest,
        action: &Action,
        sources: &[[u8; 32]],
    ) -> Result<Digest, StepError> {
        self.key(b"sources", below, action, sources)
    }

    fn key(
        &self,
        kind: &[u8],
        below: &Digest,
        action: &Action,
        inputs: &[[u8; 32]],
    ) -> Result<Digest, StepError> {
        // Without it, all steps on the same files would have one key.
        let action = serde_json::to_vec(&anonymous(action)).map_err(|source| StepError::Key { source })?;
        let platform = self.platform.to_string();
        let network = match (action_runs(&action), self.network) {
            (true, Network::Default) => "default",
            (true, Network::Host) => "host",
            (true, Network::None) => "none",
            (false, _) => "",
        };
        let epoch = self.epoch.map(|e| e.to_string()).unwrap_or_default();
        let mut parts: Vec<&[u8]> = vec![
            kind,
            below.as_bytes(),
            &action,
            platform.as_bytes(),
            network.as_bytes(),
            epoch.as_bytes(),
        ];
        parts.extend(inputs.iter().map(|i| i.as_slice()));
        if !self.devices.is_empty() {
            parts.push(b"devices");
            parts.extend(self.devices.iter().map(String::as_bytes));
        }
        Ok(hash(&parts))
    }
}

fn action_runs(json: &[u8]) -> bool {
    json.starts_with(b"{\"run\"")
}

/// The action without the numbers and names of where files come from, since their contents are in the key, and without what
/// it calls its devices.
fn anonymous(action: &Action) -> Action {
    match action {
        Action::Copy(copy) => {
            let mut copy = copy.clone();
            // The context's files lose their owners, others keep them: the contents' digest knows.
            copy.from = Source::Scratch;
            Action::Copy(copy)
        }
        Action::Run(run) => {
            let mut run = run.clone();
            run.devices.clear();
            for mount in &mut run.mounts {
                if let MountKind::Bind { from, .. } | MountKind::Cache { from, .. } = &mut mount.kind {
                    *from = Source::Scratch;
                }
            }
            Action::Run(run)
        }
        other => other.clone(),
    }
}

fn hash(parts: &[&[u8]]) -> Digest {
    let mut hash = Sha256::new();
    framed(&mut hash, VERSION.as_bytes());
    for part in parts {
        framed(&mut hash, part);
    }
    Digest::from_bytes(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_dockerfile::StageId;
    use slipway_dockerfile::instruction::Mount;
    use slipway_dockerfile::step::{CopySource, CopyStep, RunStep, WorkdirStep};

    fn scope() -> Scope {
        Scope {
            platform: Platform::new("linux", "amd64"),
            network: Network::Default,
            epoch: None,
            devices: Vec::new(),
        }
    }

    fn copy(from: Source) -> Action {
        let path = CopySource::Path {
            path: "/a".into(),
            below: None,
            wildcard: false,
        };
        Action::Copy(Box::new(CopyStep {
            from,
            sources: vec![path],
            destination: "/b".into(),
            destination_is_directory: false,
            chown: None,
            chmod: None,
            link: false,
            parents: false,
            exclude: vec![],
            unpack: false,
            is_add: false,
        }))
    }

    #[test]
    fn equal_contents_make_equal_keys_wherever_they_come_from() {
        let one = scope()
            .step(&scratch(), &copy(Source::Context), &[[7; 32]])
            .unwrap();
        let two = scope()
            .step(&scratch(), &copy(Source::Stage(StageId(3))), &[[7; 32]])
            .unwrap();
        assert_eq!(one, two);
        assert_ne!(
            one,
            scope()
                .step(&scratch(), &copy(Source::Context), &[[8; 32]])
                .unwrap()
        );
    }

    #[test]
    fn what_is_below_and_the_platform_are_in_the_key() {
        let step = Action::Workdir(WorkdirStep {
            path: "/w".into(),
            user: String::new(),
        });
        let key = scope().step(&scratch(), &step, &[]).unwrap();
        assert_ne!(key, scope().step(&key, &step, &[]).unwrap());
        let arm = Scope {
            platform: Platform::new("linux", "arm64"),
            ..scope()
        };
        assert_ne!(key, arm.step(&scratch(), &step, &[]).unwrap());
        let dated = Scope {
            epoch: Some(1),
            ..scope()
        };
        assert_ne!(key, dated.step(&scratch(), &step, &[]).unwrap());
    }

    #[test]
    fn the_network_is_in_the_keys_of_run_only() {
        let step = Action::Workdir(WorkdirStep {
            path: "/w".into(),
            user: String::new(),
        });
        let host = Scope {
            network: Network::Host,
            ..scope()
        };
        assert_eq!(
            scope().step(&scratch(), &step, &[]).unwrap(),
            host.step(&scratch(), &step, &[]).unwrap()
        );
    }

    fn run(mounts: Vec<Mount>) -> Action {
        Action::Run(Box::new(RunStep {
            argv: vec!["true".into()],
            env: vec![],
            proxy_env: vec![],
            cwd: "/".into(),
            user: String::new(),
            mounts,
            network: slipway_dockerfile::instruction::Network::Default,
            security: slipway_dockerfile::instruction::Security::Sandbox,
            devices: vec![],
            script: None,
        }))
    }

    #[test]
    fn devices_are_in_the_key_by_the_names_of_those_that_the_step_gets() {
        let key = |devices: &[&str], action: &Action| {
            let devices = devices.iter().map(|d| (*d).to_owned()).collect();
            let scope = Scope { devices, ..scope() };
            scope.step(&scratch(), action, &[]).unwrap()
        };
        let plain = run(vec![]);
        let Action::Run(mut asking) = plain.clone() else {
            unreachable!()
        };
        asking.devices.push(slipway_dockerfile::instruction::Device {
            name: "a.b/c".parse().unwrap(),
            required: true,
        });
        let asking = Action::Run(asking);
        assert_eq!(key(&["a.b/c=0"], &plain), key(&["a.b/c=0"], &asking));
        assert_eq!(key(&[], &plain), key(&[], &asking));
        assert_ne!(key(&[], &plain), key(&["a.b/c=0"], &plain));
        assert_ne!(key(&["a.b/c=1"], &plain), key(&["a.b/c=0"], &plain));
    }

    fn mount(kind: MountKind) -> Mount {
        Mount {
            target: Some("/m".into()),
            read_only: true,
            kind,
        }
    }

    #[test]
    fn a_mounts_contents_are_in_the_key_and_the_stages_number_and_the_images_name_are_not() {
        let bind = |from| {
            let source = "/".to_owned();
            run(vec![mount(MountKind::Bind { from, source })])
        };
        let cache = |from| {
            run(vec![mount(MountKind::Cache {
                id: "c".into(),
                sharing: slipway_dockerfile::instruction::Sharing::Shared,
                from,
                source: "/".into(),
                mode: None,
                uid: None,
                gid: None,
            })])
        };
        let froms = [
            Source::Stage(StageId(1)),
            Source::Stage(StageId(2)),
            Source::Image("a:1".into()),
        ];
        let actions: [&dyn Fn(Source) -> Action; 2] = [&bind, &cache];
        for action in actions {
            let key = |from: &Source, content| {
                scope()
                    .step(&scratch(), &action(from.clone()), &[[content; 32]])
                    .unwrap()
            };
            for from in &froms {
                assert_eq!(key(from, 7), key(&froms[0], 7));
                assert_ne!(key(from, 7), key(from, 8));
            }
        }
        assert_ne!(
            scope()
                .step(&scratch(), &bind(Source::Scratch), &[[7; 32]])
                .unwrap(),
            scope()
                .step(&scratch(), &cache(Source::Scratch), &[[7; 32]])
                .unwrap()
        );
    }
}
