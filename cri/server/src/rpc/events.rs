//! GetContainerEvents: what happens, each event with the statuses as they are when it is told.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use slipway_cri_api::v1;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::encode;
use crate::container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{Event, What};

/// The events of one listener.
pub type Told = Pin<Box<dyn Stream<Item = Result<v1::ContainerEventResponse, Status>> + Send>>;

/// Tells from now on, until the listener goes or slipwayd does.
pub fn listen(daemon: &Arc<Daemon>) -> Result<Told, Error> {
    let events = ReceiverStream::new(daemon.events.listen()?);
    let ending = daemon.stopping.clone().cancelled_owned();
    let daemon = daemon.clone();
    let told = events
        .take_until(ending)
        .map(move |event| Ok(encode(&daemon, &event)));
    Ok(Box::pin(told))
}

fn encode(daemon: &Daemon, event: &Event) -> v1::ContainerEventResponse {
    let filter = container::list::Filter {
        pod: event.pod.id().to_string(),
        ..Default::default()
    };
    let containers = container::list::list(daemon, &filter).unwrap_or_default();
    let kind = match event.what {
        What::Created => v1::ContainerEventType::ContainerCreatedEvent,
        What::Started => v1::ContainerEventType::ContainerStartedEvent,
        What::Stopped => v1::ContainerEventType::ContainerStoppedEvent,
        What::Deleted => v1::ContainerEventType::ContainerDeletedEvent,
    };
    v1::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind as i32,
        created_at: event.at_ns,
        pod_sandbox_status: Some(encode::pod_status(&event.pod)),
        containers_statuses: containers.iter().map(|c| encode::container_status(c)).collect(),
    }
}
