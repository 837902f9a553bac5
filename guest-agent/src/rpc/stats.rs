use std::fs;
use std::sync::{Arc, PoisonError};

use crate::agent::Agent;
use crate::clock;
use crate::container::Container;
use crate::error::Result;
use crate::network::counters;
use crate::proto::{ContainerStats, StatsRequest, StatsResponse};
use crate::storage::usage::{self, Cached, Usage};
use crate::validate;

pub async fn call(agent: &Agent, request: &StatsRequest) -> Result<StatsResponse> {
    let wanted = wanted(agent, &request.container_ids)?;
    let mut containers = Vec::with_capacity(wanted.len());
    for container in &wanted {
        containers.push(of_container(agent, container).await);
    }
    let (guest_memory_total_bytes, guest_memory_available_bytes) = memory();
    let scratch = usage::file_system(&agent.config.paths.scratch()).unwrap_or_default();
    Ok(StatsResponse {
        time_unix_ns: clock::unix_ns(),
        containers,
        guest_memory_total_bytes,
        guest_memory_available_bytes,
        network: counters::read(&agent.sysfs()),
        scratch_total_bytes: scratch.bytes,
        scratch_used_bytes: scratch.bytes_used,
        scratch_inodes: scratch.inodes,
        scratch_inodes_free: scratch.inodes_free,
    })
}

fn wanted(agent: &Agent, ids: &[String]) -> Result<Vec<Arc<Container>>> {
    if ids.is_empty() {
        return Ok(agent.registry.all());
    }
    for id in ids {
        validate::id("container id", id)?;
    }
    // One that was removed meanwhile must not cost the others their numbers.
    Ok(ids.iter().filter_map(|id| agent.registry.find(id)).collect())
}

async fn of_container(agent: &Agent, container: &Arc<Container>) -> ContainerStats {
    let usage = writable_layer(agent, container).await;
    ContainerStats {
        id: container.id.clone(),
        writable_layer_bytes: usage.bytes,
        writable_layer_inodes: usage.inodes,
        ..container.cgroup.stats()
    }
}

async fn writable_layer(agent: &Agent, container: &Arc<Container>) -> Usage {
    let cached = *container.usage.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(usage) = cached.fresh() {
        return usage;
    }
    let upper = agent.config.paths.writable(&container.id).join("upper");
    let container = container.clone();
    // Kept by the walk itself: a caller that gives up waiting for a long one finds it done the next time.
    let walk = move || {
        let usage = usage::walk(&upper);
        *container.usage.lock().unwrap_or_else(PoisonError::into_inner) = Cached::now(usage);
        usage
    };
    tokio::task::spawn_blocking(walk).await.unwrap_or_default()
}

/// (total, available) bytes of memory.
fn memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
        Some(kilobytes * 1024)
    };
    (field("MemTotal:").unwrap_or_default(), field("MemAvailable:").unwrap_or_default())
}
