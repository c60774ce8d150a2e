//! A GPU that is sick since a moment, whom that concerns, and how far that has come. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use slipway_fault_api::MAX_MESSAGE;
use slipway_gpu::health::{Unhealthy, Work};

use crate::pods::{Holder, Snapshot};

/// One GPU's case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The GPU's UUID.
    pub gpu: String,
    /// Its index, for people.
    pub index: u32,
    /// Since when it is sick: with the UUID, what tells cases apart. Seconds since 1970, as the next.
    pub since: u64,
    /// When the case was opened.
    pub opened: u64,
    /// The XID that condemned it; none: it is lost.
    pub xid: Option<u64>,
    /// The same, for people.
    pub why: String,
    /// The containers that have it; none: not known yet.
    pub targets: Option<Vec<Target>>,
}

/// A container that has the GPU, and how far it has come with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub namespace: String,
    pub pod: String,
    /// The pod's UID, when kubelet tells.
    pub uid: Option<String>,
    pub container: String,
    /// The container's id without its scheme; none: not known yet, or it is not there yet.
    pub id: Option<String>,
    /// The runtime knows why it will end: it is ended, whatever becomes of the GPU.
    pub announced: bool,
    /// Nothing is left to be done.
    pub done: bool,
}

impl Case {
    /// That a GPU is sick; none: work on it can go on. `lost`: it has not answered for long.
    pub fn of(gpu: &str, index: u32, sick: &Unhealthy, lost: bool, now: u64) -> Option<Case> {
        let over = sick.work == Work::Over || sick.work == Work::Silent && lost;
        over.then(|| Case {
            gpu: gpu.to_owned(),
            index,
            since: sick.since,
            opened: now,
            xid: sick.xid,
            why: sick.reason.clone(),
            targets: None,
        })
    }

    /// Whether it is about this illness of the GPU.
    pub fn is_about(&self, gpu: &str, sick: &Unhealthy) -> bool {
        self.gpu == gpu && self.since == sick.since
    }

    /// Whether there is nothing left to be done.
    pub fn is_done(&self) -> bool {
        self.targets
            .as_ref()
            .is_some_and(|all| all.iter().all(|t| t.done))
    }

    /// In one word: what the container's status says.
    pub fn reason(&self) -> String {
        match self.xid {
            Some(xid) => format!("GpuXid{xid}"),
            None => "GpuLost".to_owned(),
        }
    }

    /// What the container's status says beside it.
    pub fn message(&self) -> String {
        let said = format!("GPU {} ({}) is sick: {}", self.index, self.gpu, self.why);
        let mut text: String = said.chars().filter(|c| !c.is_control()).collect();
        text.truncate(text.floor_char_boundary(MAX_MESSAGE));
        text
    }
}

impl Target {
    /// A holder as kubelet tells it now.
    pub fn of(holder: &Holder, snapshot: &Snapshot) -> Target {
        Target {
            namespace: holder.namespace.clone(),
            pod: holder.pod.clone(),
            uid: holder.uid.clone(),
            container: holder.container.clone(),
            id: snapshot.id_of(holder).map(str::to_owned),
            announced: false,
            done: false,
        }
    }

    /// For Events.
    pub fn holder(&self) -> Holder {
        Holder {
            namespace: self.namespace.clone(),
            pod: self.pod.clone(),
            container: self.container.clone(),
            uid: self.uid.clone(),
        }
    }
}

/// What the API server says of a target's pod, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub uid: String,
    /// The container's id without its scheme, when it has one.
    pub id: Option<String>,
    /// It is being deleted already.
    pub leaves: bool,
    /// It has ended.
    pub ended: bool,
    /// From a file on the node: kubelet brings it back whatever the API server is told.
    pub is_static: bool,
    /// Kubelet would start the container again.
    pub restarts: bool,
}

