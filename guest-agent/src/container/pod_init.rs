//! The first process of a pod's shared PID namespace.
//!
//! A namespace lives as long as its first process, so that one must outlive every container of the pod. It does
//! what any init does for orphans: it reaps them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_name;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::dup2_stdout;

use crate::error::{AgentError, Context, Result};
use crate::init::reaper::Reaper;
use crate::io::file::pipe;
use crate::sys;

/// The verb that makes the namespace.
const VERB: &str = "pod-init";
/// What containers of the pod see as the name of process 1.
const NAME: &str = "vmruntime";

/// Handles the verb that is no agent; `None` for any other.
pub fn dispatch(verb: &str) -> Option<ExitCode> {
    (verb == VERB).then(|| make().unwrap_or(ExitCode::FAILURE))
}

/// Starts the first process of a new PID namespace and answers its number.
///
/// # Errors
/// When the kernel refuses the namespace.
pub async fn start(reaper: &Reaper) -> Result<i32> {
    let what = || "start the pod's shared PID namespace";
    let (answer, output) = pipe().context(what)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(VERB).stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
    let started = reaper.spawn(&mut command);
    drop(command);
    let (_, exit) = started.context(what)?;
    // Its last act is to write, so nothing more is to come when it has exited.
    let _ = exit.await;
    read_number(answer).ok_or_else(|| AgentError::Internal(format!("{}: the kernel refuses it", what())))
}

fn read_number(answer: OwnedFd) -> Option<i32> {
    let mut text = String::new();
    File::from(answer).take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// A process cannot enter a new PID namespace, only its children can.
fn make() -> io::Result<ExitCode> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let Some(child) = sys::fork_single_threaded()? else {
        // The agent waits for the end of this output.
        let nothing = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdout(&nothing)?;
        set_name(c"vmruntime")?;
        return Ok(reap_for_ever());
    };
    let mut output = io::stdout();
    write!(output, "{child}")?;
    output.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Reaps for ever. No signal from inside the pod ends it, TERM included: that would end every container with it.
/// The agent ends it with KILL, or by powering off.
fn reap_for_ever() -> ExitCode {
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
