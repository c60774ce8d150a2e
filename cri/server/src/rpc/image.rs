//! The image service: decode, call, encode.

use slipway_cri_api::v1;
use slipway_cri_api::v1::image_service_server::ImageService;
use tonic::{Request, Response, Status, async_trait};
use tracing::info_span;

use super::stream::{Parts, parts};
use super::{Cri, call, decode, encode};
use crate::error::Error;
use crate::image;

type Answer<T> = Result<Response<T>, Status>;

/// An image's name in a request, which has to have one.
fn named(spec: Option<v1::ImageSpec>) -> Result<String, Error> {
    Ok(decode::image_spec("image.image", spec.unwrap_or_default())?.image)
}

impl Cri {
    async fn images(&self, filter: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>, Error> {
        let name = decode::filter::image_filter(filter)?;
        Ok(image::list::list(&self.daemon, &name)
            .await?
            .iter()
            .map(encode::image)
            .collect())
    }
}

#[async_trait]
impl ImageService for Cri {
    type StreamImagesStream = Parts<v1::StreamImagesResponse>;

    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let filter = request.into_inner().filter;
        call(info_span!("ListImages"), async {
            Ok(v1::ListImagesResponse {
                images: self.images(filter).await?,
            })
        })
        .await
    }

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let filter = request.into_inner().filter;
        let found = call(info_span!("StreamImages"), self.images(filter))
            .await?
            .into_inner();
        Ok(parts(found, |images| v1::StreamImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Answer<v1::ImageStatusResponse> {
        let v1::ImageStatusRequest { image, verbose } = request.into_inner();
        let name = image.as_ref().map(|s| s.image.clone()).unwrap_or_default();
        call(info_span!("ImageStatus", image = decode::clip(&name)), async {
            let name = named(image)?;
            let Some(found) = image::list::find(&self.daemon, &name).await? else {
                return Ok(v1::ImageStatusResponse::default());
            };
            let info = verbose.then(|| encode::info(&image::list::verbose(&found)));
            Ok(v1::ImageStatusResponse {
                image: Some(encode::image(&found)),
                info: info.unwrap_or_default(),
            })
        })
        .await
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<v1::PullImageResponse> {
        let v1::PullImageRequest {
            image,
            auth,
            sandbox_config,
        } = request.into_inner();
        let name = image.as_ref().map(|s| s.image.clone()).unwrap_or_default();
        call(info_span!("PullImage", image = decode::clip(&name)), async {
            let (name, auth) = (named(image)?, decode::credentials(auth.unwrap_or_default())?);
            decode::sandbox_config(sandbox_config)?;
            let daemon = self.daemon.clone();
            let pulled = async move { image::pull::pull(&daemon, &name, auth).await };
            let image = self.daemon.to_the_end(pulled).await?;
            Ok(v1::PullImageResponse {
                image_ref: image.id.to_string(),
            })
        })
        .await
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Answer<v1::RemoveImageResponse> {
        let image = request.into_inner().image;
        let name = image.as_ref().map(|s| s.image.clone()).unwrap_or_default();
        call(info_span!("RemoveImage", image = decode::clip(&name)), async {
            let name = named(image)?;
            let daemon = self.daemon.clone();
            self.daemon
                .to_the_end(async move { image::remove::remove(&daemon, &name).await })
                .await?;
            Ok(v1::RemoveImageResponse {})
        })
        .await
    }

    async fn image_fs_info(&self, _: Request<v1::ImageFsInfoRequest>) -> Answer<v1::ImageFsInfoResponse> {
        call(info_span!("ImageFsInfo"), async {
            let usage = encode::filesystem(&image::fs_info::fs_info(&self.daemon).await?);
            // Layers of images and of containers lie on one filesystem.
            Ok(v1::ImageFsInfoResponse {
                image_filesystems: vec![usage.clone()],
                container_filesystems: vec![usage],
            })
        })
        .await
    }
}
