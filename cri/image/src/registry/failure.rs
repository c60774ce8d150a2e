//! What a request to a registry can come to, before it is said of which image.
//!
//! Owns the classification: what is worth another attempt, what another host may know better. Refuses to know
//! references: pull and push turn a [`Failure`] into their own error, which names one.

use crate::pull::PullError;
use crate::push::PushError;
use crate::reference::Reference;
use reqwest::StatusCode;
use serde::Deserialize;
use std::error::Error;
use std::time::Duration;

/// A request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{host} does not have it")]
    NotFound { host: String },
    #[error("{host} refuses access: {detail}")]
    Denied { host: String, detail: String },
    #[error("{host} cannot be reached: {detail}")]
    Unreachable {
        host: String,
        detail: String,
        hopeless: bool,
    },
    #[error("{host} limits requests")]
    TooManyRequests {
        host: String,
        retry_after: Option<Duration>,
    },
    #[error("{host} answered {status}: {detail}")]
    Status {
        host: String,
        status: u16,
        detail: String,
        retry_after: Option<Duration>,
    },
    /// The connection broke, or nothing came for too long.
    #[error("the transfer from {host} broke: {detail}")]
    Cut { host: String, detail: String },
    /// The answer makes no sense: a missing header, a body that is too long.
    #[error("{host} gave an answer that cannot be used: {detail}")]
    Protocol { host: String, detail: String },
    /// What came is not what its descriptor says.
    #[error("{host} gave a corrupt object: {detail}")]
    Corrupt { host: String, detail: String },
    /// A file or helper of this node.
    #[error("{detail}")]
    Config { detail: String },
}

/// `errors` of the distribution spec's error answer.
#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Failure {
    /// The failure that an answer's status and (bounded) body mean.
    pub fn of_status(host: &str, status: StatusCode, body: &[u8], retry_after: Option<Duration>) -> Failure {
        let host = host.to_owned();
        let (codes, detail) = explain(status, body);
        let unknown = |code: &String| {
            matches!(
                code.as_str(),
                "NAME_UNKNOWN" | "MANIFEST_UNKNOWN" | "BLOB_UNKNOWN"
            )
        };
        match status {
            StatusCode::NOT_FOUND => Failure::NotFound { host },
            // Some registries say so with a status of their own choice.
            status if status.is_client_error() && codes.iter().any(unknown) => Failure::NotFound { host },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Denied { host, detail },
            StatusCode::TOO_MANY_REQUESTS => Failure::TooManyRequests { host, retry_after },
            status => Failure::Status {
                host,
                status: status.as_u16(),
                detail,
                retry_after,
            },
        }
    }

    /// The failure that an error of the HTTP client means.
    pub fn of_transport(host: &str, error: &reqwest::Error) -> Failure {
        let host = host.to_owned();
        let detail = causes(error);
        match error.is_connect() {
            true => Failure::Unreachable {
                host,
                detail,
                hopeless: is_certificate(error),
            },
            false => Failure::Cut { host, detail },
        }
    }

    /// Whether the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Failure::TooManyRequests { .. } | Failure::Cut { .. } => true,
            Failure::Unreachable { hopeless, .. } => !hopeless,
            Failure::Status { status, .. } => matches!(status, 408 | 500 | 502..=504),
            _ => false,
        }
    }

    /// Whether nobody answered at all. A refused connection is worth one more attempt, not five.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Failure::Unreachable { .. })
    }

    /// The pause that the registry asks for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Failure::TooManyRequests { retry_after, .. } | Failure::Status { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }

    /// As the failure of a pull.
    pub fn pull(self, reference: &Reference, what: &str) -> PullError {
        let (reference, what) = (reference.to_string(), what.to_owned());
        match self {
            Failure::NotFound { host } => PullError::NotFound { reference, host },
            Failure::Denied { host, detail } => PullError::Unauthorized {
                reference,
                host,
                detail,
            },
            Failure::Unreachable { host, detail, .. } => PullError::Unreachable {
                reference,
                host,
                detail,
            },
            Failure::TooManyRequests { host, .. } => PullError::TooManyRequests { reference, host },
            Failure::Corrupt { host, detail } => PullError::Corrupt {
                reference,
                host,
                what,
                detail,
            },
            Failure::Config { detail } => PullError::Config { reference, detail },
            Failure::Status {
                host, status, detail, ..
            } => PullError::Registry {
                reference,
                host,
                what,
                detail: format!("status {status}, {detail}"),
            },
            Failure::Cut { host, detail } | Failure::Protocol { host, detail } => PullError::Registry {
                reference,
                host,
                what,
                detail,
            },
        }
    }

    /// As the failure of a push.
    pub fn push(self, reference: &Reference, what: &str) -> PushError {
        let (reference, what) = (reference.to_string(), what.to_owned());
        match self {
            Failure::Denied { host, detail } => PushError::Unauthorized {
                reference,
                host,
                detail,
            },
            Failure::Unreachable { host, detail, .. } => PushError::Unreachable {
                reference,
                host,
                detail,
            },
            Failure::Config { detail } => PushError::Config { reference, detail },
            Failure::NotFound { host } => {
                let detail = "the repository does not exist".to_owned();
                PushError::Registry {
                    reference,
                    host,
                    what,
                    detail,
                }
            }
            Failure::TooManyRequests { host, .. } => {
                let detail = "it limits requests; wait and push again".to_owned();
                PushError::Registry {
                    reference,
                    host,
                    what,
                    detail,
                }
            }
            Failure::Status {
                host, status, detail, ..
            } => PushError::Registry {
                reference,
                host,
                what,
                detail: format!("status {status}, {detail}"),
            },
            Failure::Cut { host, detail }
            | Failure::Protocol { host, detail }
            | Failure::Corrupt { host, detail } => PushError::Registry {
                reference,
                host,
                what,
                detail,
            },
        }
    }
}

