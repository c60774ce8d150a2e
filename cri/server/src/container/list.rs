//! ListContainers: which containers a filter means.

use std::sync::Arc;

use super::Container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::model::StringMap;
use crate::records::ContainerPhase;

/// What the CRI calls a container's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    Created,
    Running,
    Exited,
    Unknown,
}

impl From<&ContainerPhase> for Visible {
    fn from(phase: &ContainerPhase) -> Visible {
        match phase {
            ContainerPhase::Creating | ContainerPhase::Removing(None) => Visible::Unknown,
            ContainerPhase::Created => Visible::Created,
            ContainerPhase::Running { .. } => Visible::Running,
            ContainerPhase::Exited(_) | ContainerPhase::Removing(Some(_)) => Visible::Exited,
        }
    }
}

/// All of the conditions hold; an empty one always does. Ids may be beginnings.
#[derive(Debug, Default)]
pub struct Filter {
    pub id: String,
    pub pod: String,
    pub state: Option<Visible>,
    pub labels: StringMap,
}

/// The containers that match, oldest first. Those nobody was told of are not among them.
pub fn list(daemon: &Daemon, filter: &Filter) -> Result<Vec<Arc<Container>>, Error> {
    let mut found = if filter.id.is_empty() {
        daemon.registry.containers()
    } else {
        crate::pod::list::none_when_unknown(daemon.registry.container(&filter.id))?
    };
    let pod = if filter.pod.is_empty() {
        None
    } else {
        match crate::pod::list::none_when_unknown(daemon.registry.pod(&filter.pod))?.pop() {
            Some(pod) => Some(pod),
            None => return Ok(Vec::new()),
        }
    };
    found.retain(|container| {
        !container.hidden()
            && pod.as_ref().is_none_or(|pod| pod.id() == container.pod())
            && filter
                .state
                .is_none_or(|state| state == Visible::from(&container.phase()))
            && has_labels(&container.record().config.labels, &filter.labels)
    });
    found.sort_by_key(|container| container.record().created_at_ns);
    Ok(found)
}

/// Every wanted label is there with its value.
pub fn has_labels(labels: &StringMap, wanted: &StringMap) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Exited;

    #[test]
    fn a_container_being_removed_is_shown_as_it_had_ended() {
        assert_eq!(
            Visible::from(&ContainerPhase::Removing(Some(Exited::default()))),
            Visible::Exited
        );
        assert_eq!(
            Visible::from(&ContainerPhase::Running { started_at_ns: 1 }),
            Visible::Running
        );
    }

    #[test]
    fn every_wanted_label_has_to_be_there() {
        let map = |pairs: &[(&str, &str)]| -> StringMap {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let labels = map(&[("a", "1"), ("b", "2")]);
        assert!(has_labels(&labels, &map(&[])));
        assert!(has_labels(&labels, &map(&[("a", "1")])));
        assert!(!has_labels(&labels, &map(&[("a", "1"), ("c", "3")])));
        assert!(!has_labels(&labels, &map(&[("a", "2")])));
    }
}
