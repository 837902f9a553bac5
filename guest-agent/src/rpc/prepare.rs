use std::sync::Arc;

use super::setup_sandbox;
use crate::agent::Agent;
use crate::clock::Phases;
use crate::container::pod_init::{self, User};
use crate::container::rehearsal;
use crate::error::{AgentError, Result};
use crate::network::{self, files};
use crate::proto::{Dns, PrepareRequest, PrepareResponse};

pub async fn call(agent: Arc<Agent>, request: PrepareRequest) -> Result<PrepareResponse> {
    if !agent.in_vm() {
        return Err(AgentError::Unimplemented("only a virtual machine waits for its pod".into()));
    }
    let mut progress = agent.sandbox.setup.lock().await;
    let present = agent.sandbox.id();
    if !present.is_empty() {
        return Err(AgentError::FailedPrecondition(format!("this agent serves sandbox {present:?} already")));
    }
    let mut phases = Phases::start();
    setup_sandbox::set_random(&request.entropy)?;
    phases.mark("machine");
    if progress.spare_init.is_none() && progress.namespaces.is_none() {
        progress.spare_init = pod_init::start(&agent.reaper, true, User::Agents).await?.init;
        phases.mark("namespaces");
    }
    if progress.shm.is_none() {
        setup_sandbox::shm(&agent, 0, &mut progress)?;
        phases.mark("shm");
    }
    if !request.scratch_serial.is_empty() {
        setup_sandbox::scratch(&agent, &request.scratch_serial, &mut progress).await?;
        phases.mark("scratch");
    }
    files::write(&agent.config.paths, "", &Dns::default(), &[])?;
    phases.mark("files");
    network::rehearse().await?;
    phases.mark("network");
    if !request.oci_spec.is_empty() {
        rehearsal::run(&agent, request.oci_spec).await?;
        phases.mark("rehearsal");
    }
    Ok(PrepareResponse { phases: phases.into_vec() })
}
