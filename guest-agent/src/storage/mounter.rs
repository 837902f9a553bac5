//! Mounting, behind a trait so that what is mounted where can be tested without being root.

use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags};

use crate::error::{Context, Result};
use crate::sys;

/// One call of mount(2).
#[derive(Debug, Clone, Copy)]
pub struct Mount<'a> {
    pub source: &'a str,
    pub target: &'a Path,
    pub kind: &'a str,
    pub flags: MsFlags,
    pub options: &'a str,
}

pub trait Mounter: Send + Sync {
    /// # Errors
    /// When the kernel refuses; the text names source and target.
    fn mount(&self, mount: Mount<'_>) -> Result<()>;

    /// # Errors
    /// When the target is in use or not a mount point.
    fn unmount(&self, target: &Path) -> Result<()>;

    /// Gives the files of a mount to the ids that a user namespace maps theirs to.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn map_ids(&self, target: &Path, namespace: BorrowedFd<'_>) -> Result<()>;
}

/// The kernel's.
pub struct SystemMounter;

impl Mounter for SystemMounter {
    fn mount(&self, mount: Mount<'_>) -> Result<()> {
        let Mount { source, target, kind, flags, options } = mount;
        nix::mount::mount(Some(source), target, Some(kind), flags, Some(options))
            .context(|| format!("mount {kind} {source} on {}", target.display()))
    }

    fn unmount(&self, target: &Path) -> Result<()> {
        nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW)
            .context(|| format!("unmount {}", target.display()))
    }

    fn map_ids(&self, target: &Path, namespace: BorrowedFd<'_>) -> Result<()> {
        sys::map_ids(target, namespace)
            .context(|| format!("map {} into the pod's user namespace", target.display()))
    }
}

#[cfg(test)]
pub mod fake {
    use std::sync::Mutex;

    use super::*;
    use crate::error::AgentError;

    /// Writes down what it is asked, and fails for targets that contain `refuse`.
    #[derive(Default)]
    pub struct RecordingMounter {
        pub calls: Mutex<Vec<String>>,
        pub refuse: Option<&'static str>,
    }

    impl RecordingMounter {
        fn record(&self, call: String) -> Result<()> {
            let refused = self.refuse.is_some_and(|part| call.contains(part));
            self.calls.lock().unwrap().push(call);
            if refused { Err(AgentError::Internal("refused".into())) } else { Ok(()) }
        }

        pub fn calls(&self) -> Vec<String> {
            self.calls.lock().unwrap().clone()
        }
    }

    impl Mounter for RecordingMounter {
        fn mount(&self, mount: Mount<'_>) -> Result<()> {
            let Mount { source, target, kind, options, .. } = mount;
            self.record(format!("mount {kind} {source} {} {options}", target.display()))
        }

        fn unmount(&self, target: &Path) -> Result<()> {
            self.record(format!("unmount {}", target.display()))
        }

        fn map_ids(&self, target: &Path, _: BorrowedFd<'_>) -> Result<()> {
            self.record(format!("map {}", target.display()))
        }
    }
}
