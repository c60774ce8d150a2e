//! slipway-shim-api.
