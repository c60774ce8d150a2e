//! slipway-sys.
