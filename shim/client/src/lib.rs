//! slipway-shim-client.
