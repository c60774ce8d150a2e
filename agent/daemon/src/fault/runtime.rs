//! Asking slipwayd to end a container, over `slipway.fault.v1`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use slipway_fault_api::v1::FailContainerRequest;
use slipway_fault_api::v1::fail_container_response::Outcome;
use slipway_fault_api::v1::fault_client::FaultClient;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Endpoint, Uri};

/// How long one request may take: slipwayd waits for processes to die.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It will end with the reason.
    Announced,
    /// It has ended with the reason; its exit code.
    Failed(i32),
    /// It had ended by itself before, or is not there any more.
    Gone,
    /// It is asked to end, and does not yet: why not.
    Dying(String),
}

/// Why it could not be asked for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody serves there: another runtime, or slipwayd is being restarted.
    #[error("reach slipwayd at {}", socket.display())]
    Absent {
        socket: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    /// Nobody has told which one it is.
    #[error("have container {container} failed: its id is not known yet")]
    Unknown { container: String },
    /// Not slipwayd's.
    #[error(
        "have container {id} failed: another runtime has it, which cannot be asked; its pod is evicted where it may be"
    )]
    Elsewhere { id: String },
    /// It said no, or nothing.
    #[error("have container {id} failed: {message}")]
    Refused { id: String, message: String },
}

/// Asks for it.
pub async fn fail(socket: PathBuf, request: FailContainerRequest) -> Result<Ended, AskError> {
    let id = request.container_id.clone();
    let path = socket.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = path.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::from_static("http://slipwayd")
        .connect_timeout(Duration::from_secs(2))
        .timeout(PATIENCE)
        .connect_with_connector(connector)
        .await
        .map_err(|source| AskError::Absent { socket, source })?;
    match FaultClient::new(channel).fail_container(request).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            Ok(match answer.outcome() {
                Outcome::Announced => Ended::Announced,
                Outcome::Failed => Ended::Failed(answer.exit_code),
                Outcome::AlreadyExited | Outcome::Unspecified => Ended::Gone,
            })
        }
        Err(status) => match status.code() {
            Code::NotFound => Ok(Ended::Gone),
            Code::DeadlineExceeded => Ok(Ended::Dying(status.message().to_owned())),
            code => Err(AskError::Refused {
                id,
                message: format!("{code}: {}", status.message()),
            }),
        },
    }
}
