//! A pull's progress as a build's events.

use slipway_image::ProgressEvent;

use crate::progress::{Event, Progress, StepId};

/// Passes on what matters to a build.
pub(crate) fn forward(to: &dyn Progress, step: StepId, event: ProgressEvent) {
    let short = |digest: &slipway_image::Digest| digest.hex()[..12].to_owned();
    match event {
        ProgressEvent::Resolved { host, digest } => {
            to.event(Event::Remark {
                step,
                text: format!("pulling {} from {host}", short(&digest)),
            });
        }
        ProgressEvent::Layers { layers } => {
            for layer in layers.iter().filter(|l| !l.present) {
                to.event(Event::Transfer {
                    step,
                    what: short(&layer.digest),
                    done: 0,
                    total: layer.size,
                });
            }
        }
        ProgressEvent::Downloaded { layer, done, total } => {
            to.event(Event::Transfer {
                step,
                what: short(&layer),
                done,
                total,
            });
        }
        ProgressEvent::AnsweredByBuild { reason } => {
            let text = format!("using the image that was built on this node ({reason})");
            to.event(Event::Remark { step, text });
        }
        ProgressEvent::Retrying { what, reason, .. } => {
            to.event(Event::Remark {
                step,
                text: format!("{what}: {reason}; trying again"),
            });
        }
        _ => {}
    }
}
