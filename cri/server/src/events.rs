//! What happens to pods and containers, told to whoever listens (GetContainerEvents). Nothing is kept for those who come
//! later: lists tell them what is.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::container::Container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::pod::Pod;

/// Listeners at once: a kubelet and some people.
const LISTENERS: usize = 16;
/// Events that a listener may be behind; one further behind is let go, and has to look at the lists again.
const BEHIND: usize = 1024;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// One event. The statuses that go with it are made when it is told.
#[derive(Clone)]
pub struct Event {
    pub what: What,
    /// A container's id, or the pod's own.
    pub id: String,
    pub at_ns: i64,
    pub pod: Arc<Pod>,
}

/// Who listens.
#[derive(Default)]
pub struct Events {
    listeners: Mutex<Vec<mpsc::Sender<Event>>>,
}

impl Events {
    /// Events from now on, until the receiver is dropped or too far behind.
    ///
    /// # Errors
    /// [`Error::TooMany`] listeners.
    pub fn listen(&self) -> Result<mpsc::Receiver<Event>, Error> {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| !listener.is_closed());
        if listeners.len() >= LISTENERS {
            return Err(Error::TooMany {
                what: "listeners to events",
                most: LISTENERS,
            });
        }
        let (sender, receiver) = mpsc::channel(BEHIND);
        listeners.push(sender);
        Ok(receiver)
    }

    fn tell(&self, what: What, id: &str, pod: impl FnOnce() -> Option<Arc<Pod>>) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if listeners.is_empty() {
            return;
        }
        let Some(pod) = pod() else { return };
        let event = Event {
            what,
            id: id.to_owned(),
            at_ns: crate::time::now_ns(),
            pod,
        };
        listeners.retain(|listener| listener.try_send(event.clone()).is_ok());
    }
}

/// Tells of a pod.
pub fn of_pod(daemon: &Daemon, pod: &Arc<Pod>, what: What) {
    daemon.events.tell(what, pod.id().as_str(), || Some(pod.clone()));
}

/// Tells of a container.
pub fn of_container(daemon: &Daemon, container: &Container, what: What) {
    let pod = || daemon.registry.pod(container.pod().as_str()).ok();
    daemon.events.tell(what, container.id().as_str(), pod);
}
