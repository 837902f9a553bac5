//! Terminals that the OCI runtime makes inside a container and hands over through a socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::error::{AgentError, Context, Result};
use crate::proto::TerminalSize;
use crate::sys;

/// How long a finished OCI runtime's message may take; it has been sent by then.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket a terminal will arrive on. Removed when dropped.
pub struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// # Errors
    /// When the socket cannot be made.
    pub fn bind(path: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(&path).context(|| format!("listen on {}", path.display()))?;
        Ok(Self { path, listener })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal's master side, after the OCI runtime has sent it.
    ///
    /// # Errors
    /// When none comes.
    pub async fn receive(self) -> Result<OwnedFd> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            receive_descriptor(&stream).await
        };
        match timeout(PATIENCE, receive).await {
            Ok(result) => result.context(|| "receive the terminal from the OCI runtime"),
            Err(_) => Err(AgentError::Internal("the OCI runtime sent no terminal".into())),
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn receive_descriptor(stream: &UnixStream) -> io::Result<OwnedFd> {
    loop {
        stream.readable().await?;
        match stream.try_io(tokio::io::Interest::READABLE, || take_descriptor(stream.as_raw_fd())) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

fn take_descriptor(socket: RawFd) -> io::Result<OwnedFd> {
    let mut text = [0; 256];
    let mut iov = [IoSliceMut::new(&mut text)];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(socket, &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = item
            && let Some(descriptor) = descriptors.first()
        {
            return Ok(sys::own_received(*descriptor));
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the message carried no descriptor"))
}

/// Sets a terminal's size; sizes beyond what a terminal can have are cut.
///
/// # Errors
/// When the descriptor is no terminal.
pub fn resize(terminal: impl std::os::fd::AsFd, size: &TerminalSize) -> io::Result<()> {
    let cut = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    sys::set_window_size(terminal, cut(size.columns), cut(size.rows))
}
