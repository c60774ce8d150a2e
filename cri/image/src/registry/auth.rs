//! Tokens: what a challenge asks for, fetched, kept and renewed.
//!
//! Implements the distribution project's token specification, by GET with user and password (or nobody's), and by
//! POST with an OAuth2 refresh token. Owns the cache; refuses to know what the requests are about, beyond scopes.

use super::challenge::Challenge;
use super::credentials::{BASE64, Credentials};
use super::failure::Failure;
use super::hosts::{Endpoint, authority, is_loopback};
use super::transport::{Payload, Request, Transport};
use base64::Engine as _;
use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{CONTENT_TYPE, HeaderValue};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use url::Url;

const LONGEST_ANSWER: usize = 256 << 10;
const CLIENT_ID: &str = "slipway";
/// The token specification: a token that does not say lasts this long.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is renewed this long before its end, so that it does not end on the way.
const MARGIN: Duration = Duration::from_secs(5);
const MOST_KEPT: usize = 1024;

/// Challenges met and tokens got, of all registries.
#[derive(Default)]
pub(crate) struct Tokens {
    challenges: Mutex<HashMap<ChallengeKey, Challenge>>,
    tokens: Mutex<HashMap<TokenKey, Slot>>,
}

/// Who asks is alone while the token is fetched: the others wait for it.
type Slot = Arc<tokio::sync::Mutex<Option<Token>>>;
type ChallengeKey = (Url, Vec<String>);

#[derive(Clone, PartialEq, Eq, Hash)]
struct TokenKey {
    realm: String,
    service: Option<String>,
    scopes: Vec<String>,
    credentials: Option<Credentials>,
}

struct Token {
    header: HeaderValue,
    until: Instant,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
    expires_in: Option<u64>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// What an endpoint wanted the last time for these scopes.
    pub fn known(&self, endpoint: &Endpoint, scopes: &[String]) -> Option<Challenge> {
        let challenges = self.challenges.lock().unwrap_or_else(PoisonError::into_inner);
        challenges.get(&(endpoint.base.clone(), scopes.to_vec())).cloned()
    }

    /// Remembers what an endpoint wants for these scopes.
    pub fn learn(&self, endpoint: &Endpoint, scopes: &[String], challenge: Challenge) {
        let mut challenges = self.challenges.lock().unwrap_or_else(PoisonError::into_inner);
        if challenges.len() >= MOST_KEPT {
            challenges.clear();
        }
        challenges.insert((endpoint.base.clone(), scopes.to_vec()), challenge);
    }

    /// The Authorization header that answers a challenge; `None` when there is nothing to answer with. With
    /// `refused`, the header that was not good enough, a kept token equal to it is fetched again.
    pub async fn answer(
        &self,
        transport: &Transport,
        endpoint: &Endpoint,
        challenge: &Challenge,
        scopes: &[String],
        credentials: Option<&Credentials>,
        refused: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        if let Some(Credentials::Bearer { token }) = credentials {
            return secret(&format!("Bearer {token}")).map(Some);
        }
        let Challenge::Bearer {
            realm,
            service,
            scope,
        } = challenge
        else {
            return match credentials {
                Some(Credentials::Basic { username, password }) => basic(username, password).map(Some),
                _ => Ok(None),
            };
        };
        let mut wanted: Vec<String> = scopes.to_vec();
        wanted.extend(scope.iter().flat_map(|scope| scope.split(' ')).map(str::to_owned));
        wanted.retain(|scope| !scope.is_empty());
        wanted.sort();
        wanted.dedup();
        let key = TokenKey {
            realm: realm.clone(),
            service: service.clone(),
            scopes: wanted,
            credentials: credentials.cloned(),
        };
        let slot = self.slot(&key);
        let mut kept = slot.lock().await;
        if let Some(token) = kept.as_ref()
            && token.until > Instant::now()
            && Some(&token.header) != refused
        {
            return Ok(Some(token.header.clone()));
        }
        let token = fetch(transport, endpoint, &key).await?;
        let header = token.header.clone();
        *kept = Some(token);
        Ok(Some(header))
    }

