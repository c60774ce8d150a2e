//! A stand-in for the API server: one node, pods without end, and the Events that it was told.

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

pub const NODE: &str = "node1";

#[derive(Default)]
struct State {
    node: Value,
    events: Vec<Value>,
    /// Refuses everything with this.
    refuses: Option<u16>,
    requests: usize,
}

pub struct Api {
    state: Arc<Mutex<State>>,
    server: tokio::task::JoinHandle<()>,
    pub port: u16,
}

/// RFC 7386.
fn merge(into: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => drop(into.as_object_mut().unwrap().remove(key)),
            value => merge(&mut into[key], value),
        }
    }
}

fn answer(state: &mut State, method: &Method, path: &str, kind: &str, body: &Value) -> (u16, Value) {
    state.requests += 1;
    if let Some(code) = state.refuses {
        return (code, json!({ "kind": "Status", "message": "not now" }));
    }
    let node = format!("/api/v1/nodes/{NODE}");
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match (method.as_str(), parts.as_slice()) {
        ("GET", _) if path == node => (200, state.node.clone()),
        ("PATCH", _) if path == node && kind == "application/merge-patch+json" => {
            merge(&mut state.node, body);
            (200, state.node.clone())
        }
        ("PATCH", _)
            if path == format!("{node}/status") && kind == "application/strategic-merge-patch+json" =>
        {
            for new in body["status"]["conditions"].as_array().unwrap() {
                let all = state.node["status"]["conditions"].as_array_mut().unwrap();
                all.retain(|c| c["type"] != new["type"]);
                all.push(new.clone());
            }
            (200, state.node.clone())
        }
        ("GET", ["api", "v1", "namespaces", namespace, "pods", name]) => {
            let uid = format!("uid-of-{name}");
            (
                200,
                json!({ "metadata": { "name": name, "namespace": namespace, "uid": uid } }),
            )
        }
        ("POST", ["api", "v1", "namespaces", namespace, "events"]) => {
            if body["metadata"]["namespace"] != *namespace || body["involvedObject"]["uid"] == "" {
                return (
                    422,
                    json!({ "message": "it is not of this namespace, or of nothing" }),
                );
            }
            let name = &body["metadata"]["name"];
            if state.events.iter().any(|e| e["metadata"]["name"] == *name) {
                return (409, json!({ "message": "it exists" }));
            }
            state.events.push(body.clone());
            (201, body.clone())
        }
        _ => (404, json!({ "message": format!("{method} {path} {kind}") })),
    }
}

impl Api {
    /// Serves on a port; 0: any.
    pub async fn serve(port: u16) -> Api {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State {
            node: json!({
                "metadata": { "name": NODE, "labels": { "nvidia.com/mig-9g.count": "1", "mine": "stays", "nvidia.com/gpu.machine": "stays" } },
                "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
            }),
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let state = Arc::clone(&state);
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes();
                        let body = serde_json::from_slice(&body).unwrap_or_default();
                        let header = |name: &str| {
                            let value = head.headers.get(name);
                            value.map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
                        };
                        let (code, value) = match header("authorization").as_str() {
                            "Bearer secret" => {
                                let mut state = state.lock().unwrap();
                                answer(
                                    &mut state,
                                    &head.method,
                                    head.uri.path(),
                                    &header("content-type"),
                                    &body,
                                )
                            }
                            _ => (401, json!({ "message": "who are you?" })),
                        };
                        let response = Response::builder().status(code);
                        Ok::<_, Infallible>(response.body(Full::new(Bytes::from(value.to_string()))).unwrap())
                    }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Api { state, server, port }
    }

    /// Writes a kubeconfig for it.
    pub fn kubeconfig(path: &Path, port: u16) {
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster:\n    server: http://127.0.0.1:{port}\nusers:\n- name: u\n  user: {{token: secret}}\ncontexts:\n- name: x\n  context: {{cluster: c, user: u}}\ncurrent-context: x\n"
        );
        std::fs::write(path, text).unwrap();
    }

    pub fn label(&self, name: &str) -> Option<String> {
        let state = self.state.lock().unwrap();
        state.node["metadata"]["labels"][name].as_str().map(str::to_owned)
    }

    /// A condition's field.
    pub fn condition(&self, field: &str) -> Option<String> {
        let state = self.state.lock().unwrap();
        let mut all = state.node["status"]["conditions"].as_array().unwrap().iter();
        let ours = all.find(|c| c["type"] == "GpuUnhealthy")?;
        ours[field].as_str().map(str::to_owned)
    }

    /// Of an object: reason and message.
    pub fn events(&self, object: &str) -> Vec<(String, String)> {
        let state = self.state.lock().unwrap();
        let of = |e: &&Value| e["involvedObject"]["name"] == object;
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let mine = state.events.iter().filter(of);
        mine.map(|e| (text(&e["reason"]), text(&e["message"]))).collect()
    }

    pub fn event(&self, object: &str) -> Value {
        let state = self.state.lock().unwrap();
        let mut all = state.events.iter();
        all.find(|e| e["involvedObject"]["name"] == object)
            .cloned()
            .unwrap_or_default()
    }

    pub fn refuse(&self, code: Option<u16>) {
        self.state.lock().unwrap().refuses = code;
    }

    pub fn requests(&self) -> usize {
        self.state.lock().unwrap().requests
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.server.abort();
    }
}
