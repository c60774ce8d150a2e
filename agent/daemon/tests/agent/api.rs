//! A stand-in for the API server: one node, pods without end, the Events that it was told, and the pods that were evicted.

use std::collections::BTreeMap;
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

/// What comes of an eviction.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Evicts {
    #[default]
    Always,
    /// A disruption budget lets nobody go.
    Blocked,
    /// Two of them name the pod, which is told as the result of a request that succeeded.
    TwoBudgets,
    /// The server has too much to do.
    Busy,
}

#[derive(Default)]
struct State {
    node: Value,
    events: Vec<Value>,
    /// Refuses everything with this.
    refuses: Option<u16>,
    /// Refuses to change what is at a path that ends so.
    denies: Option<(&'static str, u16)>,
    requests: usize,
    /// Pods that are not as any other, by name.
    pods: BTreeMap<String, Value>,
    /// "evict NAME UID", "delete NAME UID".
    taken: Vec<String>,
    evicts: Evicts,
    /// Refuses to delete anything with this.
    keeps: Option<u16>,
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
    if let Some((end, code)) = state.denies
        && method == Method::PATCH
        && path.ends_with(end)
    {
        return (
            code,
            json!({ "kind": "Status", "message": format!("cannot patch {end}") }),
        );
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
            let any = json!({ "metadata": { "name": name, "namespace": namespace, "uid": uid } });
            let pod = state.pods.get(*name).cloned().unwrap_or(any);
            match pod {
                Value::Null => (404, json!({ "message": "no such pod" })),
                pod => (200, pod),
            }
        }
        ("POST", ["api", "v1", "namespaces", _, "pods", name, "eviction"]) => {
            if body["kind"] != "Eviction" || body["metadata"]["name"] != *name {
                return (400, json!({ "message": "it is no eviction of this pod" }));
            }
            match state.evicts {
                Evicts::Always => {}
                Evicts::Blocked => {
                    let causes = [json!({ "reason": "DisruptionBudget", "message": "The budget needs 1" })];
                    return (
                        429,
                        json!({ "kind": "Status", "status": "Failure", "code": 429, "details": { "causes": causes },
                                "message": "Cannot evict pod as it would violate the budget" }),
                    );
                }
                Evicts::TwoBudgets => {
                    return (
                        201,
                        json!({ "kind": "Status", "status": "Failure", "code": 500,
                                "message": "This pod has more than one PodDisruptionBudget" }),
                    );
                }
                Evicts::Busy => {
                    return (
                        429,
                        json!({ "kind": "Status", "status": "Failure", "message": "too many requests" }),
                    );
                }
            }
            take(state, "evict", name, &body["deleteOptions"])
        }
        ("DELETE", ["api", "v1", "namespaces", _, "pods", name]) => match state.keeps {
            Some(code) => (code, json!({ "message": "not now" })),
            None => take(state, "delete", name, body),
        },
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

/// Takes a pod away.
fn take(state: &mut State, verb: &str, name: &str, options: &Value) -> (u16, Value) {
    let Some(pod) = state.pods.get_mut(name) else {
        return (404, json!({ "message": "no such pod" }));
    };
    let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
    if options["preconditions"]["uid"] != *uid || !options["gracePeriodSeconds"].is_null() {
        return (409, json!({ "message": "another UID" }));
    }
    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    state.taken.push(format!("{verb} {name} {uid}"));
    (201, json!({}))
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

    /// A pod with one container, "main"; `id`: of the container.
    pub fn pod(&self, name: &str, uid: &str, policy: &str, id: &str) {
        let pod = json!({
            "metadata": { "name": name, "namespace": "jobs", "uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "nodeName": NODE, "restartPolicy": policy, "containers": [{ "name": "main" }] },
            "status": { "phase": "Running", "containerStatuses": [{ "name": "main", "containerID": format!("slipway://{id}") }] },
        });
        self.state.lock().unwrap().pods.insert(name.to_owned(), pod);
    }

    /// Changes a pod.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        change(self.state.lock().unwrap().pods.get_mut(name).unwrap());
    }

    /// What the node says that it can hand out.
    pub fn allocatable(&self, resource: &str, count: usize) {
        let mut state = self.state.lock().unwrap();
        state.node["status"]["allocatable"][resource] = json!(count.to_string());
    }

    /// Which pods were taken away, how, in order.
    pub fn taken(&self) -> Vec<String> {
        self.state.lock().unwrap().taken.clone()
    }

    pub fn evicts(&self, how: Evicts) {
        self.state.lock().unwrap().evicts = how;
    }

    pub fn keep(&self, code: Option<u16>) {
        self.state.lock().unwrap().keeps = code;
    }

    pub fn refuse(&self, code: Option<u16>) {
        self.state.lock().unwrap().refuses = code;
    }

    pub fn deny(&self, path: Option<(&'static str, u16)>) {
        self.state.lock().unwrap().denies = path;
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
