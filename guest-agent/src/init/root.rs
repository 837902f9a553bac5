//! Leaves the initramfs behind as the root.
//!
//! `pivot_root`, with which the OCI runtime enters a container, refuses to work while the root is the kernel's first
//! mount, since that one has no parent. Copying everything to another file system would cost time and memory; it is
//! enough to mount the same files once more over it and step in there.

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};
use nix::unistd::{chdir, chroot};

use crate::error::{Context, Result};

const RAMFS: FsType = FsType(0x8584_58f6_u32 as _);
const TMPFS: FsType = FsType(0x0102_1994);
const NEW_ROOT: &str = "/.root";

/// Whether the root's files occupy memory and are gone with it, as an initramfs's are.
pub fn is_in_memory() -> bool {
    statfs("/").is_ok_and(|root| matches!(root.filesystem_type(), RAMFS | TMPFS))
}

/// Does nothing when the root is a disk.
pub fn leave_initramfs() -> Result<()> {
    if !is_in_memory() {
        return Ok(());
    }
    // The directory may be there.
    let _ = std::fs::create_dir(NEW_ROOT);
    let none: Option<&str> = None;
    mount(Some("/"), NEW_ROOT, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .context(|| "mount the initramfs once more")?;
    chdir(NEW_ROOT).context(|| "enter the new root")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context(|| "move the new root over the old one")?;
    chroot(".").context(|| "change the root")?;
    chdir("/").context(|| "enter /")
}
