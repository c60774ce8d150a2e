//! Which images, pods and containers a list is of.

use slipway_cri_api::v1;

use crate::container::list::Visible;
use crate::error::Error;
use crate::{container, pod};

/// The name of the images that a list is of; empty: of all.
pub fn image_filter(filter: Option<v1::ImageFilter>) -> Result<String, Error> {
    let Some(spec) = filter.and_then(|f| f.image) else {
        return Ok(String::new());
    };
    let spec = super::optional_image_spec("filter.image", spec)?;
    Ok(spec.map(|s| s.image).unwrap_or_default())
}

pub fn pod_filter(filter: Option<v1::PodSandboxFilter>) -> Result<pod::list::Filter, Error> {
    let filter = filter.unwrap_or_default();
    let state = filter
        .state
        .map(|s| super::known("filter.state", s.state))
        .transpose()?;
    Ok(pod::list::Filter {
        id: super::optional_id("filter.id", filter.id)?,
        ready: state.map(|s: v1::PodSandboxState| s == v1::PodSandboxState::SandboxReady),
        labels: super::bounded_map("filter.label_selector", filter.label_selector)?,
    })
}

pub fn container_filter(filter: Option<v1::ContainerFilter>) -> Result<container::list::Filter, Error> {
    let filter = filter.unwrap_or_default();
    let state = filter
        .state
        .map(|s| super::known("filter.state", s.state))
        .transpose()?;
    Ok(container::list::Filter {
        id: super::optional_id("filter.id", filter.id)?,
        pod: super::optional_id("filter.pod_sandbox_id", filter.pod_sandbox_id)?,
        state: state.map(|s| match s {
            v1::ContainerState::ContainerCreated => Visible::Created,
            v1::ContainerState::ContainerRunning => Visible::Running,
            v1::ContainerState::ContainerExited => Visible::Exited,
            v1::ContainerState::ContainerUnknown => Visible::Unknown,
        }),
        labels: super::bounded_map("filter.label_selector", filter.label_selector)?,
    })
}

pub fn stats_filter(filter: Option<v1::ContainerStatsFilter>) -> Result<container::list::Filter, Error> {
    let filter = filter.unwrap_or_default();
    Ok(container::list::Filter {
        id: super::optional_id("filter.id", filter.id)?,
        pod: super::optional_id("filter.pod_sandbox_id", filter.pod_sandbox_id)?,
        state: None,
        labels: super::bounded_map("filter.label_selector", filter.label_selector)?,
    })
}

pub fn pod_stats_filter(filter: Option<v1::PodSandboxStatsFilter>) -> Result<pod::list::Filter, Error> {
    let filter = filter.unwrap_or_default();
    Ok(pod::list::Filter {
        id: super::optional_id("filter.id", filter.id)?,
        ready: None,
        labels: super::bounded_map("filter.label_selector", filter.label_selector)?,
    })
}
