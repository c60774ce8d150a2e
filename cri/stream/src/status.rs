//! The last word of a session, written on its error stream: a `metav1.Status` since version 4 of the protocol, plain text
//! for failures before it.

use serde::Serialize;

/// How a session's end is told to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StatusFormat {
    /// v4 and later: `metav1.Status` as JSON, for success too.
    Json,
    /// v1 to v3: a message when it failed, nothing when it did not.
    Text,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    ExitCode(u8),
    Failure(String),
}

#[derive(Serialize)]
struct Status<'a> {
    metadata: Empty,
    status: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    message: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    reason: &'static str,
    message: String,
}

impl Outcome {
    /// The bytes for the error stream, and no more of them than a client would read.
    pub fn encode(&self, format: StatusFormat) -> Vec<u8> {
        let message = match self {
            Outcome::Success => String::new(),
            Outcome::ExitCode(code) => format!("command terminated with exit code {code}"),
            Outcome::Failure(message) => clip(message).to_owned(),
        };
        if format == StatusFormat::Text {
            return message.into_bytes();
        }
        let (reason, details, code) = match self {
            Outcome::Success => ("", None, None),
            Outcome::ExitCode(code) => {
                let cause = Cause {
                    reason: "ExitCode",
                    message: code.to_string(),
                };
                ("NonZeroExitCode", Some(Details { causes: [cause] }), None)
            }
            Outcome::Failure(_) => ("InternalError", None, Some(500)),
        };
        let status = Status {
            metadata: Empty {},
            status: if *self == Outcome::Success {
                "Success"
            } else {
                "Failure"
            },
            message: &message,
            reason,
            details,
            code,
        };
        serde_json::to_vec(&status).expect("strings and numbers are JSON")
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let cause = source.to_string();
        // Transparent layers repeat their cause.
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = source.source();
    }
    text
}

/// At most 8 KiB of `message`, whole characters.
fn clip(message: &str) -> &str {
    &message[..message.floor_char_boundary(8 << 10)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(outcome: &Outcome) -> String {
        String::from_utf8(outcome.encode(StatusFormat::Json)).unwrap()
    }

    #[test]
    fn version_4_says_everything_as_a_status() {
        assert_eq!(json(&Outcome::Success), r#"{"metadata":{},"status":"Success"}"#);
        assert_eq!(
            json(&Outcome::ExitCode(3)),
            r#"{"metadata":{},"status":"Failure","message":"command terminated with exit code 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#
        );
        assert_eq!(
            json(&Outcome::Failure("no \"such\" thing".to_owned())),
            r#"{"metadata":{},"status":"Failure","message":"no \"such\" thing","reason":"InternalError","code":500}"#
        );
    }

    #[test]
    fn earlier_versions_say_only_what_went_wrong() {
        assert!(Outcome::Success.encode(StatusFormat::Text).is_empty());
        assert_eq!(
            Outcome::ExitCode(3).encode(StatusFormat::Text),
            b"command terminated with exit code 3"
        );
        assert_eq!(
            Outcome::Failure("why".to_owned()).encode(StatusFormat::Text),
            b"why"
        );
        let long = Outcome::Failure("ä".repeat(10_000)).encode(StatusFormat::Text);
        assert_eq!(String::from_utf8(long).unwrap(), "ä".repeat(4096));
    }
}
