//! Docker's `config.json`: who a user is to which registry, directly or through a credential helper.
//!
//! Owns its reading and the helper protocol (`docker-credential-X get`). Never writes it.

use super::credentials::{AuthFields, Credentials};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const HELPER_DEADLINE: Duration = Duration::from_secs(30);
const LONGEST_ANSWER: u64 = 1 << 20;
const LONGEST_FILE: u64 = 4 << 20;
/// What docker calls its own registry in config.json.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
const DOCKER_HUB_NAMES: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// The part of `config.json` that is about credentials.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    username: String,
    password: String,
    auth: String,
    identitytoken: String,
    registrytoken: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Auth(…)")
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// The file or a helper could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerConfigError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is longer than {LONGEST_FILE} bytes", path.display())]
    TooLong { path: PathBuf },
    #[error("{} is not a docker configuration", path.display())]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("the credentials of {key} in docker's configuration")]
    Auth {
        key: String,
        source: super::credentials::BadAuthField,
    },
    #[error("{helper:?} is not the name of a credential helper")]
    HelperName { helper: String },
    #[error("the credential helper docker-credential-{helper} cannot be run")]
    Run { helper: String, source: io::Error },
    #[error("the credential helper docker-credential-{helper} did not answer within {} s", HELPER_DEADLINE.as_secs())]
    Deadline { helper: String },
    #[error("the credential helper docker-credential-{helper} failed: {message}")]
    Failed { helper: String, message: String },
    #[error("the credential helper docker-credential-{helper} gave an answer that cannot be read")]
    Answer { helper: String },
}

impl DockerConfig {
    /// Reads the file; one that is not there has no credentials. Blocks.
    pub fn read(path: &Path) -> Result<DockerConfig, DockerConfigError> {
        let at = |source| DockerConfigError::Read {
            path: path.to_owned(),
            source,
        };
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(DockerConfig::default()),
            Err(error) => return Err(at(error)),
            Ok(metadata) if metadata.len() > LONGEST_FILE => {
                return Err(DockerConfigError::TooLong {
                    path: path.to_owned(),
                });
            }
            Ok(_) => {}
        }
        let bytes = std::fs::read(path).map_err(at)?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(DockerConfig::default());
        }
        let parsed = serde_json::from_slice(&bytes);
        parsed.map_err(|source| DockerConfigError::Parse {
            path: path.to_owned(),
            source,
        })
    }

    /// The credentials for a repository of a registry host: of its own helper, else of the common store, else
    /// written in the file.
    pub async fn credentials(
        &self,
        host: &str,
        repository: &str,
    ) -> Result<Option<Credentials>, DockerConfigError> {
        let hub = DOCKER_HUB_NAMES.contains(&host);
        let helper = names(host)
            .find_map(|name| self.helpers.get(&name))
            .filter(|helper| !helper.is_empty());
        let helper = helper.or((!self.store.is_empty()).then_some(&self.store));
        if let Some(helper) = helper {
            let server = if hub { DOCKER_HUB_KEY } else { host };
            if let Some(credentials) = ask(helper, server).await? {
                return Ok(Some(credentials));
            }
        }
        let Some((key, auth)) = self.entry(host, repository) else {
            return Ok(None);
        };
        let fields = AuthFields {
            username: &auth.username,
            password: &auth.password,
            auth: &auth.auth,
            identity_token: &auth.identitytoken,
            registry_token: &auth.registrytoken,
        };
        Credentials::from_fields(&fields).map_err(|source| DockerConfigError::Auth {
            key: key.to_owned(),
            source,
        })
    }

    /// The entry that fits best: `host/repository/prefix` before `host`, in whichever way its key is written.
    fn entry(&self, host: &str, repository: &str) -> Option<(&str, &Auth)> {
        let fits = |key: &str| -> Option<usize> {
            let (key_host, path) = match bare(key).split_once('/') {
                None => (bare(key), ""),
                Some((key_host, path)) => (key_host, path.trim_end_matches('/')),
            };
            let path = if matches!(path, "v1" | "v2") { "" } else { path };
            if !names(host).any(|name| name == key_host) {
                return None;
            }
            let within = path.is_empty()
                || repository
                    .strip_prefix(path)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            within.then_some(path.len())
        };
        let fitting = self
            .auths
            .iter()
            .filter_map(|(key, auth)| Some((fits(key)?, key, auth)));
        fitting
            .max_by_key(|(length, ..)| *length)
            .map(|(_, key, auth)| (key.as_str(), auth))
    }
}

