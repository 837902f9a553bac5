//! System calls without a safe wrapper elsewhere. The only module with unsafe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::{Uid, geteuid};

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

/// Has every generator of random bytes in the kernel start from its pool anew. By itself it does so once a minute only
/// (`crng_reseed_interval` in drivers/char/random.c of Linux 6.1), however much has been added to the pool.
///
/// # Errors
/// When the kernel refuses. One whose pool has never been full starts from it anyway, and has no need to be told.
pub fn reseed_random(random: impl AsFd) -> io::Result<()> {
    nix::ioctl_none!(rnd_reseed, b'R', 0x07);
    // SAFETY: the request takes no argument.
    match unsafe { rnd_reseed(random.as_fd().as_raw_fd()) } {
        Ok(_) | Err(Errno::ENODATA) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Sets a terminal's size; the kernel tells its foreground processes.
pub fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` outlives the call.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// Brings the loopback interface up. The oldest interface is the quickest for this: no netlink conversation.
pub fn bring_up_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: a zeroed request is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `request` outlives the call and has a name that ends within it.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

/// Forks. Only for a process with one thread: a lock that another one holds would stay held in the child.
///
/// # Errors
/// When the kernel refuses.
pub fn fork_single_threaded() -> io::Result<Option<i32>> {
    // SAFETY: as the caller has one thread, the child finds everything as it was.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        child => Ok(Some(child)),
    }
}

/// The user namespace that owns another namespace (`ioctl_ns(2)`).
///
/// # Errors
/// When the kernel does not tell.
pub fn owner_of(namespace: impl AsFd) -> io::Result<OwnedFd> {
    nix::ioctl_none!(ns_get_userns, 0xb7, 0x1);
    // SAFETY: the request takes no argument.
    let descriptor = unsafe { ns_get_userns(namespace.as_fd().as_raw_fd()) }?;
    // SAFETY: the kernel has just made it; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Does something as another user. Only this thread changes, which must not wait meanwhile.
///
/// # Errors
/// When the kernel refuses, or the work fails.
pub fn as_user<T>(uid: Uid, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    const KEEP: libc::c_long = -1;
    // The C library would change every thread.
    // SAFETY: no memory is involved.
    let become_user =
        |uid: libc::c_long| check_long(unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) });
    let own = geteuid();
    become_user(uid.as_raw().into())?;
    let done = work();
    become_user(own.as_raw().into())?;
    done
}

/// What mount_setattr(2) changes.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Replaces a mount by one whose files belong to the ids that a user namespace maps theirs to. The kernel takes such a
/// change only while the mount is attached nowhere.
///
/// # Errors
/// When the kernel refuses, as it does for file systems that cannot be mapped.
pub fn map_ids(target: &Path, namespace: impl AsFd) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    let path = CString::new(target.as_os_str().as_bytes())?;
    let nothing = c"".as_ptr();
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned();
    // SAFETY: the path outlives the call.
    let copy = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let copy = RawFd::try_from(copy).map_err(io::Error::other)?;
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it; nobody else knows its number.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: u64::from(namespace.as_fd().as_raw_fd().cast_unsigned()),
    };
    let (number, size) = (copy.as_raw_fd(), size_of::<MountAttributes>());
    // SAFETY: text and attributes outlive the call, and the size is theirs.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            number,
            nothing,
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size,
        )
    })?;
    umount2(target, MntFlags::UMOUNT_NOFOLLOW)?;
    // SAFETY: both texts outlive the call.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            number,
            nothing,
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
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

fn check_long(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
