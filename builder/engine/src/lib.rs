//! slipway-engine.
