//! Two network namespaces: the one the machine booted with, and the pod's when that is another.
//!
//! Devices appear, and are announced, in the first; everything else of the agent's is in the second.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns};

struct Both {
    home: OwnedFd,
    pods: OwnedFd,
}

static BOTH: OnceLock<Both> = OnceLock::new();

/// Takes the agent's thread, and what it starts from now on, into the pod's namespace.
///
/// # Errors
/// When the kernel refuses.
pub fn leave(pods: OwnedFd) -> io::Result<()> {
    let home = File::open("/proc/self/ns/net")?.into();
    setns(&pods, CloneFlags::CLONE_NEWNET)?;
    // A second time is a repeated set-up's, after which the first home is still the machine's.
    let _ = BOTH.set(Both { home, pods });
    Ok(())
}

/// Whether the pod's namespace is another.
pub fn is_left() -> bool {
    BOTH.get().is_some()
}

/// Does something that must not wait in the namespace the machine booted with.
///
/// # Errors
/// When the kernel refuses, or the work fails.
pub fn at_home<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(Both { home, pods }) = BOTH.get() else { return work() };
    setns(home, CloneFlags::CLONE_NEWNET)?;
    let done = work();
    setns(pods, CloneFlags::CLONE_NEWNET)?;
    done
}