fn bare(key: &str) -> &str {
    key.strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key)
}

/// The names one registry goes by.
fn names(host: &str) -> impl Iterator<Item = String> {
    let hub = DOCKER_HUB_NAMES.contains(&host);
    let hub_names = DOCKER_HUB_NAMES
        .iter()
        .map(|n| (*n).to_owned())
        .chain([DOCKER_HUB_KEY.to_owned()]);
    let mut names: Vec<String> = vec![host.to_owned()];
    if hub {
        names.extend(hub_names);
    }
    names.into_iter()
}

/// Asks a helper; `None` when it knows no credentials for the server.
async fn ask(helper: &str, server: &str) -> Result<Option<Credentials>, DockerConfigError> {
    let plain = helper
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if helper.is_empty() || !plain {
        return Err(DockerConfigError::HelperName {
            helper: helper.to_owned(),
        });
    }
    let helper = helper.to_owned();
    match tokio::time::timeout(HELPER_DEADLINE, run(&helper, server)).await {
        Err(_) => Err(DockerConfigError::Deadline { helper }),
        Ok(Err(source)) => Err(DockerConfigError::Run { helper, source }),
        Ok(Ok((true, out))) => {
            let answer: HelperAnswer =
                serde_json::from_slice(&out).map_err(|_| DockerConfigError::Answer { helper })?;
            Ok(match (answer.username.as_str(), answer.secret) {
                ("", secret) if secret.is_empty() => None,
                ("<token>", token) => Some(Credentials::Identity { token }),
                (username, password) => Some(Credentials::basic(username, password)),
            })
        }
        Ok(Ok((false, out))) => {
            let message: String = String::from_utf8_lossy(&out).trim().chars().take(200).collect();
            // The helper protocol tells "none" from failure only by this text.
            match message.contains("credentials not found in native keychain") {
                true => Ok(None),
                false => Err(DockerConfigError::Failed { helper, message }),
            }
        }
    }
}

