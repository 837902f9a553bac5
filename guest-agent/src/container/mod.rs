//! Containers: from a request to a process and back.
//!
//! ```text
//!   create ──► CREATED ──start──► RUNNING ──exit──► EXITED ──delete──► gone
//!                 └────────────exit (killed, failed)───▲
//! ```

pub mod cgroup;
pub mod create;
pub mod crun;
pub mod descendants;
pub mod devices;
pub mod exec;
mod measure;
pub mod oom;
pub mod passwd;
pub mod pod_init;
pub mod registry;
pub mod rehearsal;
pub mod runtime;
pub mod spec;
pub mod streams;
pub mod user;
pub mod user_namespace;
pub mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch as channel;
use tokio::task::AbortHandle;

use crate::clock;
use crate::error::{AgentError, Result};
use crate::io::buffer::OutputBuffer;
use crate::io::taps::Taps;
use crate::proto::{ContainerState, PidMode, container_state::Phase};
use crate::storage::usage::Cached;
use crate::sys;
use cgroup::Cgroup;
use streams::Streams;

/// How long one who watches a container may take nothing of its output before it is dropped.
const SLOWEST: Duration = Duration::from_secs(10);

pub struct Container {
    pub id: String,
    /// The first process, as the agent's PID namespace numbers it.
    pub pid: i32,
    pub pid_mode: PidMode,
    pub cgroup: Cgroup,
    /// `process` of the OCI spec; an exec starts from it.
    pub process: Value,
    /// How ready the kernel is to take its processes when memory runs out.
    pub oom_score: Option<i32>,
    /// Serials of the layers it holds.
    pub layers: Vec<String>,
    pub output: Arc<OutputBuffer>,
    pub taps: Arc<Taps>,
    pub streams: Streams,
    /// Taken while the OCI runtime starts the container, so that its exit is not reported before its start.
    pub start_gate: tokio::sync::Mutex<()>,
    pub usage: Mutex<Cached>,
    lifecycle: Mutex<Lifecycle>,
    exited: channel::Sender<bool>,
    pumps: Mutex<Vec<AbortHandle>>,
}

#[derive(Debug, Clone)]
struct Lifecycle {
    phase: Phase,
    started_at: i64,
    exited_at: i64,
    exit_code: i32,
    oom_killed: bool,
}

/// What a container consists of when the OCI runtime has made it.
pub struct Parts {
    pub id: String,
    pub pid: i32,
    pub pid_mode: PidMode,
    pub cgroup: Cgroup,
    pub process: Value,
    pub oom_score: Option<i32>,
    pub layers: Vec<String>,
    pub output: Arc<OutputBuffer>,
    /// How many streams it writes to.
    pub outputs: usize,
    pub streams: Streams,
}

impl Container {
    pub fn new(parts: Parts) -> Self {
        let Parts { id, pid, pid_mode, cgroup, process, oom_score, layers, output, outputs, streams } = parts;
        Self {
            id,
            pid,
            pid_mode,
            cgroup,
            process,
            oom_score,
            layers,
            output,
            taps: Arc::new(Taps::new(outputs, SLOWEST)),
            streams,
            start_gate: tokio::sync::Mutex::default(),
            usage: Mutex::default(),
            lifecycle: Mutex::new(Lifecycle {
                phase: Phase::Created,
                started_at: 0,
                exited_at: 0,
                exit_code: 0,
                oom_killed: false,
            }),
            exited: channel::Sender::new(false),
            pumps: Mutex::default(),
        }
    }

    pub fn phase(&self) -> Phase {
        self.lifecycle().phase
    }

    /// # Errors
    /// `FailedPrecondition` when it is in another phase.
    pub fn require(&self, phase: Phase) -> Result<()> {
        let now = self.phase();
        if now == phase {
            return Ok(());
        }
        let word = |phase: Phase| phase.as_str_name().to_ascii_lowercase();
        let text = format!("container {:?} is {}, not {}", self.id, word(now), word(phase));
        Err(AgentError::FailedPrecondition(text))
    }

    pub fn started(&self, at: i64) {
        let mut lifecycle = self.lifecycle();
        lifecycle.started_at = at;
        if lifecycle.phase == Phase::Created {
            lifecycle.phase = Phase::Running;
        }
    }

    /// Notes the end; tells those who wait for it.
    pub fn ended(&self, exit_code: i32, oom_killed: bool) {
        let mut lifecycle = self.lifecycle();
        lifecycle.phase = Phase::Exited;
        lifecycle.exited_at = clock::unix_ns();
        lifecycle.exit_code = exit_code;
        lifecycle.oom_killed = oom_killed;
        drop(lifecycle);
        self.output.container_exited();
        self.exited.send_replace(true);
    }

    /// Returns when the first process has ended.
    pub async fn wait_exited(&self) {
        // The sender lives as long as the container, so this cannot fail.
        let _ = self.exited.subscribe().wait_for(|exited| *exited).await;
    }

    /// Signals the first process. One that has ended needs no signal.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // The reaper alone frees process numbers, and its news change the phase; a zombie takes signals quietly.
        if self.phase() == Phase::Exited {
            return Ok(());
        }
        match sys::kill(self.pid, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(AgentError::Internal(format!("send signal {signal} to container {:?}: {error}", self.id)))
            }
            _ => Ok(()),
        }
    }

    pub fn state(&self) -> ContainerState {
        let lifecycle = self.lifecycle().clone();
        ContainerState {
            id: self.id.clone(),
            phase: lifecycle.phase.into(),
            pid: u32::try_from(self.pid).unwrap_or_default(),
            started_at_unix_ns: lifecycle.started_at,
            exited_at_unix_ns: lifecycle.exited_at,
            exit_code: lifecycle.exit_code,
            oom_killed: lifecycle.oom_killed,
            snapshot: false,
        }
    }

    pub fn keep_pump(&self, pump: AbortHandle) {
        self.pumps.lock().unwrap_or_else(PoisonError::into_inner).push(pump);
    }

    fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        for pump in self.pumps.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            pump.abort();
        }
    }
}
