//! Which protocol a client and this server speak: decided from the head of the request alone.
//!
//! The first of the client's protocols that the server knows is taken. A client that names none is refused: there is
//! nothing that all of them would understand.

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};

use crate::status::StatusFormat;
use crate::websocket::accept_key;

const SPDY_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const SPDY_ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// What a session is for, as far as its protocol goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Exec and attach.
    Command,
    PortForward,
}

/// How bytes become streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    Spdy,
    /// WebSocket with a channel number in each message; with the signal that closes a channel, or without.
    Channels {
        close_signal: bool,
    },
    /// SPDY in WebSocket messages.
    Tunnel,
}

/// A protocol both sides know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub wire: Wire,
    /// How the end of a session is told.
    pub status: StatusFormat,
    /// Whether there is a stream for terminal sizes.
    pub resizes: bool,
}

/// An HTTP answer without its body's framing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub text: String,
}

impl Answer {
    pub fn refuse(status: StatusCode, text: impl Into<String>) -> Answer {
        Answer {
            status,
            headers: Vec::new(),
            text: text.into(),
        }
    }

    fn with(mut self, name: HeaderName, value: &'static str) -> Answer {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }
}

type Protocols = &'static [(&'static str, Agreed)];

const fn spdy(status: StatusFormat, resizes: bool) -> Agreed {
    Agreed {
        wire: Wire::Spdy,
        status,
        resizes,
    }
}

const fn channels(close_signal: bool) -> Agreed {
    Agreed {
        wire: Wire::Channels { close_signal },
        status: StatusFormat::Json,
        resizes: true,
    }
}

const COMMAND_SPDY: Protocols = &[
    ("v4.channel.k8s.io", spdy(StatusFormat::Json, true)),
    ("v3.channel.k8s.io", spdy(StatusFormat::Text, true)),
    ("v2.channel.k8s.io", spdy(StatusFormat::Text, false)),
    ("channel.k8s.io", spdy(StatusFormat::Text, false)),
];
const COMMAND_WEBSOCKET: Protocols = &[
    ("v5.channel.k8s.io", channels(true)),
    ("v4.channel.k8s.io", channels(false)),
];
const FORWARD_SPDY: Protocols = &[("portforward.k8s.io", spdy(StatusFormat::Text, false))];
const FORWARD_WEBSOCKET: Protocols = &[(
    "SPDY/3.1+portforward.k8s.io",
    Agreed {
        wire: Wire::Tunnel,
        status: StatusFormat::Text,
        resizes: false,
    },
)];

/// What the client and the server will speak, and the answer that says so.
///
/// # Errors
/// The answer that says why not.
pub(crate) fn negotiate(
    purpose: Purpose,
    method: &Method,
    headers: &HeaderMap,
) -> Result<(Agreed, Answer), Answer> {
    if !lists(headers, &header::CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade")) {
        return Err(upgrade_required(
            "this is a streaming URL: the request must ask for an upgrade",
        ));
    }
    if lists(headers, &header::UPGRADE).any(|token| token.eq_ignore_ascii_case("websocket")) {
        let known = match purpose {
            Purpose::Command => COMMAND_WEBSOCKET,
            Purpose::PortForward => FORWARD_WEBSOCKET,
        };
        return websocket(known, method, headers);
    }
    if lists(headers, &header::UPGRADE).any(|token| token.eq_ignore_ascii_case("SPDY/3.1")) {
        let known = match purpose {
            Purpose::Command => COMMAND_SPDY,
            Purpose::PortForward => FORWARD_SPDY,
        };
        return spdy31(known, headers);
    }
    Err(upgrade_required(
        "the request must ask for an upgrade to SPDY/3.1 or websocket",
    ))
}

fn spdy31(known: Protocols, headers: &HeaderMap) -> Result<(Agreed, Answer), Answer> {
    if !headers.contains_key(SPDY_PROTOCOL) {
        return Err(Answer::refuse(
            StatusCode::BAD_REQUEST,
            "the request names no protocol in X-Stream-Protocol-Version",
        ));
    }
    let Some((name, agreed)) = choose(known, headers, &SPDY_PROTOCOL) else {
        let refusal = Answer::refuse(StatusCode::FORBIDDEN, unknown(known));
        return Err(known
            .iter()
            .fold(refusal, |answer, (name, _)| answer.with(SPDY_ACCEPTED, name)));
    };
    Ok((agreed, switch("SPDY/3.1").with(SPDY_PROTOCOL, name)))
}

fn websocket(known: Protocols, method: &Method, headers: &HeaderMap) -> Result<(Agreed, Answer), Answer> {
    let bad = |text: &str| Err(Answer::refuse(StatusCode::BAD_REQUEST, text));
    if method != Method::GET {
        return bad("a WebSocket begins with GET");
    }
    if headers
        .get(header::SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        return Err(upgrade_required("only version 13 of WebSocket is spoken")
            .with(header::SEC_WEBSOCKET_VERSION, "13"));
    }
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .and_then(|key| key.to_str().ok());
    let Some(accept) = key.and_then(accept_key) else {
        return bad("Sec-WebSocket-Key is not sixteen bytes in base64");
    };
    let Some((name, agreed)) = choose(known, headers, &header::SEC_WEBSOCKET_PROTOCOL) else {
        return bad(&unknown(known));
    };
    let mut answer = switch("websocket").with(header::SEC_WEBSOCKET_PROTOCOL, name);
    let accept = HeaderValue::from_str(&accept).expect("base64 is ASCII");
    answer.headers.push((header::SEC_WEBSOCKET_ACCEPT, accept));
    Ok((agreed, answer))
}

