use crate::agent::Agent;
use crate::clock;
use crate::proto::{HelloRequest, HelloResponse};

pub fn call(agent: &Agent, request: &HelloRequest) -> HelloResponse {
    if request.protocol != super::PROTOCOL {
        // The host decides whether it can work with this one.
        log::info!("the host speaks protocol {}, this agent {}", request.protocol, super::PROTOCOL);
    }
    HelloResponse {
        protocol: super::PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: kernel_release(),
        sandbox_id: agent.sandbox.id(),
        uptime_us: clock::uptime_us(),
        agent_started_us: agent.started_us,
    }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default()
}
