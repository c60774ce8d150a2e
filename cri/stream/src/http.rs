//! The HTTP before the streams: takes one request on a connection, redeems its token, and either switches protocols or
//! answers and closes.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::SemaphorePermit;
use tokio::time::timeout;

use crate::negotiate::{Agreed, Answer, Purpose, negotiate};
use crate::room::{Room, Stranger};
use crate::token::{Command, Request, Tokens};
use crate::transport::Transport;

/// How long the answer may take beyond the request: a client that does not even take that is none.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// The largest head of a request.
const HEAD_SIZE: usize = 32 << 10;
const HEADERS: usize = 64;

/// What a client is about to get.
#[derive(Debug)]
pub(crate) struct Plan {
    pub request: Request,
    pub agreed: Agreed,
}

/// A connection on which streams begin.
pub(crate) struct Upgraded<'a, T> {
    /// Room for the session, until this is dropped.
    pub room: SemaphorePermit<'a>,
    pub io: T,
    /// What the client has sent already.
    pub read_ahead: Bytes,
    pub plan: Plan,
}

/// Serves the request of a connection; `None` when it was refused, and the connection is done with.
pub(crate) async fn upgrade<'a, T: Transport>(
    io: T,
    stranger: &Stranger<'a>,
    room: &'a Room,
    tokens: &Tokens,
    request_timeout: Duration,
) -> Option<Upgraded<'a, T>> {
    let plan = &Mutex::new(None);
    let service = service_fn(async |request: HttpRequest<hyper::body::Incoming>| {
        let answer = match grant(&request, stranger, room, tokens).await {
            Ok((agreed, permit, answer)) => {
                *plan.lock().unwrap_or_else(PoisonError::into_inner) = Some((agreed, permit));
                answer
            }
            Err(refusal) => {
                tracing::debug!(status = %refusal.status, reason = refusal.text, "refused a streaming request");
                refusal
            }
        };
        Ok::<_, Infallible>(respond(answer))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(request_timeout)
        .max_buf_size(HEAD_SIZE)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(io), service)
        .without_shutdown();
    let parts = match timeout(request_timeout + ANSWER_TIME, connection).await {
        Ok(Ok(parts)) => parts,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a streaming connection ended before its request was served");
            return None;
        }
        Err(_) => {
            tracing::debug!("a streaming connection took too long over its request");
            return None;
        }
    };
    let (plan, permit) = plan.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    Some(Upgraded {
        room: permit,
        io: parts.io.into_inner(),
        read_ahead: parts.read_buf,
        plan,
    })
}

/// What is asked for, with room for it.
async fn grant<'a, B>(
    request: &HttpRequest<B>,
    stranger: &Stranger<'a>,
    room: &'a Room,
    tokens: &Tokens,
) -> Result<(Plan, SemaphorePermit<'a>, Answer), Answer> {
    let (plan, answer) = decide(request, tokens)?;
    stranger.is_known();
    let permit = room.session().await.ok_or_else(|| {
        Answer::refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "there are as many streaming sessions as there may be",
        )
    })?;
    Ok((plan, permit, answer))
}

fn decide<B>(request: &HttpRequest<B>, tokens: &Tokens) -> Result<(Plan, Answer), Answer> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return Err(Answer::refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            "a stream begins with GET or POST",
        ));
    }
    let not_found = || {
        Answer::refuse(
            StatusCode::NOT_FOUND,
            "no such stream: its URL is wrong, was used, or has expired",
        )
    };
    let path = request.uri().path().strip_prefix('/').unwrap_or_default();
    let (verb, token) = path.split_once('/').ok_or_else(not_found)?;
    // Whatever comes of it, the token is used up.
    let granted = tokens.redeem(token).ok_or_else(not_found)?;
    let purpose = match (&granted, verb) {
        (Request::Command(Command::Exec(_)), "exec") => Purpose::Command,
        (Request::Command(Command::Attach(_)), "attach") => Purpose::Command,
        (Request::PortForward(_), "portforward") => Purpose::PortForward,
        _ => return Err(not_found()),
    };
    let (agreed, answer) = negotiate(purpose, request.method(), request.headers())?;
    Ok((
        Plan {
            request: granted,
            agreed,
        },
        answer,
    ))
}

fn respond(answer: Answer) -> Response<String> {
    let switching = answer.status == StatusCode::SWITCHING_PROTOCOLS;
    let mut text = answer.text;
    if !switching {
        text.push('\n');
    }
    let mut response = Response::new(text);
    *response.status_mut() = answer.status;
    for (name, value) in answer.headers {
        response.headers_mut().append(name, value);
    }
    if !switching {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
