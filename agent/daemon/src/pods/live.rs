//! kubelet's pods as it tells of them while it runs, and their devices as far as they have been asked for. What is not known
//! (any more) is said to be, so that whoever needs it asks. Pure.
//!
//! A device is allocated before a pod's containers are made, and those change the pod's status: so a pod's devices are asked for
//! again after each change that kubelet tells, and not otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;
use slipway_kubelet_api::core;
use slipway_kubelet_api::podresources::PodResources;
use slipway_kubelet_api::pods::{EventType, WatchPodsEvent};

use super::{Holder, Pod, Snapshot};

/// More pods than a kubelet has. One that tells of more is polled.
const MAX_PODS: usize = 4096;

/// A pod as its bytes tell.
pub struct Told {
    pub uid: String,
    pub pod: Pod,
    /// Whether it may have devices: a container asks for something with a domain, and has not ended.
    pub may_have: bool,
}

/// Reads the bytes of a Pod.
pub fn told(bytes: &[u8]) -> Option<Told> {
    let core::Pod {
        metadata: Some(meta),
        spec,
        status,
    } = core::Pod::decode(bytes).ok()?
    else {
        return None;
    };
    let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
    let over = ["Succeeded", "Failed"].contains(&status.phase.as_str());
    let mut limits = spec
        .containers
        .iter()
        .chain(&spec.init_containers)
        .filter_map(|c| c.resources.as_ref())
        .flat_map(|r| r.limits.keys());
    let may_have = !over && limits.any(|name| name.contains('/'));
    let all = status.container_statuses.into_iter();
    let containers = all.chain(status.init_container_statuses);
    let containers = containers.map(|c| (c.name, c.container_id));
    Some(Told {
        uid: meta.uid,
        pod: Pod {
            namespace: meta.namespace,
            name: meta.name,
            containers: containers.collect(),
        },
        may_have,
    })
}

/// A pod whose devices are to be asked for.
pub struct Unasked {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// The change since which.
    pub since: u64,
}

/// What kubelet has told.
#[derive(Debug, Default)]
pub struct Live {
    /// Whether everything has been told: before that, and when the stream has ended, nothing is known.
    complete: bool,
    pods: BTreeMap<String, Pod>,
    /// Changes told so far.
    changes: u64,
    /// Pods whose devices are to be asked for, and the change since which.
    unasked: BTreeMap<String, u64>,
    /// The devices of those that have some.
    devices: BTreeMap<String, PodResources>,
    /// Of all of this, until it changes.
    snapshot: Option<Arc<Snapshot>>,
}

impl Live {
    /// The stream has ended.
    pub fn forget(&mut self) {
        // Counted on: an answer to what was asked before is not one to what is told after.
        *self = Live {
            changes: self.changes + 1,
            ..Live::default()
        };
    }

