//! Debian's docker-registry, on a port and in a directory of its own; stopped by its pid.

use super::image::Made;
use std::io::Write as _;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// `secret` for `me`, in bcrypt.
const HTPASSWD: &str = "me:$2b$04$MIh.45zeNaixB4DP3TFLNe9ZrCg97VwBaDWF.aI6sHBRsIo4XEnJ6\n";

pub struct Registry {
    child: Child,
    pub dir: TempDir,
    pub host: String,
    user: Option<(&'static str, &'static str)>,
}

impl Registry {
    /// Starts it; `None`, loudly, where it is not installed.
    pub fn start(password: bool) -> Option<Registry> {
        Registry::start_with(if password { HTPASSWD } else { "" }, "")
    }

    /// Starts it with users and with more lines under `http:`.
    pub fn start_with(htpasswd: &str, http: &str) -> Option<Registry> {
        for _ in 0..5 {
            match Registry::try_start(htpasswd, http) {
                Start::Up(registry) => return Some(registry),
                Start::Missing => {
                    let _ = writeln!(std::io::stderr(), "SKIPPED: docker-registry is not installed");
                    return None;
                }
                // Somebody else was faster with the port.
                Start::Died => {}
            }
        }
        panic!("docker-registry does not start");
    }

    fn try_start(htpasswd: &str, http: &str) -> Start {
        let dir = tempfile::Builder::new()
            .prefix("slipway-test-registry-")
            .tempdir()
            .unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let host = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {host}\n{http}",
            dir.path().join("data").display()
        );
        if !htpasswd.is_empty() {
            let file = dir.path().join("htpasswd");
            std::fs::write(&file, htpasswd).unwrap();
            config.push_str(&format!(
                "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
                file.display()
            ));
        }
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = spawned else {
            return Start::Missing;
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if std::net::TcpStream::connect(&host).is_ok() {
                return Start::Up(Registry {
                    child,
                    dir,
                    host,
                    user: (!htpasswd.is_empty()).then_some(("me", "secret")),
                });
            }
            if child.try_wait().unwrap().is_some() {
                return Start::Died;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        Start::Died
    }

    pub fn reference(&self, rest: &str) -> slipway_image::Reference {
        slipway_image::Reference::parse(&format!("{}/{rest}", self.host)).unwrap()
    }

    /// Puts an image there by hand, without any of our code.
    pub async fn put(&self, repository: &str, tag: &str, image: &Made) {
        let config = (slipway_image::Digest::of(&image.config), image.config.clone());
        let blobs = image
            .layers
            .iter()
            .map(|layer| (layer.digest, layer.bytes.clone()))
            .chain([config]);
        for (digest, bytes) in blobs {
            self.put_blob(repository, &digest.to_string(), bytes).await;
        }
        self.put_manifest(repository, tag, &image.manifest, &image.media_type)
            .await;
    }

    async fn put_blob(&self, repository: &str, digest: &str, bytes: Vec<u8>) {
        let client = client();
        let url = format!("http://{}/v2/{repository}/blobs/uploads/", self.host);
        let opened = self.send(client.post(url).header("content-length", "0")).await;
        let location = opened.headers()["location"].to_str().unwrap().to_owned();
        let answer = self
            .send(client.put(format!("{location}&digest={digest}")).body(bytes))
            .await;
        assert_eq!(answer.status(), 201);
    }

    pub async fn put_manifest(&self, repository: &str, tag: &str, bytes: &[u8], media_type: &str) {
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.host);
        let request = client()
            .put(url)
            .header("content-type", media_type)
            .body(bytes.to_vec());
        let answer = self.send(request).await;
        assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    }

    /// What it answers to a GET: status and body.
    pub async fn get(&self, path: &str) -> (u16, Vec<u8>) {
        let url = format!("http://{}/v2/{path}", self.host);
        let accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
        let answer = self.send(client().get(url).header("accept", accept)).await;
        (answer.status().as_u16(), answer.bytes().await.unwrap().to_vec())
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> reqwest::Response {
        let request = match self.user {
            Some((user, password)) => request.basic_auth(user, Some(password)),
            None => request,
        };
        request.send().await.unwrap()
    }
}

fn client() -> reqwest::Client {
    // A process may have one default provider; that it is there already is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

enum Start {
    Up(Registry),
    Missing,
    Died,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
