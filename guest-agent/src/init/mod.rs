//! What PID 1 of a virtual machine does before the agent can answer.

pub mod cmdline;
mod modules;
mod mounts;
pub mod power;
pub mod reaper;
mod root;

use crate::console;
use crate::error::Result;
use cmdline::CommandLine;

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
    Ok(options)
}