    fn slot(&self, key: &TokenKey) -> Slot {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= MOST_KEPT {
            tokens.clear();
        }
        Arc::clone(tokens.entry(key.clone()).or_default())
    }
}

async fn fetch(transport: &Transport, endpoint: &Endpoint, key: &TokenKey) -> Result<Token, Failure> {
    let realm = endpoint
        .base
        .join(&key.realm)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"));
    let realm = realm.filter(Url::has_host).ok_or_else(|| Failure::Protocol {
        host: endpoint.host.clone(),
        detail: "the realm of its token service is not a URL".to_owned(),
    })?;
    let exposed = realm.scheme() == "http"
        && endpoint.base.scheme() == "https"
        && !realm.host_str().is_some_and(is_loopback);
    if exposed && key.credentials.is_some() {
        return Err(Failure::Denied {
            host: endpoint.host.clone(),
            detail: format!(
                "its token service {} wants the password over plain http",
                authority(&realm)
            ),
        });
    }
    let (request, authorization) = match &key.credentials {
        Some(Credentials::Identity { token }) => (refresh(realm, key, token), None),
        Some(Credentials::Basic { username, password }) => (
            plain(realm, key, Some(username)),
            Some(basic(username, password)?),
        ),
        _ => (plain(realm, key, None), None),
    };
    let answer = transport.send(endpoint, &request, authorization.as_ref()).await?;
    if !answer.status().is_success() {
        return Err(match answer.failure().await {
            // Its 404 is not about the image.
            Failure::NotFound { host } => Failure::Protocol {
                host,
                detail: "there is no token service".to_owned(),
            },
            failure => failure,
        });
    }
    let host = answer.host.clone();
    let body = answer.body(LONGEST_ANSWER).await?;
    let bad = |detail: &str| Failure::Protocol {
        host: host.clone(),
        detail: detail.to_owned(),
    };
    let parsed: Answer = serde_json::from_slice(&body)
        .map_err(|_| bad("the token service's answer is not what it should be"))?;
    let token = if parsed.token.is_empty() {
        parsed.access_token
    } else {
        parsed.token
    };
    if token.is_empty() {
        return Err(bad("the token service gave no token"));
    }
    // The specification lets a client take shorter lives for a minute.
    let life = parsed.expires_in.map_or(DEFAULT_LIFE, |seconds| {
        Duration::from_secs(seconds.clamp(10, 86_400))
    });
    Ok(Token {
        header: secret(&format!("Bearer {token}"))?,
        until: Instant::now() + life - MARGIN,
    })
}

/// GET realm?service=…&scope=…&scope=…
fn plain(mut realm: Url, key: &TokenKey, account: Option<&str>) -> Request {
    {
        let mut query = realm.query_pairs_mut();
        if let Some(service) = &key.service {
            query.append_pair("service", service);
        }
        for scope in &key.scopes {
            query.append_pair("scope", scope);
        }
        if let Some(account) = account {
            query.append_pair("account", account);
        }
        query.append_pair("client_id", CLIENT_ID);
    }
    Request::new(Method::GET, realm)
}

/// POST of a refresh token.
fn refresh(realm: Url, key: &TokenKey, token: &str) -> Request {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "refresh_token");
    form.append_pair("client_id", CLIENT_ID);
    form.append_pair("refresh_token", token);
    form.append_pair("scope", &key.scopes.join(" "));
    if let Some(service) = &key.service {
        form.append_pair("service", service);
    }
    let mut request = Request::new(Method::POST, realm);
    request.headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/x-www-form-urlencoded"),
    );
    request.payload = Payload::Bytes(Bytes::from(form.finish()));
    request
}

fn basic(username: &str, password: &str) -> Result<HeaderValue, Failure> {
    secret(&format!(
        "Basic {}",
        BASE64.encode(format!("{username}:{password}"))
    ))
}

/// A header value that is not shown by `Debug`.
pub(crate) fn secret(text: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(text).map_err(|_| Failure::Config {
        detail: "the credentials have characters that cannot be sent".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}
