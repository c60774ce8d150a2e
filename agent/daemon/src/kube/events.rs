//! What is said in Kubernetes' own words: Events on pods and on the node, and the node's condition. Pure.

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::incident::Incident;
use crate::pods::Holder;

/// The condition's type: True is bad, as with the node's pressures.
pub const CONDITION: &str = "GpuUnhealthy";
/// Who says it.
const COMPONENT: &str = "slipway-agent";
/// Longest message.
const MAX_MESSAGE: usize = 1000;

/// An Event to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Of a pod's container; none: of the node.
    pub about: Option<Holder>,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Whether it is bad.
    pub warning: bool,
    /// When it was, in seconds since 1970.
    pub at: u64,
}

impl Note {
    /// What makes two of them the same thing told twice.
    pub fn key(&self) -> (Option<Holder>, &'static str, String) {
        (self.about.clone(), self.reason, self.message.clone())
    }

    /// The object; `name` makes it one, however often it is sent.
    pub fn event(&self, name: &str, node: &str, uid: &str) -> Value {
        let (namespace, involved) = match &self.about {
            Some(h) => (
                h.namespace.as_str(),
                json!({
                    "kind": "Pod", "apiVersion": "v1", "namespace": h.namespace, "name": h.pod, "uid": uid,
                    "fieldPath": format!("spec.containers{{{}}}", h.container),
                }),
            ),
            // As kubelet does: a node is known by its name.
            None => (
                "default",
                json!({ "kind": "Node", "apiVersion": "v1", "name": node, "uid": node }),
            ),
        };
        let at = stamp(self.at);
        json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": { "name": name, "namespace": namespace },
            "involvedObject": involved,
            "reason": self.reason,
            "message": cut(&self.message),
            "type": if self.warning { "Warning" } else { "Normal" },
            "source": { "component": COMPONENT, "host": node },
            "reportingComponent": COMPONENT, "reportingInstance": node,
            "firstTimestamp": at, "lastTimestamp": at, "count": 1,
        })
    }
}

