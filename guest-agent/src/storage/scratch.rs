//! The pod's writable disk and its shared memory.

use std::fs;

use nix::mount::MsFlags;

use super::disk::Disks;
use super::mounter::{Mount, Mounter};
use crate::config::Paths;
use crate::error::{Context, Result};

pub const DEFAULT_SHM: u64 = 64 * 1024 * 1024;

/// Mounts the disk with this serial, or memory when the serial is empty.
///
/// # Errors
/// `DeadlineExceeded` when the disk does not appear, `Internal` when it holds no ext4 file system.
pub async fn mount_disk(paths: &Paths, serial: &str, mounter: &dyn Mounter) -> Result<()> {
    let target = paths.scratch();
    fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
    if serial.is_empty() {
        let flags = MsFlags::empty();
        return mounter.mount(Mount {
            source: "scratch",
            target: &target,
            kind: "tmpfs",
            flags,
            options: "mode=0711",
        });
    }
    let disk = Disks::default().wait(serial).await?;
    disk.ready().await?;
    mounter.mount(Mount {
        source: &disk.device().to_string_lossy(),
        target: &target,
        kind: "ext4",
        flags: MsFlags::MS_NOATIME,
        // The disk is a new one full of zeros; by default a thread would go on for minutes to write 80 MB of zeros over them.
        options: "noinit_itable",
    })?;
    remove_leftovers(paths)
}

/// A disk that an earlier guest has used holds layers of containers nobody knows any more; they cannot be mounted
/// again. A new disk, the usual case, holds nothing.
fn remove_leftovers(paths: &Paths) -> Result<()> {
    for path in [paths.all_writable(), paths.trash()] {
        if path.exists() {
            fs::remove_dir_all(&path).context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Makes the host's /dev/shm the pod's.
///
/// # Errors
/// When the kernel refuses.
pub fn bind_shm(paths: &Paths, mounter: &dyn Mounter) -> Result<()> {
    let target = paths.shm();
    fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
    let flags = MsFlags::MS_BIND;
    mounter.mount(Mount { source: "/dev/shm", target: &target, kind: "bind", flags, options: "" })
}

/// Mounts what the pod's containers see as /dev/shm. With `again` it is mounted, and gets another size.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_shm(paths: &Paths, size: u64, again: bool, mounter: &dyn Mounter) -> Result<()> {
    let target = paths.shm();
    fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if again {
        flags |= MsFlags::MS_REMOUNT;
    }
    let options = format!("mode=1777,size={size}");
    mounter.mount(Mount { source: "shm", target: &target, kind: "tmpfs", flags, options: &options })
}
