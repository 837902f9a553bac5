use crate::agent::Agent;
use crate::error::Result;
use crate::proto::container_state::Phase;
use crate::proto::{SignalContainerRequest, SignalContainerResponse};
use crate::validate;

pub fn call(agent: &Agent, request: &SignalContainerRequest) -> Result<SignalContainerResponse> {
    validate::id("container id", &request.id)?;
    let signal = validate::signal(request.signal)?;
    let container = agent.registry.get(&request.id)?;
    if container.phase() == Phase::Exited {
        return Ok(SignalContainerResponse {});
    }
    match (request.all, signal) {
        (false, _) => container.signal(signal)?,
        // In one stroke, so that nothing can fork away.
        (true, libc::SIGKILL) => container.cgroup.kill()?,
        (true, _) => container.cgroup.signal(signal)?,
    }
    Ok(SignalContainerResponse {})
}
