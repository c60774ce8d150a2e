//! The agent's own HTTP server: `/healthz`, `/readyz`, `/metrics`. Waits for nothing that could hang: a GPU that does not answer
//! costs its own figures only.

mod gather;
mod metrics;
mod page;

use std::collections::VecDeque;
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
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::timeout;

pub use gather::{Gather, Seen, devices};

use crate::status::Status;

/// Connections at a time. Whoever comes then takes the place of the oldest: those that only sit there keep nobody out.
const MAX_CONNECTIONS: usize = 16;
/// How long a connection may be used, read or not.
const MAX_AGE: Duration = Duration::from_secs(30);
/// How long a request's head may take, and an answer when its connection's time is up.
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
    // The oldest first.
    let mut connections: VecDeque<AbortHandle> = VecDeque::with_capacity(MAX_CONNECTIONS);
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        connections.retain(|one| !one.is_finished());
        if connections.len() >= MAX_CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
        let talk = talk(stream, Arc::clone(&status), Arc::clone(&gather));
        connections.push_back(tokio::spawn(talk).abort_handle());
    }
}

/// Serves one connection, for as long as it may be used.
async fn talk(stream: TcpStream, status: Arc<Status>, gather: Arc<Gather>) {
    let service = hyper::service::service_fn(move |request| {
        let (status, gather) = (Arc::clone(&status), Arc::clone(&gather));
        async move { Ok::<_, Infallible>(answer(&request, &status, &gather).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    if timeout(MAX_AGE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = timeout(PATIENCE, connection).await;
    }
}

async fn answer(request: &Request<Incoming>, status: &Status, gather: &Gather) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into());
    }
    match request.uri().path() {
        "/healthz" => told(status.alive().map(|()| "ok".into())),
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

fn told(state: Result<String, String>) -> Response<Full<Bytes>> {
    match state {
        Ok(said) => text(StatusCode::OK, format!("{said}\n")),
        Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

fn text(code: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response
}
