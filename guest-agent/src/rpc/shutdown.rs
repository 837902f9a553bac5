use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::agent::Agent;
use crate::container::Container;
use crate::init::power;
use crate::proto::container_state::Phase;
use crate::proto::{ShutdownRequest, ShutdownResponse};

/// Enough for the answer to leave.
const FAREWELL: Duration = Duration::from_millis(20);
/// How long killed processes may take to be gone.
const DYING: Duration = Duration::from_secs(2);
/// No pod waits longer.
const LONGEST_GRACE: Duration = Duration::from_secs(24 * 3600);

pub fn call(agent: &Arc<Agent>, request: &ShutdownRequest) -> ShutdownResponse {
    let grace = Duration::from_millis(request.grace_ms.into()).min(LONGEST_GRACE);
    tokio::spawn(shut_down(agent.clone(), grace));
    ShutdownResponse {}
}

async fn shut_down(agent: Arc<Agent>, grace: Duration) {
    sleep(FAREWELL).await;
    let containers = agent.registry.all();
    for container in &containers {
        let _ = container.signal(libc::SIGTERM);
    }
    all_exited(&containers, grace).await;
    for container in &containers {
        let _ = container.cgroup.kill();
        let _ = container.signal(libc::SIGKILL);
    }
    all_exited(&containers, DYING).await;
    if agent.in_vm() {
        power::detach_scratch(&agent.config.paths.scratch());
        power::off();
    }
    std::process::exit(0);
}

async fn all_exited(containers: &[Arc<Container>], patience: Duration) {
    let end = Instant::now() + patience;
    for container in containers.iter().filter(|container| container.phase() != Phase::Exited) {
        let _ = timeout_at(end, container.wait_exited()).await;
    }
}
