//! vmruntime's agent: PID 1 of a pod's virtual machine, or a process of a host pod.
//!
//! The modules, from the outside in: `server` and `rpc` speak the protocol, `container` runs containers, `storage`,
//! `network` and `io` give them disks, interfaces and streams, `init` is what PID 1 owes its kernel.

mod agent;
mod cli;
mod clock;
mod config;
mod console;
mod container;
mod error;
mod init;
mod io;
mod network;
mod proto;
mod rpc;
mod sandbox;
mod server;
mod storage;
mod sys;
mod validate;

use std::future::Future;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use agent::Agent;
use config::{Config, Mode, Paths};
use container::pod_init;
use error::{Context, Result};
use init::power;
use init::reaper::Reaper;

const STATE: &str = "/run/vmruntime";
const CRUN: &str = "/usr/bin/crun";
const CGROUP: &str = "vmruntime";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = pod_init::dispatch(&arguments) {
        return code;
    }
    // The kernel hands words of its command line to PID 1, so they are no options of ours.
    let is_agent_process = arguments.first().is_some_and(|first| first.starts_with("--"));
    if std::process::id() == 1 && !is_agent_process {
        let Err(error) = run_as_init();
        power::fatal(&error);
    }
    match run_as_process(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            console::line(&text);
            ExitCode::FAILURE
        }
    }
}

enum Never {}

fn run_as_init() -> std::result::Result<Never, error::AgentError> {
    let started_us = clock::uptime_us();
    let options = init::prepare()?;
    run(async {
        let reaper = Arc::new(Reaper::default());
        let config = Config { mode: Mode::Vm, paths: Paths::new(STATE, CRUN), cgroup: CGROUP.into() };
        let agent = Arc::new(Agent::new(config, reaper.clone(), started_us)?);
        with_reaper(&reaper, server::serve_vsock(agent, options)).await
    })?;
    Err(error::AgentError::Internal("the agent ended".into()))
}

fn run_as_process(arguments: Vec<String>) -> std::result::Result<(), String> {
    let command = cli::parse(arguments.into_iter()).map_err(|error| format!("{error}\n{}", cli::USAGE))?;
    match command {
        cli::Command::Version => {
            print_version();
            Ok(())
        }
        cli::Command::Serve { listen, state, crun, cgroup } => {
            console::start(log::LevelFilter::Info);
            run(serve_process(&listen, Paths::new(state, crun), cgroup))
                .map_err(|error| format!("fatal: {error}"))
        }
    }
}

async fn serve_process(listen: &Path, paths: Paths, cgroup: String) -> Result<()> {
    // Containers outlive the OCI runtime that starts them and have to become this process's children.
    nix::sys::prctl::set_child_subreaper(true).context(|| "become a subreaper")?;
    let reaper = Arc::new(Reaper::default());
    let config = Config { mode: Mode::Host, paths, cgroup };
    let agent = Arc::new(Agent::new(config, reaper.clone(), clock::uptime_us())?);
    with_reaper(&reaper, server::serve_unix(agent, listen)).await
}

async fn with_reaper(reaper: &Reaper, serve: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::select! {
        result = serve => result,
        result = reaper.run() => result.context(|| "listen for ended children"),
    }
}

/// One thread does everything; others exist while something has to block.
fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_stack_size(256 * 1024)
        .build()
        .context(|| "start the event loop")?;
    runtime.block_on(work)
}

fn print_version() {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "vmruntime-agent {}", env!("CARGO_PKG_VERSION"));
}
