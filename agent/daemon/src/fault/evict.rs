//! Taking a pod away from its node, by its UID: the Eviction API, which knows of disruption budgets, and deletion.

use serde_json::json;

use super::case::{Pod, Target};
use crate::kube::{Client, KubeError, Refusal};

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

/// The target's pod, by its UID, or else as the one that the node had when the case was opened; none: gone, or another one has
/// its name.
///
/// # Errors
/// The API server does not say.
pub async fn look(
    client: &Client,
    target: &Target,
    (node, opened): (&str, u64),
) -> Result<Option<Pod>, KubeError> {
    match client.get(&path(target)).await {
        Ok(pod) => Ok(Pod::of(&pod, target, (node, opened))),
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
    let path = format!("{}/eviction", path(target));
    let Err(error) = client.post(&path, &eviction).await else {
        return Ok(Evicted::Done);
    };
    let KubeError::Refused(Refusal {
        code,
        ref message,
        ref causes,
        in_result,
        ..
    }) = error
    else {
        return Err(error);
    };
    match code.as_u16() {
        // 409: the UID is another's.
        404 | 409 => Ok(Evicted::Gone),
        // A server that has too much to do says 429 as well.
        429 if causes.iter().any(|c| c == "DisruptionBudget") => Ok(Evicted::Blocked(message.clone())),
        // With two budgets the eviction is never done: that is told as what came of it.
        500 if in_result => Ok(Evicted::Blocked(message.clone())),
        400 | 403 | 405 | 422 => Ok(Evicted::Forbidden(error)),
        _ => Err(error),
    }
}

/// Deletes it, with its own grace period; false: it is gone, or another one has its name.
///
/// # Errors
/// It is not deleted.
pub async fn delete(client: &Client, target: &Target, pod: &Pod) -> Result<bool, KubeError> {
    let options = json!({
        "apiVersion": "v1", "kind": "DeleteOptions",
        "preconditions": { "uid": pod.uid },
    });
    match client.delete(&path(target), &options).await {
        Ok(_) => Ok(true),
        Err(e) if e.refused().is_some_and(|c| [404, 409].contains(&c.as_u16())) => Ok(false),
        Err(e) => Err(e),
    }
}
