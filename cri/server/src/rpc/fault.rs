//! `slipway.fault.v1`: decode, call, encode. Root alone is answered, whatever the socket's mode has become.

use std::sync::Arc;

use slipway_fault_api::v1::fail_container_response::Outcome as WireOutcome;
use slipway_fault_api::v1::fault_server::{Fault as Service, FaultServer};
use slipway_fault_api::v1::{FailContainerRequest, FailContainerResponse};
use slipway_fault_api::{MAX_HOLD, MAX_MESSAGE, MAX_REASON};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, async_trait};
use tracing::info_span;

use super::{call, decode};
use crate::container::fault::{self, Outcome, Target};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::records::{Exited, Fault};

/// How long an announcement counts, in nanoseconds: an hour, as `fault.proto` says.
const ANNOUNCED: i64 = 3_600_000_000_000;
/// The largest request: the longest values, with room.
const LARGEST_MESSAGE: usize = 16 << 10;
/// What containers end with by themselves: as a fault's reason it would say something else.
const OURS: [&str; 7] = [
    "Completed",
    "Error",
    "OOMKilled",
    "StartError",
    "ShimDied",
    "Unknown",
    "ContainerStatusUnknown",
];

/// The service on a daemon.
pub struct Faults(Arc<Daemon>);

impl Faults {
    pub fn server(daemon: Arc<Daemon>) -> FaultServer<Faults> {
        FaultServer::new(Faults(daemon)).max_decoding_message_size(LARGEST_MESSAGE)
    }
}

#[async_trait]
impl Service for Faults {
    async fn fail_container(
        &self,
        request: Request<FailContainerRequest>,
    ) -> Result<Response<FailContainerResponse>, Status> {
        let peer = request.extensions().get::<UdsConnectInfo>();
        let uid = peer.and_then(|info| info.peer_cred).map(|cred| cred.uid());
        if uid != Some(0) {
            tracing::warn!(
                uid,
                "somebody who is not root asked for a container to be failed: refused"
            );
            return Err(Status::permission_denied("slipway.fault.v1 is root's alone"));
        }
        let request = request.into_inner();
        let span = info_span!(
            "FailContainer",
            pod_uid = decode::clip(&request.pod_uid),
            container = decode::clip(&request.container_id),
            reason = decode::clip(&request.reason),
        );
        let daemon = self.0.clone();
        call(span, async move {
            let (target, fault) = decoded(request)?;
            let verb = {
                let daemon = daemon.clone();
                async move { fault::fail(&daemon, &target, fault).await }
            };
            Ok(answer(daemon.to_the_end(verb).await?))
        })
        .await
    }
}

fn decoded(request: FailContainerRequest) -> Result<(Target, Fault), Error> {
    let given = |field, text: String| {
        let text = decode::name(field, text)?;
        match text.is_empty() {
            true => Err(Error::invalid(field, "is missing")),
            false => Ok(text),
        }
    };
    let target = Target {
        pod_uid: given("pod_uid", request.pod_uid)?,
        container: given("container", request.container)?,
        id: decode::id("container_id", request.container_id)?,
    };
    let at_ns = crate::time::now_ns();
    let fault = Fault {
        reason: reason(request.reason)?,
        message: message(request.message)?,
        at_ns,
        held_until_ns: hold(request.hold_seconds)?.map_or(0, |hold| at_ns.saturating_add(hold)),
        kill: !request.only_announce,
        stands_until_ns: at_ns.saturating_add(ANNOUNCED),
    };
    Ok((target, fault))
}

fn reason(text: String) -> Result<String, Error> {
    let word = text.len() <= MAX_REASON
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.bytes().all(|b| b.is_ascii_alphanumeric());
    if !word {
        return Err(Error::invalid(
            "reason",
            format!(
                "{:?} is not an upper-case letter and then letters and digits, {MAX_REASON} at most",
                decode::clip(&text)
            ),
        ));
    }
    if OURS.contains(&text.as_str()) {
        return Err(Error::invalid(
            "reason",
            format!("{text:?} is what a container ends with by itself"),
        ));
    }
    Ok(text)
}

fn message(text: String) -> Result<String, Error> {
    if text.is_empty() || text.len() > MAX_MESSAGE {
        return Err(Error::invalid(
            "message",
            format!("it has {} bytes, and not 1 to {MAX_MESSAGE}", text.len()),
        ));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::invalid("message", "it has control characters"));
    }
    Ok(text)
}

/// In nanoseconds; none: it is not asked for.
fn hold(seconds: u32) -> Result<Option<i64>, Error> {
    if seconds > MAX_HOLD {
        return Err(Error::invalid(
            "hold_seconds",
            format!("{seconds} is more than {MAX_HOLD}"),
        ));
    }
    Ok((seconds > 0).then(|| i64::from(seconds) * 1_000_000_000))
}

fn answer(outcome: Outcome) -> FailContainerResponse {
    let (outcome, exit) = match outcome {
        Outcome::Failed(exit) => (WireOutcome::Failed, exit),
        Outcome::Before(exit) => (WireOutcome::AlreadyExited, exit),
        Outcome::Announced => (WireOutcome::Announced, Exited::default()),
    };
    FailContainerResponse {
        outcome: outcome as i32,
        exit_code: exit.code,
        reason: exit.reason,
        message: exit.message,
        finished_at: exit.finished_at_ns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> FailContainerRequest {
        FailContainerRequest {
            pod_uid: "uid".into(),
            container: "main".into(),
            container_id: "a".repeat(64),
            reason: "GpuXid79".into(),
            message: "GPU 0 (GPU-1): XID 79, “lost”".into(),
            only_announce: false,
            hold_seconds: 0,
        }
    }

    #[test]
    fn each_field_that_cannot_be_is_named() {
        decoded(request()).unwrap();
        type Harm = fn(&mut FailContainerRequest);
        let harms: [(&str, Harm); 13] = [
            ("hold_seconds", |r| r.hold_seconds = 3601),
            ("pod_uid", |r| r.pod_uid.clear()),
            ("pod_uid", |r| r.pod_uid = "x".repeat(5000)),
            ("container:", |r| r.container.clear()),
            ("container:", |r| r.container = "a\nb".into()),
            ("container_id", |r| r.container_id.clear()),
            ("reason", |r| r.reason.clear()),
            ("reason", |r| r.reason = "gpu".into()),
            ("reason", |r| r.reason = "Gpu Xid".into()),
            ("reason", |r| r.reason = "G".repeat(65)),
            ("reason", |r| r.reason = "Completed".into()),
            ("message", |r| r.message.clear()),
            ("message", |r| r.message = "\u{1b}[31m".into()),
        ];
        for (field, harm) in harms {
            let mut bad = request();
            harm(&mut bad);
            let error = decoded(bad).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{error}");
            assert!(error.to_string().starts_with(field), "{field}: {error}");
        }
        let mut long = request();
        long.message = "x".repeat(MAX_MESSAGE + 1);
        assert!(decoded(long).unwrap_err().to_string().contains("1025"));
    }
}
