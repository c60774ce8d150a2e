//! Who we are to a registry. Refuses to know where that was written down (docker's config.json, CRI's AuthConfig).

use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use std::fmt;

/// Standard alphabet, padding optional: both kinds are found in config files.
pub(crate) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Credentials for one registry. `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Credentials {
    /// User name and password (or access token in its place).
    Basic {
        /// The user.
        username: String,
        /// The password.
        password: String,
    },
    /// An OAuth2 refresh token, exchanged for bearer tokens at the registry's token service.
    Identity {
        /// The token.
        token: String,
    },
    /// A bearer token that the registry takes as it is.
    Bearer {
        /// The token.
        token: String,
    },
}

/// The fields of credentials as CRI's `AuthConfig` and docker's `config.json` have them; empty means absent.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct AuthFields<'a> {
    /// The user.
    pub username: &'a str,
    /// The password.
    pub password: &'a str,
    /// `user:password` in base64.
    pub auth: &'a str,
    /// An OAuth2 refresh token.
    pub identity_token: &'a str,
    /// A bearer token.
    pub registry_token: &'a str,
}

/// The `auth` field is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the \"auth\" field of the credentials is not user:password in base64")]
pub struct BadAuthField;

impl Credentials {
    /// User name and password.
    pub fn basic(username: impl Into<String>, password: impl Into<String>) -> Credentials {
        Credentials::Basic {
            username: username.into(),
            password: password.into(),
        }
    }

    /// Makes credentials of the fields; `None` when all are empty. A registry token goes before an identity token,
    /// and that before user and password, and those before `auth`.
    ///
    /// # Errors
    /// [`BadAuthField`].
    pub fn from_fields(fields: &AuthFields<'_>) -> Result<Option<Credentials>, BadAuthField> {
        let credentials = if !fields.registry_token.is_empty() {
            Credentials::Bearer {
                token: fields.registry_token.to_owned(),
            }
        } else if !fields.identity_token.is_empty() {
            Credentials::Identity {
                token: fields.identity_token.to_owned(),
            }
        } else if !fields.username.is_empty() {
            Credentials::basic(fields.username, fields.password)
        } else if !fields.auth.is_empty() {
            let decoded = BASE64.decode(fields.auth.trim()).map_err(|_| BadAuthField)?;
            let text = String::from_utf8(decoded).map_err(|_| BadAuthField)?;
            let (username, password) = text.split_once(':').ok_or(BadAuthField)?;
            // Docker has written trailing NULs.
            Credentials::basic(username, password.trim_end_matches('\0'))
        } else {
            return Ok(None);
        };
        Ok(Some(credentials))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Credentials::Basic { username, .. } => write!(f, "Basic({username}, …)"),
            Credentials::Identity { .. } => f.write_str("Identity(…)"),
            Credentials::Bearer { .. } => f.write_str("Bearer(…)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_become_credentials_in_order_of_precedence() {
        let from = |fields: AuthFields<'_>| Credentials::from_fields(&fields).unwrap();
        assert_eq!(from(AuthFields::default()), None);
        let auth = BASE64.encode("me:secret:with:colons\0");
        let encoded = AuthFields {
            auth: &auth,
            ..Default::default()
        };
        assert_eq!(
            from(encoded.clone()),
            Some(Credentials::basic("me", "secret:with:colons"))
        );
        let named = AuthFields {
            username: "u",
            password: "p",
            ..encoded
        };
        assert_eq!(from(named.clone()), Some(Credentials::basic("u", "p")));
        let identity = AuthFields {
            identity_token: "i",
            ..named
        };
        assert_eq!(
            from(identity.clone()),
            Some(Credentials::Identity { token: "i".into() })
        );
        let bearer = AuthFields {
            registry_token: "r",
            ..identity
        };
        assert_eq!(from(bearer), Some(Credentials::Bearer { token: "r".into() }));
    }

    #[test]
    fn padding_may_be_missing_and_nonsense_is_refused() {
        let auth = BASE64.encode("a:b12");
        let bare = auth.trim_end_matches('=');
        assert_ne!(auth, bare);
        let fields = AuthFields {
            auth: bare,
            ..Default::default()
        };
        assert_eq!(
            Credentials::from_fields(&fields),
            Ok(Some(Credentials::basic("a", "b12")))
        );
        for auth in ["***", "YQ=="] {
            let fields = AuthFields {
                auth,
                ..Default::default()
            };
            assert_eq!(Credentials::from_fields(&fields), Err(BadAuthField));
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let text = format!("{:?}", Credentials::basic("me", "hunter2"));
        assert!(text.contains("me") && !text.contains("hunter2"));
    }
}
