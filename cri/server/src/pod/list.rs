//! ListPodSandbox: which pods a filter means.

use std::sync::Arc;

use super::Pod;
use crate::container::list::has_labels;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::model::StringMap;
use crate::records::PodPhase;

/// All of the conditions hold; an empty one always does. The id may be a beginning.
#[derive(Debug, Default)]
pub struct Filter {
    pub id: String,
    pub ready: Option<bool>,
    pub labels: StringMap,
}

/// The pods that match, oldest first. Those nobody was told of are not among them.
pub fn list(daemon: &Daemon, filter: &Filter) -> Result<Vec<Arc<Pod>>, Error> {
    let mut found = if filter.id.is_empty() {
        daemon.registry.pods()
    } else {
        none_when_unknown(daemon.registry.pod(&filter.id))?
    };
    found.retain(|pod| {
        !pod.hidden()
            && filter
                .ready
                .is_none_or(|ready| ready == (pod.phase() == PodPhase::Ready))
            && has_labels(&pod.record().config.labels, &filter.labels)
    });
    found.sort_by_key(|pod| pod.record().created_at_ns);
    Ok(found)
}

/// A filter that names nothing, or more than one thing, finds nothing.
pub fn none_when_unknown<T>(found: Result<T, Error>) -> Result<Vec<T>, Error> {
    match found {
        Ok(one) => Ok(vec![one]),
        Err(Error::NotFound { .. } | Error::Ambiguous { .. } | Error::Unreadable { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
