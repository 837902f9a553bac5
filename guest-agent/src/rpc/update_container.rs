use std::fs;
use std::sync::Arc;

use crate::agent::Agent;
use crate::container::spec;
use crate::error::{AgentError, Context, Result};
use crate::proto::container_state::Phase;
use crate::proto::{UpdateContainerRequest, UpdateContainerResponse};
use crate::validate;

pub async fn call(agent: Arc<Agent>, request: UpdateContainerRequest) -> Result<UpdateContainerResponse> {
    validate::id("container id", &request.id)?;
    let resources = spec::parse(&request.resources)?;
    let _gate = agent.registry.gate(&request.id).await;
    let container = agent.registry.get(&request.id)?;
    if container.phase() == Phase::Exited {
        let text = format!("container {:?} has exited; its limits mean nothing any more", request.id);
        return Err(AgentError::FailedPrecondition(text));
    }
    let file = agent.temporary_path("resources");
    fs::write(&file, resources.to_string()).context(|| format!("write {}", file.display()))?;
    let updated = agent.runtime.update(&request.id, &file).await;
    // At worst a short-lived file stays.
    let _ = fs::remove_file(&file);
    updated?;
    Ok(UpdateContainerResponse {})
}
