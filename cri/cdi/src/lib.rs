//! slipway-cdi.
