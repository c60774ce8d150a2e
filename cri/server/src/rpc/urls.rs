//! Exec, Attach and PortForward: each answers with a URL to come to.

use slipway_cri_api::v1;

use super::{Cri, decode};
use crate::container::command;
use crate::error::Error;

impl Cri {
    pub(super) fn exec_url(&self, request: v1::ExecRequest) -> Result<v1::ExecResponse, Error> {
        let id = decode::id("container_id", request.container_id)?;
        let cmd = decode::command(request.cmd)?;
        let container = command::running(&self.daemon, &id, "run a command in it")?.0;
        let url = self.urls.exec(slipway_stream::ExecRequest {
            container: container.id().to_string(),
            command: cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        })?;
        Ok(v1::ExecResponse { url })
    }

    pub(super) fn attach_url(&self, request: v1::AttachRequest) -> Result<v1::AttachResponse, Error> {
        let id = decode::id("container_id", request.container_id)?;
        let container = command::running(&self.daemon, &id, "attach to it")?.0;
        let url = self.urls.attach(slipway_stream::AttachRequest {
            container: container.id().to_string(),
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        })?;
        Ok(v1::AttachResponse { url })
    }

    /// The ports it names are those the client will ask for: it is then that they are connected to.
    pub(super) fn port_forward_url(
        &self,
        request: v1::PortForwardRequest,
    ) -> Result<v1::PortForwardResponse, Error> {
        decode::ports("port", &request.port)?;
        let pod = self.pod(request.pod_sandbox_id)?;
        pod.ready("forward a connection to it")?;
        let pod = pod.id().to_string();
        let url = self
            .urls
            .port_forward(slipway_stream::PortForwardRequest { pod })?;
        Ok(v1::PortForwardResponse { url })
    }
}