fn choose(known: Protocols, headers: &HeaderMap, name: &HeaderName) -> Option<(&'static str, Agreed)> {
    lists(headers, name)
        .find_map(|wanted| known.iter().find(|(name, _)| *name == wanted))
        .copied()
}

/// The members of a header that is a list, over all its lines.
fn lists<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lines = headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    lines
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .filter(|member| !member.is_empty())
}

fn unknown(known: Protocols) -> String {
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    format!(
        "none of the protocols the client names is spoken here; these are: {}",
        names.join(", ")
    )
}

fn switch(upgrade: &'static str) -> Answer {
    let answer = Answer::refuse(StatusCode::SWITCHING_PROTOCOLS, "");
    answer
        .with(header::CONNECTION, "Upgrade")
        .with(header::UPGRADE, upgrade)
}

fn upgrade_required(text: &str) -> Answer {
    Answer::refuse(StatusCode::UPGRADE_REQUIRED, text).with(header::UPGRADE, "SPDY/3.1, websocket")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    fn decide(purpose: Purpose, lines: &[(&'static str, &'static str)]) -> Result<Agreed, StatusCode> {
        negotiate(purpose, &Method::GET, &headers(lines))
            .map(|(agreed, _)| agreed)
            .map_err(|answer| answer.status)
    }

    const SPDY: [(&str, &str); 2] = [("connection", "keep-alive, Upgrade"), ("upgrade", "SPDY/3.1")];
    const WEBSOCKET: [(&str, &str); 4] = [
        ("connection", "Upgrade"),
        ("upgrade", "WebSocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];

    #[test]
    fn the_first_of_the_clients_protocols_that_we_speak_is_taken() {
        let spdy = |protocols| decide(Purpose::Command, &[SPDY[0], SPDY[1], protocols]);
        let versions = "x-stream-protocol-version";
        let v4 = Ok(Agreed {
            wire: Wire::Spdy,
            status: StatusFormat::Json,
            resizes: true,
        });
        assert_eq!(
            spdy((versions, "v5.channel.k8s.io, v4.channel.k8s.io,channel.k8s.io")),
            v4
        );
        let v1 = Ok(Agreed {
            wire: Wire::Spdy,
            status: StatusFormat::Text,
            resizes: false,
        });
        assert_eq!(spdy((versions, "channel.k8s.io,v4.channel.k8s.io")), v1);
        assert_eq!(spdy((versions, "v6.channel.k8s.io")), Err(StatusCode::FORBIDDEN));
        assert_eq!(spdy(("accept", "*")), Err(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn websocket_has_the_close_signal_since_version_5() {
        let command = |protocols| {
            let mut lines = WEBSOCKET.to_vec();
            lines.push(("sec-websocket-protocol", protocols));
            decide(Purpose::Command, &lines).map(|agreed| agreed.wire)
        };
        assert_eq!(
            command("v5.channel.k8s.io"),
            Ok(Wire::Channels { close_signal: true })
        );
        assert_eq!(
            command("v4.channel.k8s.io"),
            Ok(Wire::Channels { close_signal: false })
        );
        assert_eq!(command("base64.channel.k8s.io"), Err(StatusCode::BAD_REQUEST));
        assert_eq!(decide(Purpose::Command, &WEBSOCKET), Err(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn port_forward_tunnels_spdy() {
        let mut lines = WEBSOCKET.to_vec();
        lines.push(("sec-websocket-protocol", "SPDY/3.1+portforward.k8s.io"));
        let (agreed, answer) = negotiate(Purpose::PortForward, &Method::GET, &headers(&lines)).unwrap();
        assert_eq!(agreed.wire, Wire::Tunnel);
        assert_eq!(answer.status, StatusCode::SWITCHING_PROTOCOLS);
        let accept = (
            header::SEC_WEBSOCKET_ACCEPT,
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".parse().unwrap(),
        );
        assert!(answer.headers.contains(&accept));
        assert_eq!(decide(Purpose::Command, &lines), Err(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn a_refusal_says_what_would_do() {
        let lines = [SPDY[0], SPDY[1], ("x-stream-protocol-version", "v9")];
        let answer = negotiate(Purpose::Command, &Method::POST, &headers(&lines)).unwrap_err();
        assert_eq!(answer.headers.len(), 4);
        assert!(answer.headers.iter().all(|(name, _)| *name == SPDY_ACCEPTED));
        assert_eq!(decide(Purpose::Command, &[]), Err(StatusCode::UPGRADE_REQUIRED));
        let h2c = [("connection", "upgrade"), ("upgrade", "h2c")];
        assert_eq!(decide(Purpose::Command, &h2c), Err(StatusCode::UPGRADE_REQUIRED));
        let mut old = WEBSOCKET;
        old[2] = ("sec-websocket-version", "8");
        assert_eq!(decide(Purpose::Command, &old), Err(StatusCode::UPGRADE_REQUIRED));
        let mut keyless = WEBSOCKET;
        keyless[3] = ("sec-websocket-key", "short");
        assert_eq!(decide(Purpose::Command, &keyless), Err(StatusCode::BAD_REQUEST));
        let post = negotiate(Purpose::Command, &Method::POST, &headers(&WEBSOCKET)).unwrap_err();
        assert_eq!(post.status, StatusCode::BAD_REQUEST);
    }
}
