//! Pipes and terminals without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{fchown, pipe2, read, write};
use tokio::io::unix::AsyncFd;

use crate::container::user_namespace::Owner;
use crate::sys;

/// One end of a pipe, or a terminal's master side. Reading and writing need only a shared reference, so that a
/// terminal can do both at once.
#[derive(Debug)]
pub struct AsyncFile(AsyncFd<OwnedFd>);

impl AsyncFile {
    /// # Errors
    /// When the descriptor cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(sys::pollable(fd)?))
    }

    /// Reads what is there, at least one byte; 0 is the end.
    ///
    /// # Errors
    /// When the kernel fails the read.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(read(fd.get_ref(), buffer)?)) {
                // A terminal whose other side nobody has open any more.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => return Ok(0),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// # Errors
    /// When nobody reads any more, or the kernel fails the write.
    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(write(fd.get_ref(), data)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => data = data.get(result?..).unwrap_or_default(),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

impl AsFd for AsyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// A pipe nobody inherits by accident: (read end, write end).
///
/// # Errors
/// When there are too many open files.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe2(OFlag::O_CLOEXEC)?)
}

/// A pipe that belongs to somebody, who may open it again, as `/dev/stdout` is; `None`: to the agent.
///
/// # Errors
/// When there are too many open files.
pub fn pipe_of(owner: Option<Owner>) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read_end, write_end) = pipe()?;
    if let Some(Owner { uid, gid }) = owner {
        fchown(&read_end, Some(uid), Some(gid))?; // Both ends are one file.
    }
    Ok((read_end, write_end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_can_be_read_and_the_end_is_seen() {
        let (read_end, write_end) = pipe().unwrap();
        let reader = AsyncFile::new(read_end).unwrap();
        let writer = AsyncFile::new(write_end).unwrap();
        let big = vec![7_u8; 300_000];
        let (written, received) = tokio::join!(
            async {
                let result = writer.write_all(&big).await;
                drop(writer);
                result
            },
            async {
                let mut total = 0;
                let mut buffer = vec![0; 4096];
                loop {
                    match reader.read(&mut buffer).await.unwrap() {
                        0 => return total,
                        count => total += count,
                    }
                }
            }
        );
        written.unwrap();
        assert_eq!(received, big.len());
    }
}
