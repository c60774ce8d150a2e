//! Stand-in until the registry client lands.
#![allow(missing_docs)]
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("pulling is not built yet")]
    NotBuilt,
}
pub struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: Option<String>,
}
pub enum ProgressEvent {}
pub trait Progress: Send + Sync {
    fn event(&self, e: ProgressEvent);
}
pub struct Puller;
impl Puller {
    pub async fn pull(
        &self,
        _r: &slipway_image::Reference,
        _a: Option<()>,
        _p: &Platform,
        _g: &dyn Progress,
    ) -> Result<slipway_image::Image, PullError> {
        Err(PullError::NotBuilt)
    }
}
#[derive(Debug, thiserror::Error)]
#[error("bad")]
pub struct ReferenceError;
