//! slipway-tests.