impl Pod {
    /// Reads a Pod; none: it is another one of the same name.
    pub fn of(pod: &Value, target: &Target) -> Option<Pod> {
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        if target.uid.as_ref().is_some_and(|known| known != uid) {
            return None;
        }
        let named = |list: &Value| -> Option<Value> {
            let mut all = list.as_array().into_iter().flatten();
            all.find(|c| c["name"] == *target.container).cloned()
        };
        let either = |a: &Value, b: &Value| named(a).or_else(|| named(b)).unwrap_or_default();
        let (spec, status) = (&pod["spec"], &pod["status"]);
        let wanted = either(&spec["containers"], &spec["initContainers"]);
        let told = either(&status["containerStatuses"], &status["initContainerStatuses"]);
        let id = told["containerID"]
            .as_str()
            .and_then(|id| id.rsplit("://").next());
        let policy = wanted["restartPolicy"]
            .as_str()
            .or(spec["restartPolicy"].as_str())
            .unwrap_or("Always");
        let rules = wanted["restartPolicyRules"]
            .as_array()
            .is_some_and(|r| !r.is_empty());
        Some(Pod {
            uid: uid.to_owned(),
            id: id.filter(|id| !id.is_empty()).map(str::to_owned),
            leaves: pod["metadata"]["deletionTimestamp"].is_string(),
            ended: matches!(status["phase"].as_str(), Some("Succeeded" | "Failed")),
            is_static: pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_string(),
            restarts: policy != "Never" || rules,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn target() -> Target {
        Target {
            namespace: "jobs".into(),
            pod: "train-0".into(),
            uid: Some("u1".into()),
            container: "main".into(),
            id: None,
            announced: false,
            done: false,
        }
    }

    fn pod() -> Value {
        json!({
            "metadata": { "uid": "u1" },
            "spec": { "restartPolicy": "Never", "containers": [{ "name": "side" }, { "name": "main" }] },
            "status": { "phase": "Running", "containerStatuses": [
                { "name": "side", "containerID": "slipway://s" }, { "name": "main", "containerID": "slipway://m" },
            ] },
        })
    }

    #[test]
    fn a_pod_of_the_same_name_is_not_the_same_pod() {
        let mut other = pod();
        other["metadata"]["uid"] = "u2".into();
        assert_eq!(Pod::of(&other, &target()), None);
        let unknown = Target {
            uid: None,
            ..target()
        };
        assert_eq!(Pod::of(&other, &unknown).map(|p| p.uid), Some("u2".into()));
    }

    #[test]
    fn whether_the_container_is_started_again_is_its_own_policys_or_the_pods() {
        let read = |pod: &Value| Pod::of(pod, &target()).expect("the same pod");
        let plain = read(&pod());
        assert_eq!((plain.id.as_deref(), plain.restarts), (Some("m"), false));
        assert!(!plain.leaves && !plain.ended && !plain.is_static);
        for (path, value) in [
            ("/spec/restartPolicy", json!("OnFailure")),
            ("/spec/restartPolicy", json!("Always")),
            (
                "/spec/containers/1",
                json!({ "name": "main", "restartPolicy": "Always" }),
            ),
            (
                "/spec/containers/1",
                json!({ "name": "main", "restartPolicyRules": [{ "action": "Restart" }] }),
            ),
        ] {
            let mut other = pod();
            *other.pointer_mut(path).expect("a place") = value;
            assert!(read(&other).restarts, "{other}");
        }
        let mut own = pod();
        own["spec"]["restartPolicy"] = "OnFailure".into();
        own["spec"]["containers"][1]["restartPolicy"] = "Never".into();
        assert!(!read(&own).restarts);
    }

    #[test]
    fn what_is_said_of_it_is_a_word_and_a_message_that_slipwayd_takes() {
        let sick = Unhealthy {
            reason: format!("XID 79: {}\n\u{1b}", "ü".repeat(2000)),
            xid: Some(79),
            since: 5,
            sign: None,
            work: Work::Over,
        };
        let case = Case::of("GPU-1", 3, &sick, false, 7).expect("a case");
        assert_eq!(case.reason(), "GpuXid79");
        let message = case.message();
        assert!(message.starts_with("GPU 3 (GPU-1) is sick: XID 79"), "{message}");
        assert!(message.len() <= MAX_MESSAGE && !message.chars().any(char::is_control));
        assert!(case.is_about("GPU-1", &sick) && !case.is_about("GPU-2", &sick));
        let lost = Unhealthy {
            xid: None,
            work: Work::Silent,
            ..sick
        };
        assert_eq!(Case::of("GPU-1", 3, &lost, false, 7), None, "it may answer again");
        let case = Case::of("GPU-1", 3, &lost, true, 7).expect("a case");
        assert_eq!(case.reason(), "GpuLost");
        let sign = Unhealthy {
            work: Work::GoesOn,
            ..lost
        };
        assert_eq!(Case::of("GPU-1", 3, &sign, true, 7), None);
    }
}
