//! One HTTP request: connections, redirects, time limits, bounded answers.
//!
//! Owns the rule that what is meant for one host (Authorization, the headers of hosts.toml, client certificates)
//! is never sent to another: redirects are followed here, not by the HTTP library. Refuses to know tokens and
//! repositories.

use super::RegistryConfig;
use super::failure::Failure;
use super::hosts::{Endpoint, authority, is_loopback};
use super::retry::retry_after;
use super::tls::Tls;
use crate::error::chain;
use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Client, Method, Response, StatusCode};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use url::Url;

const MOST_REDIRECTS: usize = 8;
/// What is read of the body of an error.
const ERROR_BODY: usize = 64 << 10;
const IDLE_CONNECTIONS: Duration = Duration::from_secs(30);

/// What a request carries. It must be possible to send it twice: the first answer may be a challenge.
#[derive(Default)]
pub(crate) enum Payload {
    #[default]
    None,
    Bytes(Bytes),
    /// Made anew for each attempt; the length is announced where it is known.
    Stream(Option<u64>, Box<dyn Fn() -> Body + Send + Sync>),
}

/// One request.
pub(crate) struct Request {
    pub method: Method,
    pub url: Url,
    pub headers: HeaderMap,
    pub payload: Payload,
}

impl Request {
    /// A request without a body.
    pub fn new(method: Method, url: Url) -> Request {
        Request {
            method,
            url,
            headers: HeaderMap::new(),
            payload: Payload::None,
        }
    }

    /// The same with one more header.
    pub fn header(mut self, name: reqwest::header::HeaderName, value: HeaderValue) -> Request {
        self.headers.insert(name, value);
        self
    }
}

/// An answer, and who gave it after all redirects.
pub(crate) struct Answer {
    pub response: Response,
    pub url: Url,
    pub host: String,
    idle: Duration,
    pace: Pace,
}

