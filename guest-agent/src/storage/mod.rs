//! Disks, layers and root file systems.

pub mod disk;
pub mod layers;
pub mod mounter;
pub mod rootfs;
pub mod scratch;
pub mod uevent;
pub mod usage;
pub mod volumes;
