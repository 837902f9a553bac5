//! A container's output for those who watch it live, beside the log.
//!
//! Bytes are passed on as they are read, before they are cut into lines: a prompt has no newline. A listener that keeps
//! reading gets everything, since the pump waits for it; one that does not is dropped after a while, since the log
//! waits too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::proto::output_record::Stream;

/// Chunks a listener may be behind.
const AHEAD: usize = 16;

pub struct Taps {
    inner: Mutex<Inner>,
    patience: Duration,
}

struct Inner {
    /// Streams not at their end.
    open: usize,
    taps: Vec<Tap>,
}

#[derive(Clone)]
struct Tap {
    chunks: mpsc::Sender<Chunk>,
    dropped: Arc<AtomicBool>,
    stdout: bool,
    stderr: bool,
}

/// What was read at once.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub stream: Stream,
    pub data: Vec<u8>,
}

/// One who watches. Dropping it ends the watch.
pub struct Listener {
    chunks: mpsc::Receiver<Chunk>,
    dropped: Arc<AtomicBool>,
}

impl Listener {
    /// The next chunk; `None` when no more will come.
    pub async fn next(&mut self) -> Option<Chunk> {
        self.chunks.recv().await
    }

    /// Whether it was too slow to be waited for. It still gets what had been queued for it.
    pub fn was_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Tap {
    fn wants(&self, stream: Stream) -> bool {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }

    fn is(&self, other: &Self) -> bool {
        self.chunks.same_channel(&other.chunks)
    }
}

impl Taps {
    /// For `streams` streams; a listener may take nothing for as long as `patience`.
    pub fn new(streams: usize, patience: Duration) -> Self {
        Self { inner: Mutex::new(Inner { open: streams, taps: Vec::new() }), patience }
    }

    /// Everything that is read from now on.
    pub fn listen(&self, stdout: bool, stderr: bool) -> Listener {
        let (sender, chunks) = mpsc::channel(AHEAD);
        let dropped = Arc::new(AtomicBool::new(false));
        let mut inner = self.lock();
        if inner.open > 0 {
            inner.taps.push(Tap { chunks: sender, dropped: dropped.clone(), stdout, stderr });
        }
        Listener { chunks, dropped }
    }

    /// Hands a chunk to every listener.
    pub async fn pass(&self, stream: Stream, data: &[u8]) {
        let wanting: Vec<Tap> = self.lock().taps.iter().filter(|tap| tap.wants(stream)).cloned().collect();
        for tap in wanting {
            let chunk = Chunk { stream, data: data.to_vec() };
            match timeout(self.patience, tap.chunks.send(chunk)).await {
                Ok(Ok(())) => {}
                Ok(Err(_left)) => self.remove(&tap),
                Err(_) => {
                    tap.dropped.store(true, Ordering::Relaxed);
                    self.remove(&tap);
                }
            }
        }
    }

    /// One stream is at its end.
    pub fn stream_ended(&self) {
        let mut inner = self.lock();
        inner.open = inner.open.saturating_sub(1);
        if inner.open == 0 {
            inner.taps.clear();
        }
    }

    /// Nothing more will come, whatever the streams say.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.open = 0;
        inner.taps.clear();
    }

    fn remove(&self, tap: &Tap) {
        self.lock().taps.retain(|other| !other.is(tap));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn listeners_get_what_they_asked_for_until_the_end() {
        let taps = Taps::new(2, SHORT);
        let (mut all, mut errors) = (taps.listen(true, true), taps.listen(false, true));
        taps.pass(Stream::Stdout, b"a").await;
        taps.pass(Stream::Stderr, b"b").await;
        assert_eq!(all.next().await, Some(Chunk { stream: Stream::Stdout, data: b"a".into() }));
        assert_eq!(all.next().await, Some(Chunk { stream: Stream::Stderr, data: b"b".into() }));
        assert_eq!(errors.next().await, Some(Chunk { stream: Stream::Stderr, data: b"b".into() }));
        taps.stream_ended();
        taps.stream_ended();
        assert_eq!(all.next().await, None);
        assert!(!all.was_dropped());
        assert_eq!(taps.listen(true, true).next().await, None, "too late");
    }

    #[tokio::test]
    async fn one_who_does_not_read_is_dropped_and_one_who_reads_is_not() {
        let taps = Arc::new(Taps::new(1, SHORT));
        let (mut idle, mut busy) = (taps.listen(true, true), taps.listen(true, true));
        let reading = tokio::spawn(async move {
            let mut count = 0;
            while busy.next().await.is_some() {
                count += 1;
            }
            (count, busy.was_dropped())
        });
        for _ in 0..100 {
            taps.pass(Stream::Stdout, b"x").await;
        }
        taps.stream_ended();
        assert_eq!(reading.await.unwrap(), (100, false));
        let mut count = 0;
        while idle.next().await.is_some() {
            count += 1;
        }
        assert_eq!((count, idle.was_dropped()), (AHEAD, true));
    }
}
