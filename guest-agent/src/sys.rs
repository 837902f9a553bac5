//! System calls without a safe wrapper elsewhere. The only module with unsafe code.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::unix::AsyncFd;

/// An exit status as `wait` gives it. Real-time signals pass through, which nix's enum cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(i32);

impl ExitStatus {
    /// 0-255; 128 + signal when killed, as a shell has it.
    pub fn code(self) -> i32 {
        if libc::WIFSIGNALED(self.0) { 128 + libc::WTERMSIG(self.0) } else { libc::WEXITSTATUS(self.0) }
    }

    #[cfg(test)]
    pub fn from_raw(raw: i32) -> Self {
        Self(raw)
    }
}

/// Reaps one child that has ended, if there is one.
pub fn reap() -> Option<(i32, ExitStatus)> {
    let mut status = 0;
    // SAFETY: `status` outlives the call, which writes nothing else.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then_some((pid, ExitStatus(status)))
}

/// Whether a process with this id exists, a zombie included.
pub fn exists(pid: i32) -> bool {
    // SAFETY: signal 0 only checks.
    unsafe { libc::kill(pid, 0) == 0 }
}

/// Sends any signal, real-time ones too. A negative `pid` is a process group.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::kill(pid, signal) })
}

/// Mixes bytes into the kernel's random pool and credits them.
pub fn add_entropy(random: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    // struct rand_pool_info: the credit in bits, the size in bytes, then the bytes.
    let mut request = Vec::with_capacity(8 + bytes.len());
    let size = i32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    request.extend_from_slice(&size.saturating_mul(8).to_ne_bytes());
    request.extend_from_slice(&size.to_ne_bytes());
    request.extend_from_slice(bytes);
    nix::ioctl_write_ptr_bad!(rnd_add_entropy, nix::request_code_write!(b'R', 0x03, 8), u8);
    // SAFETY: the request holds the two numbers and as many bytes as they say.
    unsafe { rnd_add_entropy(random.as_fd().as_raw_fd(), request.as_ptr()) }?;
    Ok(())
}

/// Sets a terminal's size; the kernel tells its foreground processes.
pub fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` outlives the call.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// Owns a descriptor that has just come in a control message.
pub fn own_received(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel made it for this process with that message; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Lets the event loop watch a descriptor.
///
/// # Errors
/// When it cannot be polled, as a file cannot.
pub fn pollable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its number and stays open as long as it lives, which the AsyncFd makes sure of.
    unsafe { AsyncFd::register(descriptor) }.map_err(io::Error::from)
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_exit_statuses() {
        assert_eq!(ExitStatus::from_raw(7 << 8).code(), 7);
        assert_eq!(ExitStatus::from_raw(libc::SIGKILL).code(), 137);
        assert_eq!(ExitStatus::from_raw(40).code(), 168);
    }
}
