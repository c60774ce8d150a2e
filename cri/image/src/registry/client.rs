//! The distribution protocol for one reference: where to ask, as whom, in which order, and how often.
//!
//! A [`Session`] is opened for one pull or push. Each request answers challenges by itself and is repeated while
//! that makes sense; objects by digest are looked for in all places that may have them. Refuses to know the store.

use super::RegistryConfig;
use super::auth::{Tokens, secret};
use super::challenge::challenge;
use super::credentials::Credentials;
use super::docker_config::DockerConfig;
use super::failure::Failure;
use super::hosts::{self, Endpoint, authority};
use super::manifest::{ACCEPT, LONGEST_MANIFEST};
use super::retry::Backoff;
use super::tls::Tls;
use super::transport::{Answer, Request, Transport, same_origin};
use crate::digest::Digest;
use crate::error::chain;
use crate::progress::ProgressEvent;
use crate::reference::Reference;
use reqwest::header::{ACCEPT as ACCEPT_HEADER, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};
use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OnceCell, Semaphore};
use url::Url;

/// A registry that has not answered at all is asked once more: somebody may wait for the fallback. One that has
/// answered before is being restarted, or the network is down for a moment.
const ATTEMPTS_TO_REACH: u32 = 2;

/// What all pulls or pushes of a process share: connections, tokens, and the bound on transfers.
#[derive(Debug)]
pub(crate) struct Registry {
    pub config: RegistryConfig,
    pub transport: Transport,
    pub tokens: Tokens,
    pub transfers: Arc<Semaphore>,
    /// Bounds what parallel ranges keep in memory.
    pub range_slots: Arc<Semaphore>,
}

impl Registry {
    /// How many ranges are in memory at a time.
    const RANGE_SLOTS: usize = 8;

    pub fn new(config: RegistryConfig) -> Arc<Registry> {
        Arc::new(Registry {
            transport: Transport::new(&config),
            tokens: Tokens::default(),
            transfers: Arc::new(Semaphore::new(config.max_concurrent.clamp(1, 64))),
            range_slots: Arc::new(Semaphore::new(Registry::RANGE_SLOTS)),
            config,
        })
    }
}

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Pull,
    Push,
}

/// Who hears of retries.
pub(crate) type Notify = Arc<dyn Fn(ProgressEvent) + Send + Sync>;

/// One reference's registry.
pub(crate) struct Session {
    pub registry: Arc<Registry>,
    pub reference: Reference,
    places: Vec<Place>,
    explicit: Option<Credentials>,
    docker: DockerConfig,
    access: Access,
    notify: Notify,
    /// What of [`Registry::transfers`] this session may have: less than all, so that one slow image leaves room.
    pub transfers: Semaphore,
    /// The same of [`Registry::range_slots`].
    pub range_slots: Arc<Semaphore>,
    /// Places that gave corrupt objects.
    distrusted: Mutex<HashSet<String>>,
    /// Somebody has answered.
    reached: AtomicBool,
}

/// An endpoint, and who we are there.
pub(crate) struct Place {
    pub endpoint: Endpoint,
    credentials: OnceCell<Option<Credentials>>,
}

/// A manifest or index that a registry gave.
#[derive(Clone)]
pub(crate) struct Fetched {
    pub bytes: Vec<u8>,
    pub media_type: String,
    pub digest: Digest,
    pub host: String,
}

/// What to ask a manifest by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    Tag(&'a str),
    Digest(Digest),
}

