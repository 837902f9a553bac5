//! The first process of a pod's shared PID namespace.
//!
//! A namespace lives as long as its first process, so that one must outlive every container of the pod. It does
//! what any init does for orphans: it reaps them.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::error::{AgentError, Context, Result};
use crate::init::reaper::Reaper;
use crate::io::file::pipe;
use crate::sys;

/// Makes the namespace: its first process is a child of this one.
pub const MAKE: &str = "pod-init";
/// Runs inside it.
const INSIDE: &str = "pod-init-inside";

/// Handles the two verbs that are no agent; `None` for any other.
pub fn dispatch(verb: &str) -> Option<ExitCode> {
    match verb {
        MAKE => Some(match make() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }),
        INSIDE => Some(inside()),
        _ => None,
    }
}

/// Starts the first process of a new PID namespace and answers its number.
///
/// # Errors
/// When the kernel refuses the namespace.
pub async fn start(reaper: &Reaper) -> Result<i32> {
    let what = || "start the pod's shared PID namespace";
    let (answer, output) = pipe().context(what)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(MAKE).stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
    let started = reaper.spawn(&mut command);
    drop(command);
    let (_, exit) = started.context(what)?;
    // Its last act is to write, so nothing more is to come when it has exited.
    let _ = exit.await;
    read_number(answer).ok_or_else(|| AgentError::Internal(format!("{}: the kernel refuses it", what())))
}

fn read_number(answer: OwnedFd) -> Option<i32> {
    let mut text = String::new();
    std::fs::File::from(answer).take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// A process cannot enter a new PID namespace, only its children can.
fn make() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let mut command = Command::new("/proc/self/exe");
    // Containers of the pod see this name.
    command.arg0("vmruntime").arg(INSIDE).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn()?;
    let mut output = io::stdout();
    write!(output, "{}", child.id())?;
    output.flush()
}

/// Reaps for ever. No signal from inside the pod ends it, TERM included: that would end every container with it.
/// The agent ends it with KILL, or by powering off.
fn inside() -> ExitCode {
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    if sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None).is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while sys::reap().is_some() {}
        if ended.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
