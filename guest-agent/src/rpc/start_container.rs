use std::sync::Arc;

use serde_json::Value;

use crate::agent::Agent;
use crate::clock;
use crate::error::Result;
use crate::proto::container_state::Phase;
use crate::proto::{StartContainerRequest, StartContainerResponse};
use crate::validate;

pub async fn call(agent: Arc<Agent>, request: StartContainerRequest) -> Result<StartContainerResponse> {
    validate::id("container id", &request.id)?;
    let _gate = agent.registry.gate(&request.id).await;
    let container = agent.registry.get(&request.id)?;
    container.require(Phase::Created)?;
    let program = container.process.pointer("/args/0").and_then(Value::as_str).unwrap_or_default();
    let _exit_waits = container.start_gate.lock().await;
    let started_at_unix_ns = clock::unix_ns();
    agent.runtime.start(&container.id, program).await?;
    container.started(started_at_unix_ns);
    agent.registry.publish(container.state());
    Ok(StartContainerResponse { started_at_unix_ns })
}
