//! The CRI's edge: requests decoded into checked values, one call each, answers encoded, errors mapped. What a verb does
//! is elsewhere.

pub mod deadline;
pub mod decode;
mod encode;
mod events;
pub mod fault;
mod image;
mod measure;
mod metrics;
mod node;
mod runtime;
mod status;
mod stream;
mod urls;

use std::sync::Arc;

use tonic::{Response, Status};
use tracing::Instrument;

use crate::daemon::Daemon;
use crate::error::Error;

/// Both services on one daemon.
#[derive(Clone)]
pub struct Cri {
    daemon: Arc<Daemon>,
    urls: slipway_stream::Urls,
}

impl Cri {
    pub fn new(daemon: Arc<Daemon>, urls: slipway_stream::Urls) -> Cri {
        Cri { daemon, urls }
    }
}

/// Runs a verb under its span; logs how it went once, here.
async fn call<T>(
    span: tracing::Span,
    verb: impl Future<Output = Result<T, Error>>,
) -> Result<Response<T>, Status> {
    async move {
        let began = std::time::Instant::now();
        let result = verb.await;
        // To the microsecond.
        let ms = (began.elapsed().as_secs_f64() * 1e6).round() / 1e3;
        match result {
            Ok(answer) => {
                tracing::debug!(ms, "done");
                Ok(Response::new(answer))
            }
            Err(error) => {
                let status = status::from(&error);
                match status.code() {
                    // Asking for what is not there is how clients find out.
                    tonic::Code::NotFound => tracing::debug!(ms, error = error.chain(), "not found"),
                    code => tracing::error!(ms, ?code, error = error.chain(), "failed"),
                }
                Err(status)
            }
        }
    }
    .instrument(span)
    .await
}
