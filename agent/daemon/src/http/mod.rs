//! The agent's own HTTP server: `/healthz`, `/readyz`, `/metrics`. Waits for nothing that could hang: a GPU that does not answer
//! costs its own figures only.

mod gather;
mod metrics;
mod page;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

pub use gather::{Gather, Seen, devices};

use crate::status::Status;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// How long a request's head may take.
const PATIENCE: Duration = Duration::from_secs(5);
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Serves for ever. An address that is taken is tried for again: the GPUs do not depend on it.
pub async fn serve(listen: SocketAddr, status: Arc<Status>, gather: Gather) {
    let gather = Arc::new(gather);
    let mut pause = Duration::from_secs(1);
    let listener = loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => break listener,
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(%listen, error, "HTTP cannot be served; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    };
    match listener.local_addr() {
        Ok(address) => tracing::info!(%address, "HTTP is served"),
        Err(_) => tracing::info!(%listen, "HTTP is served"),
    }
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (status, gather) = (Arc::clone(&status), Arc::clone(&gather));
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let (status, gather) = (Arc::clone(&status), Arc::clone(&gather));
                async move { Ok::<_, Infallible>(answer(&request, &status, &gather).await) }
            });
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(permit);
        });
    }
}

async fn answer(request: &Request<Incoming>, status: &Status, gather: &Gather) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into());
    }
    match request.uri().path() {
        "/healthz" => told(status.alive()),
        "/readyz" => told(status.ready()),
        "/metrics" => {
            let mut response = text(StatusCode::OK, gather.page().await);
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            response
                .headers_mut()
                .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
            response
        }
        _ => text(StatusCode::NOT_FOUND, "/healthz, /readyz, /metrics\n".into()),
    }
}

fn told(state: Result<(), String>) -> Response<Full<Bytes>> {
    match state {
        Ok(()) => text(StatusCode::OK, "ok\n".into()),
        Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

fn text(code: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response
}
