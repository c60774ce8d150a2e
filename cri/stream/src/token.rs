//! One-use tokens: what a client may ask for, kept from the CRI call until its client comes.
//!
//! A token is 128 random bits. Finding one compares all that are kept, each in constant time, so that how long the
//! answer takes says nothing about how much of a guess was right.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::ConstantTimeEq as _;

use crate::urls::{AttachRequest, ExecRequest, PortForwardRequest, RequestError};

/// How many requests may wait for their clients.
const MAX_IN_FLIGHT: usize = 1000;
/// How large one request may be: Linux takes no longer command line.
const MAX_REQUEST: usize = 2 << 20;
/// How large all that wait may be together.
const MAX_TOTAL: usize = 32 << 20;
/// 128 bits in URL-safe base64.
const TOKEN_LEN: usize = 22;

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    Command(Command),
    PortForward(PortForwardRequest),
}

/// The requests whose streams are those of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

impl Request {
    fn weight(&self) -> usize {
        match self {
            Request::Command(Command::Exec(exec)) => {
                exec.container.len()
                    + exec
                        .command
                        .iter()
                        .map(|word| word.len() + size_of::<String>())
                        .sum::<usize>()
            }
            Request::Command(Command::Attach(attach)) => attach.container.len(),
            Request::PortForward(forward) => forward.pod.len(),
        }
    }
}

struct Waiting {
    token: [u8; TOKEN_LEN],
    expires: Instant,
    weight: usize,
    request: Request,
}

/// The requests that wait, oldest first.
pub(crate) struct Tokens {
    lifetime: Duration,
    waiting: Mutex<VecDeque<Waiting>>,
}

impl Tokens {
    pub fn new(lifetime: Duration) -> Tokens {
        Tokens {
            lifetime,
            waiting: Mutex::default(),
        }
    }

    /// Keeps `request` and returns the token for it.
    pub fn issue(&self, request: Request) -> Result<String, RequestError> {
        self.issue_at(request, Instant::now())
    }

    /// The request that `token` stands for, once.
    pub fn redeem(&self, token: &str) -> Option<Request> {
        self.redeem_at(token, Instant::now())
    }

    fn issue_at(&self, request: Request, now: Instant) -> Result<String, RequestError> {
        let weight = request.weight();
        if weight > MAX_REQUEST {
            return Err(RequestError::TooLarge {
                bytes: weight,
                limit: MAX_REQUEST,
            });
        }
        let mut random = [0u8; 16];
        getrandom::fill(&mut random).map_err(|source| RequestError::Random { source })?;
        let mut token = [0u8; TOKEN_LEN];
        URL_SAFE_NO_PAD
            .encode_slice(random, &mut token)
            .expect("16 bytes are 22 characters of base64");
        let mut waiting = self.lock();
        while waiting.front().is_some_and(|oldest| oldest.expires <= now) {
            waiting.pop_front();
        }
        let total: usize = waiting.iter().map(|one| one.weight).sum();
        if waiting.len() >= MAX_IN_FLIGHT || total + weight > MAX_TOTAL {
            return Err(RequestError::TooManyInFlight);
        }
        waiting.push_back(Waiting {
            token,
            expires: now + self.lifetime,
            weight,
            request,
        });
        Ok(String::from_utf8_lossy(&token).into_owned())
    }

    fn redeem_at(&self, token: &str, now: Instant) -> Option<Request> {
        let token: &[u8; TOKEN_LEN] = token.as_bytes().try_into().ok()?;
        let mut waiting = self.lock();
        let mut found = None;
        for (index, one) in waiting.iter().enumerate() {
            if bool::from(one.token.ct_eq(token)) {
                found = Some(index);
            }
        }
        let taken = waiting.remove(found?)?;
        (taken.expires > now).then_some(taken.request)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Tokens {
    /// Without the tokens.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens")
            .field("waiting", &self.lock().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Tokens {
        Tokens::new(Duration::from_secs(60))
    }

    fn request(pod: &str) -> Request {
        Request::PortForward(PortForwardRequest { pod: pod.to_owned() })
    }

    #[test]
    fn a_token_is_good_once() {
        let tokens = tokens();
        let (a, b) = (
            tokens.issue(request("a")).unwrap(),
            tokens.issue(request("b")).unwrap(),
        );
        assert_ne!(a, b);
        assert_eq!(tokens.redeem(&b), Some(request("b")));
        assert_eq!(tokens.redeem(&b), None);
        assert_eq!(tokens.redeem(&a), Some(request("a")));
        assert_eq!(tokens.redeem(""), None);
        assert_eq!(tokens.redeem(&"A".repeat(22)), None);
        assert_eq!(tokens.redeem(&"ä".repeat(11)), None);
    }

    #[test]
    fn a_token_is_good_for_a_minute() {
        let (tokens, now) = (tokens(), Instant::now());
        let a = tokens.issue_at(request("a"), now).unwrap();
        let b = tokens.issue_at(request("b"), now).unwrap();
        assert_eq!(
            tokens.redeem_at(&a, now + Duration::from_secs(59)),
            Some(request("a"))
        );
        assert_eq!(tokens.redeem_at(&b, now + Duration::from_secs(60)), None);
    }

    #[test]
    fn a_thousand_may_wait_and_make_room_when_they_expire() {
        let (tokens, now) = (tokens(), Instant::now());
        for _ in 0..MAX_IN_FLIGHT {
            tokens.issue_at(request("p"), now).unwrap();
        }
        assert!(matches!(
            tokens.issue_at(request("p"), now),
            Err(RequestError::TooManyInFlight)
        ));
        tokens
            .issue_at(request("p"), now + Duration::from_secs(60))
            .unwrap();
        assert_eq!(tokens.lock().len(), 1);
    }

    #[test]
    fn what_waits_is_bounded_in_bytes_too() {
        let tokens = tokens();
        let big = request(&"p".repeat(MAX_REQUEST));
        for _ in 0..MAX_TOTAL / MAX_REQUEST {
            tokens.issue(big.clone()).unwrap();
        }
        assert!(matches!(
            tokens.issue(request("p")),
            Err(RequestError::TooManyInFlight)
        ));
    }
}