/// As Kubernetes writes a time.
pub fn stamp(seconds: u64) -> String {
    let at = i64::try_from(seconds)
        .ok()
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    at.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_default()
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The Events of an XID: on the pod of the process that was at it, and on every pod that has the GPU when it is condemned.
pub fn notes(incident: &Incident, at: u64) -> Vec<Note> {
    let xid = &incident.xid;
    let gpu = format!("GPU {} ({})", xid.gpu.index, xid.gpu.uuid);
    let process = match &incident.process {
        Some((pid, Some(name))) => format!(", process {pid} ({name})"),
        Some((pid, None)) => format!(", process {pid}"),
        None => String::new(),
    };
    let note = |about: &Holder, reason, message| Note {
        about: Some(about.clone()),
        reason,
        message,
        warning: true,
        at,
    };
    // The reason begins with the XID, which is told already.
    let condemned = xid.condemned.as_deref().unwrap_or_default();
    let why = match condemned.strip_prefix(&format!("XID {}", xid.xid)) {
        Some(rest) => rest.to_owned(),
        None => format!(": {condemned}"),
    };
    let mut all = Vec::new();
    if let Some(culprit) = &incident.culprit {
        let end = match &xid.condemned {
            Some(_) => format!("the GPU is not handed out any more{why}"),
            None => "the GPU is well".to_owned(),
        };
        all.push(note(
            culprit,
            "GpuXid",
            format!("XID {} on {gpu}{process}: {end}", xid.xid),
        ));
    }
    let hit = incident.holders.iter().filter(|_| xid.condemned.is_some());
    for holder in hit.filter(|h| !is_same(h, incident.culprit.as_ref())) {
        let message = format!(
            "{gpu}, which this container has, is unhealthy (XID {}{process}){why}",
            xid.xid
        );
        all.push(note(holder, "GpuUnhealthy", message));
    }
    all
}

fn is_same(one: &Holder, other: Option<&Holder>) -> bool {
    let key = |h: &Holder| (h.namespace.clone(), h.pod.clone(), h.container.clone());
    other.is_some_and(|o| key(o) == key(one))
}

/// The node's condition: whether GPUs are sick, which ones, and since when it is so.
pub fn condition(sick: &[(String, String)], since: &str, now: &str) -> Value {
    let all: Vec<String> = sick.iter().map(|(gpu, why)| format!("{gpu}: {why}")).collect();
    let (status, reason, message) = match all.is_empty() {
        true => ("False", "GpusHealthy", "every GPU may be handed out".to_owned()),
        false => ("True", "GpusUnhealthy", cut(&all.join("; "))),
    };
    json!({
        "type": CONDITION, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": since, "lastHeartbeatTime": now,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::incident::Xid;
    use slipway_gpu::Gpu;

    fn holder(pod: &str) -> Holder {
        Holder {
            namespace: "jobs".into(),
            pod: pod.into(),
            container: "main".into(),
            uid: None,
        }
    }

    fn incident(culprit: Option<&str>, holders: &[&str], condemned: Option<&str>) -> Incident {
        Incident {
            xid: Xid {
                gpu: Gpu {
                    uuid: "GPU-1".into(),
                    ..Gpu::default()
                },
                xid: 79,
                instance: None,
                condemned: condemned.map(str::to_owned),
            },
            process: culprit.map(|_| (7, None)),
            culprit: culprit.map(holder),
            holders: holders.iter().map(|h| holder(h)).collect(),
        }
    }

    #[test]
    fn who_did_it_is_told_once_and_who_is_hit_only_when_the_gpu_is() {
        let pods = |i: &Incident| -> Vec<String> {
            let all = notes(i, 1);
            all.iter()
                .map(|n| format!("{} {}", n.about.as_ref().map_or("", |h| &h.pod), n.reason))
                .collect()
        };
        assert_eq!(pods(&incident(Some("a"), &["a", "b"], None)), ["a GpuXid"]);
        assert_eq!(
            pods(&incident(Some("a"), &["a", "b"], Some("XID 79"))),
            ["a GpuXid", "b GpuUnhealthy"]
        );
        assert_eq!(pods(&incident(None, &["b"], Some("XID 79"))), ["b GpuUnhealthy"]);
        assert!(pods(&incident(None, &["b"], None)).is_empty());
    }

    #[test]
    fn an_event_says_the_xid_once() {
        let said = |condemned| -> Vec<String> {
            let all = notes(&incident(Some("a"), &["a", "b"], Some(condemned)), 1);
            all.into_iter().map(|n| n.message).collect()
        };
        assert_eq!(
            said("XID 79"),
            [
                "XID 79 on GPU 0 (GPU-1), process 7: the GPU is not handed out any more",
                "GPU 0 (GPU-1), which this container has, is unhealthy (XID 79, process 7)",
            ]
        );
        assert_eq!(
            said("XID 79: the driver asks for a reset"),
            [
                "XID 79 on GPU 0 (GPU-1), process 7: the GPU is not handed out any more: the driver asks for a reset",
                "GPU 0 (GPU-1), which this container has, is unhealthy (XID 79, process 7): the driver asks for a reset",
            ]
        );
    }

    #[test]
    fn an_event_is_what_kubernetes_takes() {
        let note = Note {
            about: Some(holder("one")),
            reason: "GpuXid",
            message: "ü".repeat(2000),
            warning: true,
            at: 1_800_000_000,
        };
        let event = note.event("one.1", "node1", "uid-1");
        assert_eq!(event["involvedObject"]["fieldPath"], "spec.containers{main}");
        assert_eq!(event["metadata"]["namespace"], "jobs");
        assert_eq!(event["firstTimestamp"], "2027-01-15T08:00:00Z");
        assert_eq!(
            event["message"].as_str().map(|m| m.chars().count()),
            Some(MAX_MESSAGE + 1)
        );
        let node = Note { about: None, ..note }.event("n.1", "node1", "");
        assert_eq!(
            (
                node["involvedObject"]["uid"].as_str(),
                node["metadata"]["namespace"].as_str()
            ),
            (Some("node1"), Some("default"))
        );
    }
}
