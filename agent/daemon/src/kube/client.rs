//! One request to the API server: a connection of its own, JSON there and back, bounded in time and size. What we ask is rare.

use std::time::Duration;
use std::{fmt, io};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::access::{Access, AccessError, Source};

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest answer: a node with its images has some 100 KiB.
const MAX_ANSWER: usize = 4 << 20;

/// A patch that replaces what it names, and removes what is null.
pub const MERGE: &str = "application/merge-patch+json";
/// A patch that knows that conditions are told apart by their type.
pub const STRATEGIC: &str = "application/strategic-merge-patch+json";
/// An object.
pub const JSON: &str = "application/json";

/// Why there is no answer, or not the one that was wished for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KubeError {
    /// How it is reached is not known.
    #[error("reach the API server")]
    Access(#[from] AccessError),
    /// There is no connection.
    #[error("connect to the API server {server}")]
    Connect {
        /// Its URL.
        server: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("{act}")]
    Broken {
        /// Method and path.
        act: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long.
    #[error("{act}: no answer within {} s", PATIENCE.as_secs())]
    Late {
        /// Method and path.
        act: String,
    },
    /// It said no.
    #[error("{0}")]
    Refused(Refusal),
}

/// What the API server said no with.
#[derive(Debug)]
pub struct Refusal {
    /// Method and path.
    pub act: String,
    /// Why, as a number.
    pub code: StatusCode,
    /// Why.
    pub message: String,
    /// Why, in words for programs.
    pub causes: Vec<String>,
    /// It was told as the result of what has succeeded as a request.
    pub in_result: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.act, self.code, self.message)
    }
}

impl KubeError {
    /// What it said no with.
    pub fn refused(&self) -> Option<StatusCode> {
        match self {
            KubeError::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    }
}

/// The API server.
#[derive(Debug, Clone)]
pub struct Client {
    source: Source,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl Client {
    /// Reached this way.
    pub fn of(source: Source) -> Client {
        Client { source }
    }

    /// Asks.
    ///
    /// # Errors
    /// It cannot be reached, is late, or says no.
    pub async fn get(&self, path: &str) -> Result<Value, KubeError> {
        self.call(Method::GET, path, JSON, None).await
    }

    /// Makes an object.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post(&self, path: &str, object: &Value) -> Result<Value, KubeError> {
        self.call(Method::POST, path, JSON, Some(object)).await
    }

    /// Changes an object; `kind` is of the patch.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn patch(&self, path: &str, kind: &str, patch: &Value) -> Result<Value, KubeError> {
        self.call(Method::PATCH, path, kind, Some(patch)).await
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn delete(&self, path: &str, options: &Value) -> Result<Value, KubeError> {
        self.call(Method::DELETE, path, JSON, Some(options)).await
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> Result<Value, KubeError> {
        let act = format!("{method} {path}");
        let work = self.exchange(&act, method, path, kind, body);
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(done) => done,
            Err(_) => Err(KubeError::Late { act }),
        }
    }

    async fn exchange(
        &self,
        act: &str,
        method: Method,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> Result<Value, KubeError> {
        fn broken<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
            act: &str,
        ) -> impl FnOnce(E) -> KubeError {
            let act = act.to_owned();
            move |e| KubeError::Broken {
                act,
                source: e.into(),
            }
        }
        let access = self.source.load()?;
        let stream = connect(&access).await.map_err(|source| KubeError::Connect {
            server: access.server.to_string(),
            source,
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken(act))?;
        let connection = tokio::spawn(connection);
        let base = access.server.path().trim_end_matches('/');
        let authority = access.server.authority().map_or("", |a| a.as_str());
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{base}{path}"))
            .header(HOST, authority)
            .header(ACCEPT, JSON)
            .header(USER_AGENT, concat!("slipway-agent/", env!("CARGO_PKG_VERSION")))
            .header(CONTENT_TYPE, kind);
        if let Some(token) = &access.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body))).map_err(broken(act))?;
        let answer = sender.send_request(request).await.map_err(broken(act))?;
        let code = answer.status();
        let bytes = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        connection.abort();
        let bytes = bytes.map_err(broken(act))?.to_bytes();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        refused(act, code, &value, &bytes).map_or(Ok(value), |refusal| Err(KubeError::Refused(refusal)))
    }
}

/// Whether an answer says no. A Status of failure says so with any code: an eviction that is not done is created, with 201.
fn refused(act: &str, code: StatusCode, value: &Value, bytes: &[u8]) -> Option<Refusal> {
    let failure = value["kind"] == "Status" && value["status"] == "Failure";
    let in_result = code.is_success() && failure;
    if code.is_success() && !failure {
        return None;
    }
    let told = || StatusCode::from_u16(u16::try_from(value["code"].as_u64()?).ok()?).ok();
    let causes = value["details"]["causes"].as_array().into_iter().flatten();
    Some(Refusal {
        act: act.to_owned(),
        code: if in_result {
            told().unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
        } else {
            code
        },
        message: match value["message"].as_str() {
            Some(message) => message.to_owned(),
            None => String::from_utf8_lossy(bytes).chars().take(200).collect(),
        },
        causes: causes
            .filter_map(|c| c["reason"].as_str().map(str::to_owned))
            .collect(),
        in_result,
    })
}

async fn connect(access: &Access) -> io::Result<Box<dyn Io>> {
    let secure = access.server.scheme_str() == Some("https");
    let host = access.server.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = access.server.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = TcpStream::connect((host, port)).await?;
    if !secure {
        return Ok(Box::new(stream));
    }
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(std::sync::Arc::clone(&access.tls));
    Ok(Box::new(connector.connect(name, stream).await?))
}
