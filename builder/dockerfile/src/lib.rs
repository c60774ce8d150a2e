//! slipway-dockerfile.
