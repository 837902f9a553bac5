//! A container that does nothing and leaves nothing, so that the first one that does something finds everything at hand: the
//! kernel its caches, and an emulated processor its translations, which save more than half of the time.

use std::sync::Arc;

use serde_json::json;

use super::create::{create, destroy};
use super::spec;
use crate::agent::Agent;
use crate::error::{AgentError, Result};
use crate::proto::{CreateContainerRequest, StartContainerRequest};
use crate::rpc::start_container;

const ID: &str = "rehearsal";
/// The one program that a root file system without files has: the OCI runtime itself, before it becomes another.
const PROGRAM: &str = "/proc/self/exe";

/// Creates, starts and removes a container with this configuration.
///
/// # Errors
/// `InvalidArgument` for what is no configuration; whatever keeps a container from being created and started.
pub async fn run(agent: &Arc<Agent>, oci_spec: Vec<u8>) -> Result<()> {
    let mut spec = spec::parse(&oci_spec)?;
    let process = spec.get_mut("process").and_then(|process| process.as_object_mut());
    let process = process.ok_or_else(|| AgentError::InvalidArgument("oci_spec has no process".into()))?;
    process.insert("args".into(), json!([PROGRAM, "--version"]));
    process.insert("cwd".into(), "/".into());
    let oci_spec = spec.to_string().into_bytes();
    let _gate = agent.registry.gate(ID).await;
    create(agent, CreateContainerRequest { id: ID.into(), oci_spec, ..Default::default() }).await?;
    let container = agent.registry.get(ID)?;
    drop(_gate);
    let started = start_container::call(agent.clone(), StartContainerRequest { id: ID.into() }).await;
    if started.is_ok() {
        container.wait_exited().await;
    }
    destroy(agent, &container).await;
    started.map(drop)
}
