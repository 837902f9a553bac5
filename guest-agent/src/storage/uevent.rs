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
        self.until(|message| comes(message, b"SUBSYSTEM=block")).await
    }

    /// Waits until a network device has been added or has changed.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn network_device(&self) -> io::Result<()> {
        self.until(|message| comes(message, b"SUBSYSTEM=net")).await
    }

    /// Waits until a driver has taken a vsock device into use.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn vsock_bound(&self) -> io::Result<()> {
        self.until(is_bound_vsock).await
    }

    async fn until(&self, wanted: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        let mut message = vec![0; 8192];
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(recv(fd.as_raw_fd(), &mut message, MsgFlags::empty())?)) {
                Ok(Ok(length)) if wanted(message.get(..length).unwrap_or_default()) => return Ok(()),
                // Messages were lost: look again rather than miss the one that counts.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }
}

fn comes(message: &[u8], subsystem: &[u8]) -> bool {
    has(message, subsystem) && !has(message, b"ACTION=remove")
}

/// Which driver it is does not matter; 19 is the number of a vsock device in the virtio specification.
fn is_bound_vsock(message: &[u8]) -> bool {
    has(message, b"SUBSYSTEM=virtio")
        && has(message, b"ACTION=bind")
        && fields(message).any(|field| field.starts_with(b"MODALIAS=virtio:d00000013v"))
}

fn has(message: &[u8], wanted: &[u8]) -> bool {
    fields(message).any(|field| field == wanted)
}

/// A message is `ACTION@path` and then `KEY=value` fields, each ended by a zero byte.
fn fields(message: &[u8]) -> impl Iterator<Item = &[u8]> {
    message.split(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_devices_that_come() {
        let block = |message| comes(message, b"SUBSYSTEM=block");
        assert!(block(b"add@/devices/x/block/sda\0ACTION=add\0SUBSYSTEM=block\0DEVNAME=sda\0"));
        assert!(!block(b"remove@/devices/x\0ACTION=remove\0SUBSYSTEM=block\0"));
        assert!(!block(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0"));
        assert!(!block(b""));
    }

    #[test]
    fn only_vsock_devices_that_have_a_driver() {
        let event = |action: &str, device: &str| {
            format!(
                "{action}@/devices/x/virtio5\0ACTION={action}\0DEVPATH=/devices/x/virtio5\0SUBSYSTEM=virtio\0\
                 DRIVER=x\0MODALIAS=virtio:d000000{device}v00001AF4\0SEQNUM=9\0"
            )
            .into_bytes()
        };
        assert!(is_bound_vsock(&event("bind", "13")));
        assert!(!is_bound_vsock(&event("add", "13")));
        assert!(!is_bound_vsock(&event("bind", "01")));
        assert!(!is_bound_vsock(b""));
    }
}
