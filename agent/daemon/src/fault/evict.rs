//! Taking a pod away from its node, by its UID: the Eviction API, which knows of disruption budgets, and deletion.

use serde_json::json;

use super::case::{Pod, Target};
use crate::kube::{Client, KubeError};

/// What came of an eviction.
#[derive(Debug)]
pub enum Evicted {
    /// It is on its way out.
    Done,
    /// It is gone, or another one has its name.
    Gone,
    /// A disruption budget does not allow it now.
    Blocked(String),
    /// It never will be allowed.
    Forbidden(KubeError),
}

fn path(target: &Target) -> String {
    format!("/api/v1/namespaces/{}/pods/{}", target.namespace, target.pod)
}

/// The target's pod; none: gone, or another one has its name.
///
/// # Errors
/// The API server does not say.
pub async fn look(client: &Client, target: &Target) -> Result<Option<Pod>, KubeError> {
    match client.get(&path(target)).await {
        Ok(pod) => Ok(Pod::of(&pod, target)),
        Err(e) if e.refused().is_some_and(|c| c.as_u16() == 404) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Has it evicted.
///
/// # Errors
/// The API server does not answer, or not now.
pub async fn evict(client: &Client, target: &Target, pod: &Pod) -> Result<Evicted, KubeError> {
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": { "namespace": target.namespace, "name": target.pod },
        "deleteOptions": { "preconditions": { "uid": pod.uid } },
    });
    judge(
        client
            .post(&format!("{}/eviction", path(target)), &eviction)
            .await
            .err(),
    )
}

/// Deletes it, with its own grace period.
///
/// # Errors
/// As [`evict`].
pub async fn delete(client: &Client, target: &Target, pod: &Pod) -> Result<Evicted, KubeError> {
    let options = json!({
        "apiVersion": "v1", "kind": "DeleteOptions",
        "preconditions": { "uid": pod.uid },
    });
    judge(client.delete(&path(target), &options).await.err())
}

fn judge(error: Option<KubeError>) -> Result<Evicted, KubeError> {
    let Some(error) = error else {
        return Ok(Evicted::Done);
    };
    match (error.refused().map(|c| c.as_u16()), &error) {
        // 409: the UID is another's.
        (Some(404 | 409), _) => Ok(Evicted::Gone),
        (Some(429), KubeError::Refused { message, .. }) => Ok(Evicted::Blocked(message.clone())),
        (Some(400 | 403 | 405 | 422), _) => Ok(Evicted::Forbidden(error)),
        _ => Err(error),
    }
}
