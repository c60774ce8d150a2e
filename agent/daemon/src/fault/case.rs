//! A GPU that is sick since a moment, whom that concerns, and how far that has come. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use slipway_fault_api::MAX_MESSAGE;
use slipway_gpu::health::{Unhealthy, Work};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::pods::{Holder, Snapshot};

/// The name that slipwayd gives itself (CRI's VersionResponse.runtime_name), and kubelet puts before the ids of its containers.
const SLIPWAYD: &str = "slipway";

/// What tells a case from every other: the GPU, since when it is sick, and whether only those are concerned who wait. A GPU on
/// which work could go on and then cannot is sick since the same moment, and is another case.
pub type Key = (String, u64, bool);

/// One GPU's case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The GPU's UUID.
    pub gpu: String,
    /// Its index, for people.
    pub index: u32,
    /// Since when it is sick. Seconds since 1970, as the next.
    pub since: u64,
    /// When the case was opened.
    pub opened: u64,
    /// The XID that condemned it; none: it is lost.
    pub xid: Option<u64>,
    /// The same, for people.
    pub why: String,
    /// Work on it may go on; a container that is not running waits for it, and only such are concerned.
    #[serde(default)]
    pub only_waiting: bool,
    /// The containers that have it; none: not known yet.
    pub targets: Option<Vec<Target>>,
}

/// A container that has the GPU, and how far it has come with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub namespace: String,
    pub pod: String,
    /// The pod's UID, as kubelet and the runtime have it; none: nobody has told it yet.
    pub uid: Option<String>,
    pub container: String,
    /// The container's id as Kubernetes has it, `RUNTIME://ID`; none: not known yet, or it is not there yet.
    pub id: Option<String>,
    /// The runtime knows why it will end: if it lives it is ended, whatever becomes of the GPU.
    pub announced: bool,
    /// It has ended, or the runtime will not rest until it has.
    #[serde(default)]
    pub killed: bool,
    /// Nothing is left to be done.
    pub done: bool,
}

impl Case {
    /// That a GPU is sick; none: work on it can go on. `lost`: it has not answered for long. `refused`: a container was kept
    /// from starting on it.
    pub fn of(
        (gpu, index): (&str, u32),
        sick: &Unhealthy,
        (lost, refused): (bool, bool),
        now: u64,
    ) -> Option<Case> {
        let over = sick.work == Work::Over || sick.work == Work::Silent && lost;
        (over || refused).then(|| Case {
            gpu: gpu.to_owned(),
            index,
            since: sick.since,
            opened: now,
            xid: sick.xid,
            why: sick.reason.clone(),
            only_waiting: !over,
            targets: None,
        })
    }

    /// What tells it from every other.
    pub fn key(&self) -> Key {
        (self.gpu.clone(), self.since, self.only_waiting)
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

    /// Whether somebody has been told of it.
    pub fn is_announced(&self) -> bool {
        self.targets.iter().flatten().any(|t| t.announced)
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
            killed: false,
            done: false,
        }
    }

    /// Whether it is the same container of the same pod, as far as that is known.
    pub fn is_of(&self, other: &Target) -> bool {
        let names = |t: &Target| (t.namespace.clone(), t.pod.clone(), t.container.clone());
        let uids = self.uid.is_none() || other.uid.is_none() || self.uid == other.uid;
        names(self) == names(other) && uids
    }

    /// Takes over what is known of the same container now and was not before.
    pub fn learn(&mut self, now: Target) {
        self.uid = self.uid.take().or(now.uid);
        self.id = self.id.take().or(now.id);
    }

