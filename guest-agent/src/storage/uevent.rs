//! The kernel's announcements of devices that come and go.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

use crate::network::home;
use crate::sys;

/// The kernel's own multicast group; group 2 is udev's.
const KERNEL_GROUP: u32 = 1;

pub struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    /// Network namespaces of a user namespace hear nothing of devices, so it listens at home.
    ///
    /// # Errors
    /// When the kernel has no such socket.
    pub fn listen() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket =
            home::at_home(|| Ok(socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?))?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(sys::pollable(socket)?))
    }

    /// Waits until a block device has been added or has changed.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn block_device(&self) -> io::Result<()> {
        let mut message = vec![0; 8192];
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(recv(fd.as_raw_fd(), &mut message, MsgFlags::empty())?)) {
                Ok(Ok(length)) if is_block_device(message.get(..length).unwrap_or_default()) => return Ok(()),
                // Messages were lost: look again rather than miss the one that counts.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }
}

/// A message is `ACTION@path` and then `KEY=value` fields, each ended by a zero byte.
fn is_block_device(message: &[u8]) -> bool {
    let has = |wanted: &[u8]| message.split(|byte| *byte == 0).any(|field| field == wanted);
    has(b"SUBSYSTEM=block") && !has(b"ACTION=remove")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_devices_that_come() {
        assert!(is_block_device(b"add@/devices/x/block/sda\0ACTION=add\0SUBSYSTEM=block\0DEVNAME=sda\0"));
        assert!(!is_block_device(b"remove@/devices/x\0ACTION=remove\0SUBSYSTEM=block\0"));
        assert!(!is_block_device(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0"));
        assert!(!is_block_device(b""));
    }
}