impl fmt::Display for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Tag(tag) => f.write_str(tag),
            Target::Digest(digest) => write!(f, "{digest}"),
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("reference", &self.reference)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Reads hosts.toml and docker's configuration. Makes no request.
    pub async fn open(
        registry: &Arc<Registry>,
        reference: &Reference,
        explicit: Option<Credentials>,
        access: Access,
        notify: Notify,
    ) -> Result<Session, Failure> {
        let (config, name) = (registry.config.clone(), reference.registry().to_owned());
        let read =
            move || {
                let endpoints = hosts::endpoints(config.certs_dir.as_deref(), &name, &config.insecure)
                    .map_err(|error| Failure::Config {
                        detail: chain(&error),
                    })?;
                let docker = config
                    .docker_config
                    .as_deref()
                    .map(DockerConfig::read)
                    .transpose();
                let docker = docker.map_err(|error| Failure::Config {
                    detail: chain(&error),
                })?;
                Ok::<_, Failure>((endpoints, docker.unwrap_or_default()))
            };
        let read = tokio::task::spawn_blocking(read).await;
        let (endpoints, docker) = read.map_err(|_| Failure::Config {
            detail: "reading it was interrupted".to_owned(),
        })??;
        let places = endpoints
            .into_iter()
            .map(|endpoint| Place {
                endpoint,
                credentials: OnceCell::new(),
            })
            .collect();
        Ok(Session {
            registry: Arc::clone(registry),
            reference: reference.clone(),
            places,
            explicit,
            docker,
            access,
            notify,
            transfers: Semaphore::new(share(registry.config.max_concurrent.clamp(1, 64))),
            range_slots: Arc::new(Semaphore::new(share(Registry::RANGE_SLOTS))),
            distrusted: Mutex::default(),
            reached: AtomicBool::new(false),
        })
    }

    /// The credentials it was given, before any that the node has for the registry.
    pub fn explicit(&self) -> Option<&Credentials> {
        self.explicit.as_ref()
    }

    /// The places that may be asked, in order.
    pub fn places(&self, may: impl Fn(&Endpoint) -> bool) -> Vec<&Place> {
        let distrusted = self.distrusted.lock().unwrap_or_else(PoisonError::into_inner);
        let places = self.places.iter().filter(|place| may(&place.endpoint));
        places
            .filter(|place| !distrusted.contains(&place.endpoint.host))
            .collect()
    }

    /// Asks a host no more in this session; whether it was asked so far, and there is another one to ask.
    pub fn distrust(&self, host: &str) -> bool {
        let is_place = self.places.iter().any(|place| place.endpoint.host == host);
        let new = is_place
            && self
                .distrusted
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(host.to_owned());
        new && !self.places(|endpoint| endpoint.pull).is_empty()
            && !self.places(|endpoint| endpoint.resolve).is_empty()
    }

    /// The URL of something in the repository.
    pub fn url(&self, endpoint: &Endpoint, rest: &str) -> Url {
        let mut url = endpoint.base.clone();
        let base = endpoint.base.path().trim_end_matches('/');
        url.set_path(&format!("{base}/{}/{rest}", self.reference.repository()));
        let registry = self.reference.registry();
        let same =
            endpoint.host == registry || (registry == "docker.io" && endpoint.host == "registry-1.docker.io");
        if !same {
            // How mirrors of several registries tell whose repository is meant (containerd's convention).
            url.query_pairs_mut().append_pair("ns", registry);
        }
        url
    }

    /// What the requests of this session need to be allowed.
    pub fn scopes(&self) -> Vec<String> {
        let actions = match self.access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        };
        vec![format!("repository:{}:{actions}", self.reference.repository())]
    }

    /// A fresh count of attempts.
    pub fn backoff(&self) -> Backoff {
        Backoff::new(self.registry.config.attempts, self.registry.config.first_pause)
    }

    /// Pauses before the next attempt, or gives the failure back when there should be none.
    pub async fn pause(&self, backoff: &mut Backoff, what: &str, failure: Failure) -> Result<(), Failure> {
        let silent = failure.is_unreachable() && !self.reached.load(Ordering::Relaxed);
        if !failure.is_transient() || (silent && backoff.failures() + 1 >= ATTEMPTS_TO_REACH) {
            return Err(failure);
        }
        let Some(pause) = backoff.failed(failure.retry_after()) else {
            return Err(failure);
        };
        tracing::debug!(reference = %self.reference, what, %failure, ?pause, "trying again");
        (self.notify)(ProgressEvent::Retrying {
            what: what.to_owned(),
            reason: failure.to_string(),
            pause,
        });
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Tells the session's listener.
    pub fn tell(&self, event: ProgressEvent) {
        (self.notify)(event);
    }

    /// One request, with the answer to a challenge. Anything but success is a failure.
    pub async fn call(&self, place: &Place, request: &Request, scopes: &[String]) -> Result<Answer, Failure> {
        let Registry {
            transport, tokens, ..
        } = &*self.registry;
        let endpoint = &place.endpoint;
        // Where an upload goes on is for the registry to say (its Location): who we are is for its own origin only,
        // and nobody else's challenge is answered.
        if !same_origin(&request.url, &endpoint.base) {
            let answer = transport.send(endpoint, request, None).await?;
            self.reached.store(true, Ordering::Relaxed);
            return success(answer).await;
        }
        let mut header = match (tokens.known(endpoint, scopes), &self.explicit) {
            (_, Some(Credentials::Bearer { token })) if endpoint.upstream => {
                Some(secret(&format!("Bearer {token}"))?)
            }
            (Some(challenge), _) => {
                let credentials = self.credentials(place).await?;
                tokens
                    .answer(transport, endpoint, &challenge, scopes, credentials, None)
                    .await?
            }
            (None, _) => None,
        };
        // A kept token may be stale, and a first challenge may come: each at most once.
        for _ in 0..2 {
            let answer = transport.send(endpoint, request, header.as_ref()).await?;
            self.reached.store(true, Ordering::Relaxed);
            let ours = same_origin(&answer.url, &endpoint.base);
            if answer.status() != StatusCode::UNAUTHORIZED || !ours {
                return success(answer).await;
            }
            let Some(challenge) = challenge(answer.response.headers()) else {
                return success(answer).await;
            };
            tokens.learn(endpoint, scopes, challenge.clone());
            let credentials = self.credentials(place).await?;
            let next = tokens
                .answer(
                    transport,
                    endpoint,
                    &challenge,
                    scopes,
                    credentials,
                    header.as_ref(),
                )
                .await?;
            match next {
                Some(next) if Some(&next) != header.as_ref() => header = Some(next),
                _ => return Err(answer.failure().await),
            }
        }
        success(transport.send(endpoint, request, header.as_ref()).await?).await
    }

    /// As [`Session::call`], again and again while that makes sense.
    pub async fn call_patiently(
        &self,
        place: &Place,
        what: &str,
        request: &Request,
    ) -> Result<Answer, Failure> {
        let scopes = self.scopes();
        let mut backoff = self.backoff();
        loop {
            match self.call(place, request, &scopes).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => self.pause(&mut backoff, what, failure).await?,
            }
        }
    }

    /// Who we are at a place: explicit credentials are for the registry itself and not for its mirrors, whose
    /// credentials are looked up under their own name.
    async fn credentials<'a>(&self, place: &'a Place) -> Result<Option<&'a Credentials>, Failure> {
        let find = async || {
            let endpoint = &place.endpoint;
            if endpoint.upstream && self.explicit.is_some() {
                return Ok(self.explicit.clone());
            }
            let repository = self.reference.repository();
            let config = |error| Failure::Config {
                detail: chain(&error),
            };
            let found = self
                .docker
                .credentials(&endpoint.host, repository)
                .await
                .map_err(config)?;
            match found {
                None if endpoint.upstream => self
                    .docker
                    .credentials(self.reference.registry(), repository)
                    .await
                    .map_err(config),
                found => Ok(found),
            }
        };
        Ok(place.credentials.get_or_try_init(find).await?.as_ref())
    }

    /// The digest that a tag means now (or that there is a manifest with a digest), without the manifest itself
    /// where the registry can do that; and the host that said so.
    pub async fn resolve(&self, target: Target<'_>) -> Result<(Digest, String), Failure> {
        let mut last = self.nowhere();
        for place in self.places(|endpoint| endpoint.resolve) {
            match self.head(place, target).await {
                Ok(found) => return Ok(found),
                Err(failure) => last = self.passed(place, failure),
            }
        }
        Err(last)
    }

    async fn head(&self, place: &Place, target: Target<'_>) -> Result<(Digest, String), Failure> {
        let url = self.url(&place.endpoint, &format!("manifests/{target}"));
        let request = Request::new(Method::HEAD, url).header(ACCEPT_HEADER, HeaderValue::from_static(ACCEPT));
        match self.call_patiently(place, &self.named(target), &request).await {
            Ok(answer) => {
                if let Target::Digest(digest) = target {
                    return Ok((digest, answer.host));
                }
                if let Some(digest) = answer
                    .header("docker-content-digest")
                    .and_then(|d| d.parse().ok())
                {
                    return Ok((digest, answer.host));
                }
            }
            Err(Failure::Status {
                status: 400 | 405 | 406 | 501,
                ..
            }) => {}
            Err(failure) => return Err(failure),
        }
        let fetched = self.document_at(place, target).await?;
        Ok((fetched.digest, fetched.host))
    }

    /// A manifest or index.
    pub async fn document(&self, target: Target<'_>) -> Result<Fetched, Failure> {
        let mut last = self.nowhere();
        let by_tag = matches!(target, Target::Tag(_));
        for place in self.places(|endpoint| if by_tag { endpoint.resolve } else { endpoint.pull }) {
            let found = match target {
                // It may say what a tag means, but not give the object.
                Target::Tag(_) if !place.endpoint.pull => match self.head(place, target).await {
                    Ok((digest, _)) => Box::pin(self.document(Target::Digest(digest))).await,
                    Err(failure) => Err(failure),
                },
                target => self.document_at(place, target).await,
            };
            match found {
                Ok(fetched) => return Ok(fetched),
                Err(failure) => last = self.passed(place, failure),
            }
        }
        Err(last)
    }

    /// What is asked for by its whole name: whoever hears of it knows neither registry nor repository.
    fn named(&self, target: Target<'_>) -> String {
        let joint = match target {
            Target::Tag(_) => ':',
            Target::Digest(_) => '@',
        };
        format!("{}{joint}{target}", self.reference.name())
    }

    async fn document_at(&self, place: &Place, target: Target<'_>) -> Result<Fetched, Failure> {
        let url = self.url(&place.endpoint, &format!("manifests/{target}"));
        let request = Request::new(Method::GET, url).header(ACCEPT_HEADER, HeaderValue::from_static(ACCEPT));
        let mut backoff = self.backoff();
        let what = self.named(target);
        loop {
            match self.document_once(place, &request).await {
                Ok(fetched) => {
                    return match target {
                        Target::Digest(digest) if fetched.digest != digest => Err(Failure::Corrupt {
                            host: fetched.host,
                            detail: format!("its digest is {}, expected {digest}", fetched.digest),
                        }),
                        _ => Ok(fetched),
                    };
                }
                Err(failure) => self.pause(&mut backoff, &what, failure).await?,
            }
        }
    }

    async fn document_once(&self, place: &Place, request: &Request) -> Result<Fetched, Failure> {
        let answer = self.call(place, request, &self.scopes()).await?;
        let media_type = answer.header("content-type").unwrap_or_default().to_owned();
        let told: Option<Digest> = answer
            .header("docker-content-digest")
            .and_then(|text| text.parse().ok());
        let host = answer.host.clone();
        let bytes = answer.body(LONGEST_MANIFEST).await?;
        let digest = Digest::of(&bytes);
        if let Some(told) = told.filter(|told| *told != digest) {
            let detail = format!("its digest is {digest}, the registry says {told}");
            return Err(Failure::Corrupt { host, detail });
        }
        Ok(Fetched {
            bytes,
            media_type,
            digest,
            host,
        })
    }

    /// Opens a blob at a place, from a byte on (and up to another). With a hint, a URL that an earlier request was
    /// sent on to, the registry is not asked again.
    pub async fn open_blob(
        &self,
        place: &Place,
        digest: &Digest,
        range: Option<(u64, Option<u64>)>,
        hint: Option<&Url>,
    ) -> Result<Answer, Failure> {
        let ranged = |url: Url| {
            let mut request = Request::new(Method::GET, url);
            if let Some((from, to)) = range {
                let to = to.map(|to| to.to_string()).unwrap_or_default();
                if let Ok(value) = HeaderValue::from_str(&format!("bytes={from}-{to}")) {
                    request.headers.insert(RANGE, value);
                }
            }
            request
        };
        if let Some(hint) = hint {
            let answer = self
                .registry
                .transport
                .send(&place.endpoint, &ranged(hint.clone()), None)
                .await;
            if let Ok(answer) = answer
                && answer.status().is_success()
            {
                return Ok(answer);
            }
        }
        let url = self.url(&place.endpoint, &format!("blobs/{digest}"));
        self.call(place, &ranged(url), &self.scopes()).await
    }

    /// Opens a URL that a foreign layer's descriptor names: as nobody, whatever it asks for.
    pub async fn open_foreign(&self, url: &Url, from: u64) -> Result<Answer, Failure> {
        let mut base = url.clone();
        base.set_path("/");
        base.set_query(None);
        let endpoint = Endpoint {
            host: authority(url),
            base,
            pull: true,
            resolve: false,
            push: false,
            tls: Tls::default(),
            headers: HeaderMap::new(),
            upstream: false,
            dial_timeout: None,
        };
        let mut request = Request::new(Method::GET, url.clone());
        if from > 0
            && let Ok(value) = HeaderValue::from_str(&format!("bytes={from}-"))
        {
            request.headers.insert(RANGE, value);
        }
        success(self.registry.transport.send(&endpoint, &request, None).await?).await
    }

    /// A place could not give what was asked for; the next one is asked, and the last one's failure is the answer.
    pub fn passed(&self, place: &Place, failure: Failure) -> Failure {
        tracing::debug!(reference = %self.reference, place = %place.endpoint.base, %failure, "not to be had here");
        failure
    }

    /// The failure when no place may be asked at all.
    pub fn nowhere(&self) -> Failure {
        Failure::Config {
            detail: format!(
                "hosts.toml has no host that may be asked for {}",
                self.reference.registry()
            ),
        }
    }
}

/// Two thirds, and at least one.
fn share(all: usize) -> usize {
    (all * 2 / 3).max(1)
}

async fn success(answer: Answer) -> Result<Answer, Failure> {
    match answer.status().is_success() {
        true => Ok(answer),
        false => Err(answer.failure().await),
    }
}
