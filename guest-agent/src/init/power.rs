//! The end of a virtual machine.

use std::path::Path;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};

use crate::console;
use crate::error::AgentError;

/// Reports what made going on impossible and turns the machine off. PID 1 must not end: the kernel would panic.
pub fn fatal(error: &AgentError) -> ! {
    console::line(&format!("fatal: {error}"));
    off()
}

/// Writes everything back and turns the machine off.
pub fn off() -> ! {
    nix::unistd::sync();
    for mode in modes() {
        // Returns only if the kernel refuses.
        let _ = reboot(*mode);
    }
    console::line("the kernel refuses to power off");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Without ACPI an x86 kernel cannot switch itself off and would halt for ever, but a reset ends a QEMU that was
/// started with `-no-reboot`.
fn modes() -> &'static [RebootMode] {
    let can_power_off = cfg!(not(target_arch = "x86_64")) || Path::new("/sys/firmware/acpi").exists();
    if can_power_off {
        &[RebootMode::RB_POWER_OFF, RebootMode::RB_AUTOBOOT]
    } else {
        &[RebootMode::RB_AUTOBOOT]
    }
}

/// Takes the writable disk out of use, so that its file system is clean for whoever looks at it later.
pub fn detach_scratch(path: &Path) {
    if umount2(path, MntFlags::empty()).is_ok() {
        return;
    }
    let none: Option<&str> = None;
    let _ = mount(none, path, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none);
}
