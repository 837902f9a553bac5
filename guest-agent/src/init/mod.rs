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
    let t0 = crate::clock::uptime_us();
    mounts::kernel_file_systems()?;
    let t1 = crate::clock::uptime_us();
    mounts::open_console();
    let options = CommandLine::read();
    console::start(options.log);
    console::line(&format!("T fs {} {}", t1-t0, crate::clock::uptime_us()));
    modules::load_all();
    root::leave_initramfs()?;
    console::line(&format!("T root {}", crate::clock::uptime_us()));
    mounts::directories()?;
    console::line(&format!("T dirs {}", crate::clock::uptime_us()));
    mounts::delegate_cgroups()?;
    console::line(&format!("T cg {}", crate::clock::uptime_us()));
    Ok(options)
}
