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
        user_namespaces: user_namespaces(),
    }
}

/// Layers can be mapped into one since Linux 5.19 (overlayfs, EROFS).
fn user_namespaces() -> bool {
    let release = kernel_release();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let most = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    version >= (5, 19) && most.trim().parse().is_ok_and(|most: u64| most > 0)
}

fn kernel_release() -> String {
    nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default()
}