    /// Whether another runtime than slipwayd has the container, on a node that has several: what slipwayd says of it means
    /// nothing.
    pub fn is_elsewhere(&self) -> bool {
        let runtime = self.id.as_ref().and_then(|id| id.split_once("://"));
        runtime.is_some_and(|(runtime, _)| runtime != SLIPWAYD)
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
    /// The object's UID.
    pub uid: String,
    /// The UID that kubelet and the runtime know it by: of a pod from a file on the node, that of the file.
    pub runs_as: String,
    /// The container's id as Kubernetes has it, when it has one.
    pub id: Option<String>,
    /// It is being deleted already.
    pub leaves: bool,
    /// It has ended.
    pub ended: bool,
    /// The container runs.
    pub runs: bool,
    /// From a file on the node: kubelet brings it back whatever the API server is told.
    pub is_static: bool,
    /// Kubelet would start the container again.
    pub restarts: bool,
    /// The container has ended for good, though others of its pod go on.
    pub is_over: bool,
}

/// A time as the API server writes it, in seconds since 1970.
fn seconds(at: &Value) -> Option<u64> {
    let at = OffsetDateTime::parse(at.as_str()?, &Rfc3339).ok()?;
    u64::try_from(at.unix_timestamp()).ok()
}

impl Pod {
    /// Reads a Pod; none: it is another one of the same name. Where the target's UID is not known, it is the pod that this node
    /// had when the case was opened, by kubelet's clock, which is ours.
    pub fn of(pod: &Value, target: &Target, (node, opened): (&str, u64)) -> Option<Pod> {
        let (meta, spec, status) = (&pod["metadata"], &pod["spec"], &pod["status"]);
        let uid = meta["uid"].as_str().unwrap_or_default();
        let mirrors = meta["annotations"]["kubernetes.io/config.mirror"].as_str();
        let runs_as = mirrors.unwrap_or(uid);
        let same = match &target.uid {
            Some(known) => known == runs_as,
            None => {
                let began = seconds(&status["startTime"]).or_else(|| seconds(&meta["creationTimestamp"]));
                spec["nodeName"] == node && began.is_some_and(|began| began <= opened)
            }
        };
        if !same {
            return None;
        }
        let named = |list: &Value| -> Option<Value> {
            let mut all = list.as_array().into_iter().flatten();
            all.find(|c| c["name"] == *target.container).cloned()
        };
        let either = |a: &Value, b: &Value| named(a).or_else(|| named(b)).unwrap_or_default();
        let wanted = either(&spec["containers"], &spec["initContainers"]);
        let told = either(&status["containerStatuses"], &status["initContainerStatuses"]);
        let id = told["containerID"].as_str();
        let policy = wanted["restartPolicy"]
            .as_str()
            .or(spec["restartPolicy"].as_str())
            .unwrap_or("Always");
        let rules = wanted["restartPolicyRules"]
            .as_array()
            .is_some_and(|r| !r.is_empty());
        let restarts = policy != "Never" || rules;
        let code = &told["state"]["terminated"]["exitCode"];
        Some(Pod {
            uid: uid.to_owned(),
            runs_as: runs_as.to_owned(),
            id: id.filter(|id| !id.is_empty()).map(str::to_owned),
            leaves: meta["deletionTimestamp"].is_string(),
            ended: matches!(status["phase"].as_str(), Some("Succeeded" | "Failed")),
            runs: told["state"]["running"].is_object(),
            is_static: mirrors.is_some(),
            restarts,
            is_over: code.is_number() && (!restarts || *code == 0 && policy == "OnFailure" && !rules),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HERE: (&str, u64) = ("here", 1000);

    fn target() -> Target {
        Target {
            namespace: "jobs".into(),
            pod: "train-0".into(),
            uid: Some("u1".into()),
            container: "main".into(),
            id: None,
            announced: false,
            killed: false,
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
    fn a_containers_id_says_whose_it_is() {
        let elsewhere = |id: Option<&str>| {
            let id = id.map(str::to_owned);
            Target { id, ..target() }.is_elsewhere()
        };
        assert!(elsewhere(Some("containerd://m")) && elsewhere(Some("cri-o://m")));
        assert!(!elsewhere(Some("slipway://m")) && !elsewhere(None));
    }

    #[test]
    fn a_pod_of_the_same_name_is_not_the_same_pod() {
        let mut other = pod();
        other["metadata"]["uid"] = "u2".into();
        assert_eq!(Pod::of(&other, &target(), HERE), None);
    }

    #[test]
    fn without_a_uid_it_is_the_pod_that_the_node_had_when_the_case_was_opened() {
        let unknown = Target {
            uid: None,
            ..target()
        };
        let read = |more: Value| {
            let mut pod = pod();
            pod["spec"]["nodeName"] = more["node"].clone();
            pod["metadata"]["creationTimestamp"] = more["created"].clone();
            pod["status"]["startTime"] = more["started"].clone();
            Pod::of(&pod, &unknown, HERE).map(|p| p.uid)
        };
        let (before, after) = ("1970-01-01T00:16:40Z", "1970-01-01T00:16:41Z");
        let same = Some("u1".to_owned());
        assert_eq!(read(json!({ "node": "here", "created": before })), same);
        assert_eq!(
            read(json!({ "node": "here", "created": before, "started": before })),
            same
        );
        for other in [
            json!({}),
            json!({ "created": before }),
            json!({ "node": "there", "created": before }),
            json!({ "node": "here", "created": after }),
            json!({ "node": "here", "created": before, "started": after }),
            json!({ "node": "here" }),
        ] {
            assert_eq!(read(other.clone()), None, "{other}");
        }
    }

    #[test]
    fn a_pod_from_a_file_is_known_by_the_files_uid() {
        let mut mirror = pod();
        mirror["metadata"]["uid"] = "another".into();
        mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] = "u1".into();
        let read = Pod::of(&mirror, &target(), HERE).expect("the same pod");
        assert_eq!(
            (read.uid.as_str(), read.runs_as.as_str(), read.is_static),
            ("another", "u1", true)
        );
        mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] = "u2".into();
        assert_eq!(Pod::of(&mirror, &target(), HERE), None);
    }

    #[test]
    fn a_container_that_has_ended_for_good_is_over() {
        let read = |policy: &str, state: Value| {
            let mut pod = pod();
            pod["spec"]["restartPolicy"] = policy.into();
            pod["status"]["containerStatuses"][1]["state"] = state;
            Pod::of(&pod, &target(), HERE).expect("the same pod").is_over
        };
        let ended = |code: u32| json!({ "terminated": { "exitCode": code } });
        assert!(read("Never", ended(0)) && read("Never", ended(1)) && read("OnFailure", ended(0)));
        assert!(!read("OnFailure", ended(1)) && !read("Always", ended(0)));
        assert!(!read("Never", json!({ "running": {} })) && !read("OnFailure", json!({})));
    }

    #[test]
    fn whether_the_container_is_started_again_is_its_own_policys_or_the_pods() {
        let read = |pod: &Value| Pod::of(pod, &target(), HERE).expect("the same pod");
        let plain = read(&pod());
        assert_eq!(
            (plain.id.as_deref(), plain.restarts),
            (Some("slipway://m"), false)
        );
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
        let case = Case::of(("GPU-1", 3), &sick, (false, false), 7).expect("a case");
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
        assert_eq!(
            Case::of(("GPU-1", 3), &lost, (false, false), 7),
            None,
            "it may answer again"
        );
        let case = Case::of(("GPU-1", 3), &lost, (true, false), 7).expect("a case");
        assert_eq!(case.reason(), "GpuLost");
        let sign = Unhealthy {
            work: Work::GoesOn,
            ..lost
        };
        assert_eq!(Case::of(("GPU-1", 3), &sign, (true, false), 7), None);
        let case = Case::of(("GPU-1", 3), &sign, (true, true), 7).expect("a case");
        assert!(case.only_waiting);
    }
}