async fn run(helper: &str, server: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut child = tokio::process::Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(pid) = child.id() {
        usual_descriptors(pid);
    }
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    if let Some(mut stdin) = stdin {
        // A helper that does not read its input is allowed to.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut out = Vec::new();
    if let Some(stdout) = stdout {
        stdout.take(LONGEST_ANSWER).read_to_end(&mut out).await?;
    }
    Ok((child.wait().await?.success(), out))
}

/// Takes a helper's soft limit of descriptors back to the usual while it waits for its input: whoever runs us may have raised
/// its own, and programs that look at each possible descriptor, or use select(2), break with more.
fn usual_descriptors(pid: u32) {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    const USUAL: u64 = 1024;
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(maximum.map_or(USUAL, |most| USUAL.min(most)));
    // Where that is refused it has what we have.
    let _ = prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum });
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn find(config: &str, host: &str, repository: &str) -> Option<Credentials> {
        let config: DockerConfig = serde_json::from_str(config).unwrap();
        config.credentials(host, repository).await.unwrap()
    }

    #[tokio::test]
    async fn an_entry_is_found_by_host_however_its_key_is_written() {
        for key in [
            "h.x:5000",
            "https://h.x:5000",
            "http://h.x:5000/",
            "https://h.x:5000/v1/",
            "h.x:5000/v2/",
        ] {
            let config = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpw"}}}}}}"#);
            assert_eq!(
                find(&config, "h.x:5000", "a").await,
                Some(Credentials::basic("u", "p")),
                "{key}"
            );
            assert_eq!(find(&config, "h.x", "a").await, None, "{key}");
        }
    }

    #[tokio::test]
    async fn docker_hub_goes_by_several_names() {
        let config =
            r#"{"auths":{"https://index.docker.io/v1/":{"username":"u","password":"p"}},"HttpHeaders":{}}"#;
        for host in ["docker.io", "registry-1.docker.io", "index.docker.io"] {
            assert_eq!(
                find(config, host, "library/x").await,
                Some(Credentials::basic("u", "p"))
            );
        }
    }

    #[tokio::test]
    async fn the_longest_repository_prefix_wins() {
        let config =
            r#"{"auths":{"h.x":{"auth":"YTph"},"h.x/team":{"auth":"Yjpi"},"h.x/team/app":{"auth":"Yzpj"}}}"#;
        for (repository, who) in [
            ("other", "a"),
            ("team", "b"),
            ("team/x", "b"),
            ("team/app/y", "c"),
            ("teams", "a"),
        ] {
            assert_eq!(
                find(config, "h.x", repository).await,
                Some(Credentials::basic(who, who)),
                "{repository}"
            );
        }
    }

    #[tokio::test]
    async fn identity_tokens_are_read() {
        let config = r#"{"auths":{"h.x":{"auth":"dTo=","identitytoken":"t"}}}"#;
        assert_eq!(
            find(config, "h.x", "a").await,
            Some(Credentials::Identity { token: "t".into() })
        );
    }

    #[tokio::test]
    async fn a_helper_name_is_not_a_path_and_a_missing_helper_is_named() {
        for helper in ["../evil", "a/b", "a b"] {
            let config: DockerConfig =
                serde_json::from_str(&format!(r#"{{"credsStore":"{helper}"}}"#)).unwrap();
            let error = config.credentials("h.x", "a").await.unwrap_err();
            assert!(matches!(error, DockerConfigError::HelperName { .. }), "{error}");
        }
        let config: DockerConfig = serde_json::from_str(r#"{"credHelpers":{"h.x":"slipway-none"}}"#).unwrap();
        let error = config.credentials("h.x", "a").await.unwrap_err();
        assert!(
            error.to_string().contains("docker-credential-slipway-none"),
            "{error}"
        );
        assert_eq!(
            config.credentials("other", "a").await.unwrap(),
            None,
            "only for its own host"
        );
    }

    /// Run by the test below, with a helper of its making on the PATH.
    #[tokio::test]
    #[ignore = "the child of another test"]
    async fn as_a_child_with_helpers() {
        let find = async |host: &str| {
            let config =
                r#"{"credHelpers":{"own.x":"one"},"credsStore":"all","auths":{"file.x":{"auth":"dTpw"}}}"#;
            let config: DockerConfig = serde_json::from_str(config).unwrap();
            config.credentials(host, "a").await
        };
        assert_eq!(
            find("own.x").await.unwrap(),
            Some(Credentials::basic("own.x", "one"))
        );
        assert_eq!(
            find("docker.io").await.unwrap(),
            Some(Credentials::Identity {
                token: DOCKER_HUB_KEY.into()
            })
        );
        assert_eq!(
            find("file.x").await.unwrap(),
            Some(Credentials::basic("u", "p")),
            "the store does not know it"
        );
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let maximum = getrlimit(Resource::Nofile).maximum;
        let current = maximum;
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
        let limit = maximum.map_or(1024, |most| most.min(1024)).to_string();
        assert_eq!(
            find("limits.x").await.unwrap(),
            Some(Credentials::basic("limit", &limit)),
            "a limit that we have raised for ourselves is not the helper's"
        );
        let error = find("broken.x").await.unwrap_err().to_string();
        assert!(
            error.contains("docker-credential-all") && error.contains("the keychain is locked"),
            "{error}"
        );
    }

    #[test]
    fn helpers_are_asked_before_the_file_and_their_failure_is_told() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let helper = |name: &str, script: &str| {
            let path = dir.path().join(format!("docker-credential-{name}"));
            std::fs::write(
                &path,
                format!("#!/bin/sh\n[ \"$1\" = get ] || exit 9\nread host\n{script}\n"),
            )
            .unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        helper(
            "one",
            r#"echo "{\"ServerURL\":\"x\",\"Username\":\"$host\",\"Secret\":\"one\"}""#,
        );
        let all = r#"case "$host" in
            file.x) echo "credentials not found in native keychain"; exit 1;;
            limits.x) echo "{\"Username\":\"limit\",\"Secret\":\"$(ulimit -Sn)\"}";;
            broken.x) echo "the keychain is locked"; exit 1;;
            *) echo "{\"Username\":\"<token>\",\"Secret\":\"$host\"}";;
        esac"#;
        helper("all", all);
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "registry::docker_config::tests::as_a_child_with_helpers",
            ])
            .env("PATH", path)
            .output()
            .unwrap();
        assert!(
            child.status.success(),
            "{}",
            String::from_utf8_lossy(&child.stdout)
        );
        assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
    }

    #[test]
    fn a_file_that_is_not_there_has_no_credentials_and_a_broken_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert!(DockerConfig::read(&path).unwrap().auths.is_empty());
        std::fs::write(&path, "{").unwrap();
        let error = DockerConfig::read(&path).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }
}
