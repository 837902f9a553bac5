//! What PID 1 of a virtual machine does before the agent can answer.

pub mod cmdline;
mod modules;
mod mounts;
pub mod power;
pub mod reaper;
mod root;

use std::path::Path;

use nix::sys::resource::{Resource, setrlimit};

use crate::error::Result;
use crate::{console, sys};
use cmdline::CommandLine;

const OPEN_FILES_SOFT: u64 = 65_536;
const OPEN_FILES_HARD: u64 = 1_048_576;

/// Turns a freshly booted kernel into a place where the agent and containers can run.
///
/// # Errors
/// When something is missing without which no container can run.
pub fn prepare() -> Result<CommandLine> {
    mounts::kernel_file_systems()?;
    mounts::open_console();
    let options = CommandLine::read();
    console::start(options.log);
    modules::load_all();
    root::leave_initramfs()?;
    mounts::directories()?;
    mounts::delegate_cgroups()?;
    raise_limits();
    report_small_pieces();
    bring_up_loopback();
    Ok(options)
}

/// Removes a file that has served its purpose and would only occupy memory. Files on a disk stay.
pub fn forget_file(path: &Path) {
    if root::is_in_memory() {
        // At worst it stays.
        let _ = std::fs::remove_file(path);
    }
}

/// Each container costs the agent some descriptors. The hard limit is what containers may raise theirs to, unless
/// their spec says otherwise.
fn raise_limits() {
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES_SOFT, OPEN_FILES_HARD) {
        log::warn!("raise the limit of open files: {error}");
    }
}

/// Free memory goes back to the host in pieces of 64 KiB, not only in whole huge pages: after a pod that has used 100 MB
/// that is 11 MiB more. A kernel without the option, or a machine without a balloon, gives nothing back anyway.
fn report_small_pieces() {
    let _ = std::fs::write("/sys/module/page_reporting/parameters/page_reporting_order", "4");
}

fn bring_up_loopback() {
    if let Err(error) = sys::bring_up_loopback() {
        log::warn!("bring up lo: {error}");
    }
}
