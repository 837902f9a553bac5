//! A container's output between the pipe and the host's log file.
//!
//! Records stay until the host has them safe. When the buffer is full the pipes are left to fill and the container
//! waits, as it would for any slow reader: nothing is lost, and nothing grows without bound.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::lines::Piece;
use crate::error::{AgentError, Result};
use crate::proto::{OutputRecord, output_record::Stream};

const DEFAULT_LIMIT: usize = 1024 * 1024;
/// What a record costs besides its bytes.
const OVERHEAD: usize = size_of::<OutputRecord>() + 32;

pub struct OutputBuffer {
    limit: usize,
    inner: Mutex<Inner>,
    /// Something for the reader: a record, the end, another reader.
    news: Notify,
    /// Something for the writers: room.
    room: Notify,
}

#[derive(Default)]
struct Inner {
    records: VecDeque<OutputRecord>,
    bytes: usize,
    /// The number of the newest record; 0 before the first.
    last: u64,
    /// Streams not at their end.
    open: usize,
    /// The container has exited, so an end of all streams is final.
    exited: bool,
    /// Counts readers; only the newest one is served.
    reader: u64,
}

/// The right to read, until someone else reads.
#[derive(Debug, Clone, Copy)]
pub struct Ticket(u64);

/// What a reader gets.
#[derive(Debug, PartialEq)]
pub enum Next {
    Record(OutputRecord),
    End,
    /// Another reader has taken over.
    Replaced,
}

impl OutputBuffer {
    /// A buffer for `streams` streams. A limit of 0 means the default.
    pub fn new(limit: usize, streams: usize) -> Self {
        let limit = if limit == 0 { DEFAULT_LIMIT } else { limit };
        let inner = Mutex::new(Inner { open: streams, ..Inner::default() });
        Self { limit, inner, news: Notify::new(), room: Notify::new() }
    }

    /// Adds a record, as soon as there is room. A buffer that is empty always has some.
    pub async fn push(&self, stream: Stream, piece: Piece) {
        let cost = piece.data.len() + OVERHEAD;
        loop {
            let room = self.room.notified();
            {
                let mut inner = self.lock();
                if inner.records.is_empty() || inner.bytes + cost <= self.limit {
                    inner.push(stream, piece, cost);
                    break;
                }
            }
            room.await;
        }
        self.news.notify_waiters();
    }

    /// One stream is at its end.
    pub fn stream_ended(&self) {
        let mut inner = self.lock();
        inner.open = inner.open.saturating_sub(1);
        drop(inner);
        self.news.notify_waiters();
    }

    pub fn container_exited(&self) {
        self.lock().exited = true;
        self.news.notify_waiters();
    }

    /// Nothing more will come, whatever the streams say: the container is being deleted.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.open = 0;
        inner.exited = true;
        drop(inner);
        self.news.notify_waiters();
    }

    /// Makes the caller the reader in place of any other.
    pub fn take_over(&self) -> Ticket {
        let mut inner = self.lock();
        inner.reader += 1;
        let ticket = Ticket(inner.reader);
        drop(inner);
        self.news.notify_waiters();
        ticket
    }

    /// Forgets everything up to `seq`.
    ///
    /// # Errors
    /// `OutOfRange` when there is no such record yet.
    pub fn acknowledge(&self, seq: u64) -> Result<()> {
        let mut inner = self.lock();
        if seq > inner.last {
            return Err(AgentError::OutOfRange(format!(
                "record {seq} does not exist: the last one is {}",
                inner.last
            )));
        }
        while inner.records.front().is_some_and(|record| record.seq <= seq) {
            if let Some(record) = inner.records.pop_front() {
                inner.bytes = inner.bytes.saturating_sub(record.data.len() + OVERHEAD);
            }
        }
        drop(inner);
        self.room.notify_waiters();
        Ok(())
    }

    /// The first record after `seq`, when there is one.
    pub async fn next(&self, ticket: Ticket, seq: u64) -> Next {
        loop {
            let news = self.news.notified();
            if let Some(next) = self.lock().next(ticket, seq) {
                return next;
            }
            news.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn push(&mut self, stream: Stream, piece: Piece, cost: usize) {
        self.last += 1;
        self.bytes += cost;
        self.records.push_back(OutputRecord {
            seq: self.last,
            stream: stream.into(),
            time_unix_ns: piece.time,
            partial: piece.partial,
            data: piece.data,
        });
    }

    fn next(&self, ticket: Ticket, seq: u64) -> Option<Next> {
        if ticket.0 != self.reader {
            return Some(Next::Replaced);
        }
        // Numbers have no gaps, so the place of a record follows from the first one's.
        let first = self.records.front().map_or(self.last + 1, |record| record.seq);
        let index = usize::try_from((seq + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        if let Some(record) = self.records.get(index) {
            return Some(Next::Record(record.clone()));
        }
        (self.open == 0 && self.exited).then_some(Next::End)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn piece(data: &[u8]) -> Piece {
        Piece { time: 0, data: data.to_vec(), partial: false }
    }

    fn seq(next: Next) -> u64 {
        match next {
            Next::Record(record) => record.seq,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn records_stay_until_acknowledged() {
        let buffer = OutputBuffer::new(0, 1);
        for _ in 0..3 {
            buffer.push(Stream::Stdout, piece(b"x")).await;
        }
        let first = buffer.take_over();
        assert_eq!(seq(buffer.next(first, 0).await), 1);
        buffer.acknowledge(1).unwrap();
        let second = buffer.take_over();
        assert_eq!(buffer.next(first, 1).await, Next::Replaced);
        assert_eq!(seq(buffer.next(second, 0).await), 2, "the first that was not acknowledged");
        assert_eq!(seq(buffer.next(second, 2).await), 3);
        assert!(matches!(buffer.acknowledge(4), Err(AgentError::OutOfRange(_))));
    }

    #[tokio::test]
    async fn a_full_buffer_waits_for_acknowledgement() {
        let buffer = OutputBuffer::new(OVERHEAD + 10, 1);
        buffer.push(Stream::Stdout, piece(b"0123456789")).await;
        let mut second = Box::pin(buffer.push(Stream::Stderr, piece(b"x")));
        assert!(timeout(Duration::from_millis(20), &mut second).await.is_err());
        buffer.acknowledge(1).unwrap();
        timeout(Duration::from_secs(5), second).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_needs_the_exit_and_the_streams_end() {
        let buffer = OutputBuffer::new(0, 1);
        let ticket = buffer.take_over();
        buffer.push(Stream::Stdout, piece(b"x")).await;
        buffer.stream_ended();
        assert_eq!(seq(buffer.next(ticket, 0).await), 1);
        let mut next = Box::pin(buffer.next(ticket, 1));
        assert!(timeout(Duration::from_millis(20), &mut next).await.is_err());
        buffer.container_exited();
        assert_eq!(timeout(Duration::from_secs(5), next).await.unwrap(), Next::End);
    }
}
