use std::sync::Arc;

use crate::agent::Agent;
use crate::container::create::create;
use crate::error::{AgentError, Result};
use crate::proto::{CreateContainerRequest, CreateContainerResponse};
use crate::validate;

pub async fn call(agent: Arc<Agent>, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
    validate::id("container id", &request.id)?;
    if !agent.sandbox.is_ready() {
        return Err(AgentError::FailedPrecondition("the sandbox is not set up".into()));
    }
    let _gate = agent.registry.gate(&request.id).await;
    if agent.registry.find(&request.id).is_some() {
        return Err(AgentError::AlreadyExists(format!("container {:?} exists", request.id)));
    }
    create(&agent, request).await
}