    /// Takes an event in; whether it could be.
    pub fn heard(&mut self, event: &WatchPodsEvent) -> bool {
        let kind = EventType::try_from(event.r#type).unwrap_or(EventType::Unspecified);
        match kind {
            EventType::InitialSyncComplete => {
                self.complete = true;
                return true;
            }
            EventType::Unspecified => return false,
            EventType::Added | EventType::Modified | EventType::Deleted => {}
        }
        let Some(Told { uid, pod, may_have }) = told(&event.pod) else {
            return false;
        };
        self.snapshot = None;
        self.changes += 1;
        if kind == EventType::Deleted {
            self.pods.remove(&uid);
        } else {
            self.pods.insert(uid.clone(), pod);
        }
        if kind != EventType::Deleted && may_have {
            self.unasked.insert(uid, self.changes);
        } else {
            self.unasked.remove(&uid);
            self.devices.remove(&uid);
        }
        self.pods.len() <= MAX_PODS
    }

    /// Pods whose devices have to be asked for before anything can be said; none: nothing can be said.
    pub fn unasked(&self) -> Option<Vec<Unasked>> {
        let one = |(uid, since): (&String, &u64)| {
            let pod = self.pods.get(uid)?;
            Some(Unasked {
                uid: uid.clone(),
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                since: *since,
            })
        };
        self.complete
            .then(|| self.unasked.iter().filter_map(one).collect())
    }

    /// A pod's devices, asked for after the change `since`. Where kubelet has told of another one meanwhile, they may be older
    /// than that, and are asked for again.
    pub fn asked(&mut self, uid: &str, since: u64, devices: PodResources) {
        if self.unasked.get(uid) == Some(&since) {
            self.unasked.remove(uid);
            self.snapshot = None;
            self.devices.insert(uid.to_owned(), devices);
        }
    }

    /// How many changes have been told.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Everybody's devices, asked for when so many changes had been told.
    pub fn listed(&mut self, changes: u64, list: Vec<PodResources>) {
        self.snapshot = None;
        self.unasked.retain(|_, since| *since > changes);
        self.devices.clear();
        for devices in list {
            let is =
                |(_, p): &(&String, &Pod)| (&p.namespace, &p.name) == (&devices.namespace, &devices.name);
            let uid = self.pods.iter().find(is).map(|(uid, _)| uid.clone());
            if let Some(uid) = uid {
                self.devices.insert(uid, devices);
            }
        }
    }

    /// What is known; none: something is not.
    pub fn snapshot(&mut self) -> Option<Arc<Snapshot>> {
        if !self.complete || !self.unasked.is_empty() {
            return None;
        }
        if self.snapshot.is_none() {
            let mut snapshot = Snapshot {
                pods: self.pods.clone(),
                ..Snapshot::default()
            };
            for (uid, devices) in &self.devices {
                snapshot.put(devices, Some(uid));
            }
            self.snapshot = Some(Arc::new(snapshot));
        }
        self.snapshot.clone()
    }
}

impl Snapshot {
    /// Puts a pod's devices in.
    pub(super) fn put(&mut self, pod: &PodResources, uid: Option<&String>) {
        for container in &pod.containers {
            let holder = Holder {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                container: container.name.clone(),
                uid: uid.cloned(),
            };
            for devices in &container.devices {
                for id in &devices.device_ids {
                    let entry = (devices.resource_name.clone(), holder.clone());
                    let device = crate::node::device_of(id).to_owned();
                    let holders = self.holders.entry(device).or_default();
                    if !holders.contains(&entry) {
                        holders.push(entry);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_kubelet_api::podresources::{ContainerDevices, ContainerResources};

    fn event(kind: EventType, name: &str, limit: &str, phase: &str) -> WatchPodsEvent {
        let limits = [(limit.to_owned(), core::Quantity::default())];
        let pod = core::Pod {
            metadata: Some(core::ObjectMeta {
                name: name.into(),
                namespace: "jobs".into(),
                uid: format!("uid-{name}"),
            }),
            spec: Some(core::PodSpec {
                containers: vec![core::Container {
                    resources: Some(core::ResourceRequirements {
                        limits: limits.into(),
                    }),
                }],
                ..core::PodSpec::default()
            }),
            status: Some(core::PodStatus {
                phase: phase.into(),
                ..core::PodStatus::default()
            }),
        };
        WatchPodsEvent {
            r#type: kind.into(),
            pod: pod.encode_to_vec(),
        }
    }

    fn devices(name: &str, id: &str) -> PodResources {
        PodResources {
            name: name.into(),
            namespace: "jobs".into(),
            containers: vec![ContainerResources {
                name: "main".into(),
                devices: vec![ContainerDevices {
                    resource_name: "nvidia.com/gpu".into(),
                    device_ids: vec![id.into()],
                }],
            }],
        }
    }

    fn complete() -> Live {
        let mut live = Live::default();
        let done = WatchPodsEvent {
            r#type: EventType::InitialSyncComplete.into(),
            pod: Vec::new(),
        };
        assert!(live.heard(&event(EventType::Added, "one", "nvidia.com/gpu", "Pending")));
        assert!(live.heard(&event(EventType::Added, "web", "memory", "Running")));
        assert!(
            live.unasked().is_none() && live.snapshot().is_none(),
            "not all of it"
        );
        assert!(live.heard(&done));
        live
    }

    fn names(live: &Live) -> Vec<String> {
        let all = live.unasked().expect("it is complete");
        all.into_iter().map(|u| u.name).collect()
    }

    /// kubelet's answer for "one", to what is asked now.
    fn answer(live: &mut Live, id: &str) {
        let unasked = live.unasked().expect("it is complete").remove(0);
        live.asked(&unasked.uid, unasked.since, devices("one", id));
    }

    #[test]
    fn what_was_answered_before_a_change_is_asked_for_again() {
        let mut live = complete();
        let (asked, changes) = (live.unasked().expect("complete").remove(0), live.changes());
        // Between the question and its answer.
        live.heard(&event(EventType::Modified, "one", "nvidia.com/gpu", "Running"));
        live.asked(&asked.uid, asked.since, PodResources::default());
        assert_eq!(names(&live), ["one"]);
        live.listed(changes, Vec::new());
        assert_eq!(names(&live), ["one"]);
        answer(&mut live, "GPU-1");
        assert_eq!(live.snapshot().expect("all is known").holders("GPU-1").len(), 1);
    }

    #[test]
    fn only_pods_that_may_have_devices_are_asked_about_and_once_a_change() {
        let mut live = complete();
        assert_eq!(names(&live), ["one"]);
        assert!(live.snapshot().is_none());
        answer(&mut live, "GPU-1::3");
        let snapshot = live.snapshot().expect("all is known");
        assert_eq!(snapshot.holders("GPU-1")[0].1.uid.as_deref(), Some("uid-one"));
        assert!(names(&live).is_empty());
        assert!(
            Arc::ptr_eq(&snapshot, &live.snapshot().expect("known")),
            "made once"
        );
        live.heard(&event(EventType::Modified, "one", "nvidia.com/gpu", "Running"));
        assert_eq!(names(&live), ["one"]);
        answer(&mut live, "GPU-1::3");
        live.heard(&event(EventType::Modified, "web", "memory", "Running"));
        assert!(names(&live).is_empty());
    }

    #[test]
    fn who_has_ended_or_is_gone_has_nothing() {
        for last in [
            event(EventType::Modified, "one", "nvidia.com/gpu", "Succeeded"),
            event(EventType::Deleted, "one", "", ""),
        ] {
            let mut live = complete();
            answer(&mut live, "GPU-1");
            live.heard(&last);
            let snapshot = live.snapshot().expect("all is known");
            assert!(snapshot.holders("GPU-1").is_empty());
        }
    }

    #[test]
    fn what_is_not_understood_or_of_an_older_kubelet_is_nothing_to_go_by() {
        let mut live = complete();
        live.listed(
            live.changes(),
            vec![devices("one", "GPU-1"), devices("stranger", "GPU-2")],
        );
        let snapshot = live.snapshot().expect("all is known");
        assert_eq!(snapshot.holders("GPU-1").len(), 1);
        assert!(
            snapshot.holders("GPU-2").is_empty(),
            "kubelet has told of no such pod"
        );
        let mut strange = event(EventType::Added, "two", "", "");
        strange.r#type = 0;
        assert!(!live.heard(&strange));
        strange.r#type = 1;
        strange.pod = b"\xff\xff".to_vec();
        assert!(!live.heard(&strange));
        live.forget();
        assert!(live.unasked().is_none() && live.snapshot().is_none());
    }
}
