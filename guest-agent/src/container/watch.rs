//! Notices the end of containers.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::Container;
use crate::agent::Agent;
use crate::proto::PidMode;
use crate::sys::ExitStatus;

/// What a process whose status got lost is said to have exited with.
const UNKNOWN_STATUS: i32 = 255;

/// Reports the container's exit when its first process ends.
pub fn spawn(agent: Arc<Agent>, container: Arc<Container>, exit: oneshot::Receiver<ExitStatus>) {
    tokio::spawn(async move {
        let code = exit.await.map_or(UNKNOWN_STATUS, ExitStatus::code);
        if container.pid_mode != PidMode::Container {
            // In a shared namespace the kernel does not take the other processes along.
            if let Err(error) = container.cgroup.kill() {
                log::warn!("container {}: {error}", container.id);
            }
        }
        let started = container.start_gate.lock().await;
        container.ended(code, container.cgroup.oom_killed());
        agent.registry.publish(container.state());
        drop(started);
    });
}