/// How fast bytes come, of the time they are waited for: who takes them slowly is no slow server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    window: Duration,
    least: u64,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    pub fn new(config: &RegistryConfig) -> Pace {
        Pace {
            window: config.slow_window,
            least: config.slow_bytes,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// Counts; `false` when a whole window brought less than the least there is to be.
    fn keeps(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.window {
            return true;
        }
        let enough = self.bytes >= self.least;
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        enough
    }

    /// Whether so many bytes in so much time are progress.
    pub fn is_progress(&self, waited: Duration, bytes: u64) -> bool {
        bytes > 0 && bytes as f64 * self.window.as_secs_f64() >= self.least as f64 * waited.as_secs_f64()
    }
}

/// Clients by what makes connections differ.
pub(crate) struct Transport {
    user_agent: String,
    connect_timeout: Duration,
    idle: Duration,
    pace: Pace,
    clients: Mutex<HashMap<ClientKey, Client>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    /// `None`: for plain http only.
    tls: Option<Tls>,
    direct: bool,
    dial_timeout: Duration,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}

impl Transport {
    pub fn new(config: &RegistryConfig) -> Transport {
        Transport {
            user_agent: config.user_agent.clone(),
            connect_timeout: config.connect_timeout,
            idle: config.read_timeout,
            pace: Pace::new(config),
            clients: Mutex::default(),
        }
    }

    /// Sends a request on behalf of an endpoint, following redirects of GET and HEAD. Any status is an answer.
    /// `authorization` is shown to the origin of the request's URL: whoever gives it has to know that this is whom
    /// it is meant for.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        request: &Request,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, Failure> {
        let mut url = request.url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let answer = self.send_once(endpoint, request, authorization, &url).await?;
            let follow = matches!(request.method, Method::GET | Method::HEAD)
                && matches!(answer.response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            if !follow {
                return Ok(answer);
            }
            url = location(&answer, &url)?;
        }
        Err(Failure::Protocol {
            host: authority(&url),
            detail: format!("more than {MOST_REDIRECTS} redirects"),
        })
    }

    async fn send_once(
        &self,
        endpoint: &Endpoint,
        request: &Request,
        authorization: Option<&HeaderValue>,
        url: &Url,
    ) -> Result<Answer, Failure> {
        let host = authority(url);
        let own = same_origin(url, &endpoint.base);
        let client = self.client(endpoint, url, own)?;
        let mut headers = request.headers.clone();
        // A compressed layer inside a compressed answer would be neither resumable nor what the digest is of.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if own {
            for (name, value) in &endpoint.headers {
                headers.append(name.clone(), value.clone());
            }
        }
        if let Some(authorization) = authorization.filter(|_| same_origin(url, &request.url)) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let mut builder = client.request(request.method.clone(), url.clone());
        let has_body = match &request.payload {
            Payload::None => {
                // Registries behind proxies want a length with every POST, PUT and PATCH.
                if matches!(request.method, Method::POST | Method::PUT | Method::PATCH) {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
                }
                false
            }
            Payload::Bytes(bytes) => {
                builder = builder.body(bytes.clone());
                true
            }
            Payload::Stream(length, make) => {
                if let Some(length) = length {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from(*length));
                }
                builder = builder.body(make());
                true
            }
        };
        let sent = builder.headers(headers).send();
        // How long a body takes depends on its length: who sends one watches its progress.
        let sent = match has_body {
            true => sent.await,
            false => timeout(self.connect_timeout + self.idle, sent)
                .await
                .map_err(|_| Failure::Cut {
                    host: host.clone(),
                    detail: format!(
                        "no answer within {} s",
                        (self.connect_timeout + self.idle).as_secs()
                    ),
                })?,
        };
        let response = sent.map_err(|error| Failure::of_transport(&host, &error))?;
        Ok(Answer {
            response,
            url: url.clone(),
            host,
            idle: self.idle,
            pace: self.pace,
        })
    }

    /// The client for a URL: an endpoint's authorities are believed of the hosts it redirects to as well, but its
    /// client certificate is only shown to itself.
    fn client(&self, endpoint: &Endpoint, url: &Url, own: bool) -> Result<Client, Failure> {
        let mut tls = endpoint.tls.clone();
        if !own {
            tls.clients.clear();
        }
        let key = ClientKey {
            // Plain http needs no certificates, and reading the system's takes a while.
            tls: (url.scheme() == "https").then_some(tls),
            direct: url.host_str().is_some_and(is_loopback),
            dial_timeout: endpoint.dial_timeout.unwrap_or(self.connect_timeout),
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = self.build(&key).map_err(|detail| Failure::Config {
            detail: format!("the connection to {}: {detail}", authority(url)),
        })?;
        // Changed certificates leave old clients behind.
        if clients.len() > 64 {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn build(&self, key: &ClientKey) -> Result<Client, String> {
        let tls = key.tls.as_ref().map_or_else(Tls::believing_nobody, Tls::config);
        let tls = tls.map_err(|error| chain(&error))?;
        let builder = Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(&self.user_agent)
            .connect_timeout(key.dial_timeout)
            .pool_idle_timeout(IDLE_CONNECTIONS)
            .tcp_nodelay(true)
            .referer(false);
        // As curl and Go do: a proxy of the environment is not for this machine itself.
        let builder = if key.direct { builder.no_proxy() } else { builder };
        builder.build().map_err(|error| chain(&error))
    }
}

impl Answer {
    /// The status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// The failure that the answer is; its body is read as far as an explanation may go.
    pub async fn failure(mut self) -> Failure {
        let mut body = Vec::new();
        while let Ok(Some(bytes)) = self.chunk().await {
            body.extend_from_slice(&bytes[..bytes.len().min(ERROR_BODY - body.len())]);
            if body.len() == ERROR_BODY {
                break;
            }
        }
        let pause = retry_after(self.response.headers());
        Failure::of_status(&self.host, self.status(), &body, pause)
    }

    /// The next bytes of the body, waiting no longer than the time limit for silence, and giving up a server that
    /// only drips.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        let begun = Instant::now();
        match timeout(self.idle, self.response.chunk()).await {
            Ok(Ok(Some(bytes))) => match self.pace.keeps(begun.elapsed(), bytes.len() as u64) {
                true => Ok(Some(bytes)),
                false => Err(Failure::Cut {
                    host: self.host.clone(),
                    detail: format!(
                        "less than {} KiB came in {} s",
                        self.pace.least >> 10,
                        self.pace.window.as_secs_f32()
                    ),
                }),
            },
            Ok(Ok(None)) => Ok(None),
            Ok(Err(error)) => {
                let failure = Failure::of_transport(&self.host, &error);
                // Inside a body nothing is being connected to.
                Err(match failure {
                    Failure::Unreachable { host, detail, .. } => Failure::Cut { host, detail },
                    failure => failure,
                })
            }
            Err(_) => {
                let detail = format!("nothing came for {} s", self.idle.as_secs_f32());
                Err(Failure::Cut {
                    host: self.host.clone(),
                    detail,
                })
            }
        }
    }

    /// The whole body, when it is not longer than `limit`.
    pub async fn body(mut self, limit: usize) -> Result<Vec<u8>, Failure> {
        let too_long = |host: String| Failure::Protocol {
            host,
            detail: format!("the answer is longer than {limit} bytes"),
        };
        if self
            .response
            .content_length()
            .is_some_and(|length| length > limit as u64)
        {
            return Err(too_long(self.host));
        }
        let mut body = Vec::new();
        while let Some(bytes) = self.chunk().await? {
            if body.len() + bytes.len() > limit {
                return Err(too_long(self.host));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }
}

/// Where an answer sends us.
pub(crate) fn location(answer: &Answer, base: &Url) -> Result<Url, Failure> {
    let protocol = |detail: String| Failure::Protocol {
        host: answer.host.clone(),
        detail,
    };
    let text = answer
        .response
        .headers()
        .get(LOCATION)
        .and_then(|value| value.to_str().ok())
        .ok_or_else(|| protocol(format!("status {} without a Location", answer.status())))?;
    let url = base
        .join(text)
        .map_err(|_| protocol("the Location is not a URL".to_owned()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(protocol(format!("it sends us to {}:", url.scheme())));
    }
    Ok(url)
}

/// Whether two URLs are of the same scheme, host and port.
pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| same_origin(&Url::parse(a).unwrap(), &Url::parse(b).unwrap());
        assert!(same("https://h.x/v2", "https://h.x:443/other"));
        assert!(!same("https://h.x/", "http://h.x/"));
        assert!(!same("https://h.x/", "https://h.x:444/"));
        assert!(!same("https://h.x/", "https://i.h.x/"));
    }
}
