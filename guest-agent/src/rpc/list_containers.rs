use crate::agent::Agent;
use crate::proto::ListContainersResponse;

pub fn call(agent: &Agent) -> ListContainersResponse {
    ListContainersResponse { containers: agent.registry.states() }
}
