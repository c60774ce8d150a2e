//! slipway-image.
