use std::sync::Arc;

use crate::agent::Agent;
use crate::container::create::destroy;
use crate::error::Result;
use crate::proto::{DeleteContainerRequest, DeleteContainerResponse};
use crate::validate;

pub async fn call(agent: Arc<Agent>, request: DeleteContainerRequest) -> Result<DeleteContainerResponse> {
    validate::id("container id", &request.id)?;
    let _gate = agent.registry.gate(&request.id).await;
    let released_serials = match agent.registry.find(&request.id) {
        Some(container) => destroy(&agent, &container).await,
        None => Vec::new(),
    };
    Ok(DeleteContainerResponse { released_serials })
}