/// The error codes and a text for people; what comes from outside is shortened and has no control characters.
fn explain(status: StatusCode, body: &[u8]) -> (Vec<String>, String) {
    let clean = |text: &str| -> String {
        let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        printable.take(300).collect::<String>().trim().to_owned()
    };
    let reason = status.canonical_reason().unwrap_or("no reason given").to_owned();
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(parsed) if !parsed.errors.is_empty() => {
            let entries = parsed.errors.iter().take(3);
            let texts: Vec<String> = entries
                .map(|e| clean(&format!("{} {}", e.code, e.message)))
                .collect();
            (
                parsed.errors.into_iter().map(|e| e.code).collect(),
                texts.join("; "),
            )
        }
        _ => {
            let text = clean(&String::from_utf8_lossy(body));
            let html = text.starts_with('<');
            (Vec::new(), if text.is_empty() || html { reason } else { text })
        }
    }
}

/// An error's causes in one line, without reqwest's own words.
fn causes(error: &reqwest::Error) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        match texts.last() {
            Some(last) if last.ends_with(&text) => {}
            _ => texts.push(text),
        }
        cause = error.source();
    }
    match (texts.is_empty(), error.is_timeout()) {
        (true, true) => "nothing came for too long".to_owned(),
        (true, false) => error.to_string(),
        (false, _) => texts.join(": "),
    }
}

/// Whether a TLS certificate was refused: another attempt brings the same one.
fn is_certificate(error: &reqwest::Error) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(error) = cause {
        let inner = error.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref());
        let tls = match inner {
            Some(inner) => inner.downcast_ref::<rustls::Error>(),
            None => error.downcast_ref::<rustls::Error>(),
        };
        if tls.is_some() {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_explained_in_the_registrys_words_but_not_in_its_control_characters() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m way"}]}"#;
        let failure = Failure::of_status("h", StatusCode::FORBIDDEN, body, None);
        assert_eq!(
            failure,
            Failure::Denied {
                host: "h".into(),
                detail: "DENIED no [31m way".into()
            }
        );
        let html = Failure::of_status("h", StatusCode::BAD_GATEWAY, b"<html>nginx</html>", None);
        assert_eq!(
            html,
            Failure::Status {
                host: "h".into(),
                status: 502,
                detail: "Bad Gateway".into(),
                retry_after: None
            }
        );
        assert!(html.is_transient());
    }

    #[test]
    fn an_unknown_name_is_not_found_whatever_the_status() {
        let body = br#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#;
        let failure = Failure::of_status("h", StatusCode::BAD_REQUEST, body, None);
        assert_eq!(failure, Failure::NotFound { host: "h".into() });
        assert!(!failure.is_transient());
    }
}
