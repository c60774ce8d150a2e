//! slipway-spec.
