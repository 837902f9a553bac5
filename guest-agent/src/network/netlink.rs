//! Requests to the kernel's route netlink (rtnetlink(7)). A few messages need no library, and whatever runs has to be
//! translated first where the processor is emulated.
//!
//! The kernel does what it is asked while it is asked, so its answers are there when the sending returns.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::error::{AgentError, Context, Result};

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// The kernel's own for such answers.
const LARGEST_ANSWER: usize = 32 * 1024;

pub const REQUEST: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
pub const REPLACE: i32 = REQUEST | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// Messages that go to the kernel together, each with what it is to achieve.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    purposes: Vec<String>,
}

impl Batch {
    /// Begins a message with the header of its kind; attributes follow.
    pub fn message(&mut self, kind: u16, flags: i32, header: &[u8], purpose: String) -> Message<'_> {
        self.purposes.push(purpose);
        let sequence = u32::try_from(self.purposes.len()).unwrap_or_default();
        let start = self.bytes.len();
        self.bytes.extend(0_u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags as u16).to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend(0_u32.to_ne_bytes());
        self.bytes.extend(header);
        let mut message = Message { bytes: &mut self.bytes, start };
        message.finish();
        message
    }
}

/// The last message of a batch.
pub struct Message<'a> {
    bytes: &'a mut Vec<u8>,
    start: usize,
}

impl Message<'_> {
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        push_attribute(self.bytes, kind, value);
        self.finish();
        self
    }

    /// Everything begins at multiples of 4; the length counts what was added for that.
    fn finish(&mut self) {
        let length = self.bytes.len() - self.start;
        let length = u32::try_from(length).unwrap_or_default().to_ne_bytes();
        if let Some(field) = self.bytes.get_mut(self.start..self.start + length.len()) {
            field.copy_from_slice(&length);
        }
    }
}

/// An attribute that holds others.
pub fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_attribute(&mut bytes, kind, value);
    bytes
}

fn push_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or_default();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Of the network namespace that the thread was in when it was opened.
pub struct Socket(OwnedFd);

impl Socket {
    /// # Errors
    /// When the kernel has no such socket.
    pub fn open() -> Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let opened = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
        Ok(Self(opened.context(|| "open a netlink socket")?))
    }

    /// Has everything in a batch done, in its order.
    ///
    /// # Errors
    /// The first refusal; the text names its purpose. What comes after it is done all the same.
    pub fn run(&self, batch: &Batch) -> Result<()> {
        if batch.bytes.is_empty() {
            return Ok(());
        }
        self.send(batch)?;
        let mut first = Ok(());
        let mut open = batch.purposes.len();
        while open > 0 {
            for answer in messages(&self.receive()?) {
                if answer.kind != libc::NLMSG_ERROR as u16 {
                    continue;
                }
                open = open.saturating_sub(1);
                let purpose = batch.purposes.get((answer.sequence as usize).wrapping_sub(1));
                if first.is_ok() {
                    first = outcome(answer.body).context(|| purpose.map_or("netlink", String::as_str));
                }
            }
        }
        first
    }

    /// The bodies of the messages of one kind that the kernel answers a batch of one request with.
    ///
    /// # Errors
    /// When the kernel refuses; the text names the purpose.
    pub fn dump(&self, batch: &Batch, kind: u16) -> Result<Vec<Vec<u8>>> {
        self.send(batch)?;
        let mut bodies = Vec::new();
        loop {
            for answer in messages(&self.receive()?) {
                if answer.kind == kind {
                    bodies.push(answer.body.to_vec());
                } else if answer.kind == libc::NLMSG_DONE as u16 {
                    return Ok(bodies);
                } else if answer.kind == libc::NLMSG_ERROR as u16 {
                    let purpose = batch.purposes.first().map_or("netlink", String::as_str);
                    outcome(answer.body).context(|| purpose)?;
                }
            }
        }
    }

    fn send(&self, batch: &Batch) -> Result<()> {
        let sent = send(self.0.as_raw_fd(), &batch.bytes, MsgFlags::empty());
        sent.map(drop).context(|| "send to the kernel's netlink")
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let mut answer = vec![0; LARGEST_ANSWER];
        match recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => {
                answer.truncate(length);
                Ok(answer)
            }
            Err(Errno::EAGAIN) => Err(AgentError::Internal("the kernel's netlink did not answer".into())),
            Err(error) => Err(error).context(|| "receive from the kernel's netlink"),
        }
    }
}

struct Answer<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let answer =
            Answer { kind: u16_at(bytes, 4)?, sequence: u32_at(bytes, 8)?, body: bytes.get(HEADER..length)? };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(answer)
    })
}

/// The attributes in a message's body, after the header of its kind, with their kinds.
pub fn attributes(body: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = body.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let attribute = (u16_at(bytes, 2)?, bytes.get(ATTRIBUTE_HEADER..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(attribute)
    })
}

/// A number of 32 bits in the machine's order.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..offset + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// An acknowledgement is the error number 0.
fn outcome(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(number.saturating_neg())),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let mut batch = Batch::default();
        batch.message(18, REQUEST, &[7; 16], "a".into()).attribute(3, b"eth0\0").attribute(1, &[1; 6]);
        batch.message(19, REQUEST, &[8; 16], "b".into());
        let all: Vec<_> = messages(&batch.bytes).collect();
        assert_eq!(all.iter().map(|one| (one.kind, one.sequence)).collect::<Vec<_>>(), [(18, 1), (19, 2)]);
        let found: Vec<_> = attributes(all[0].body, 16).collect();
        assert_eq!(found, [(3, &b"eth0\0"[..]), (1, &[1; 6][..])]);
        assert!(attributes(all[1].body, 16).next().is_none());
    }

    #[test]
    fn answers_that_are_cut_short_end() {
        assert!(messages(&[9, 0, 0]).next().is_none());
        assert!(attributes(&[0, 0, 0, 0], 0).next().is_none());
        assert!(outcome(&[]).is_err());
        assert_eq!(outcome(&(-libc::EPERM).to_ne_bytes()).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn the_kernel_answers() {
        let socket = Socket::open().unwrap();
        let mut batch = Batch::default();
        batch.message(libc::RTM_GETLINK, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, &[0; 16], "list".into());
        assert!(!socket.dump(&batch, libc::RTM_NEWLINK).unwrap().is_empty());
        let mut batch = Batch::default();
        batch.message(
            libc::RTM_SETLINK,
            REQUEST,
            &[0, 0, 0, 0, 255, 255, 255, 127, 0, 0, 0, 0, 0, 0, 0, 0],
            "x".into(),
        );
        assert!(socket.run(&batch).unwrap_err().to_string().starts_with("x: "));
    }
}
