//! Moves a container's output from its pipes to its buffer.

use std::sync::Arc;

use super::buffer::OutputBuffer;
use super::file::AsyncFile;
use super::lines::Cutter;
use super::taps::Taps;
use crate::clock;
use crate::proto::output_record::Stream;

/// What is read at once. It is held beside the buffer, so it is kept small.
const CHUNK: usize = 16 * 1024;

/// Reads until the stream's end. Reading stops while the buffer is full.
pub async fn run(source: Arc<AsyncFile>, stream: Stream, buffer: Arc<OutputBuffer>, taps: Arc<Taps>) {
    let mut cutter = Cutter::default();
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = match source.read(&mut chunk).await {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => {
                log::warn!("read a container's {stream:?}: {error}");
                break;
            }
        };
        let now = clock::unix_ns();
        let mut input = chunk.get(..count).unwrap_or_default();
        taps.pass(stream, input).await;
        while let Some(piece) = cutter.next(&mut input, now) {
            buffer.push(stream, piece).await;
        }
    }
    taps.stream_ended();
    if let Some(rest) = cutter.finish() {
        buffer.push(stream, rest).await;
    }
    buffer.stream_ended();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::io::buffer::Next;
    use crate::io::file::pipe;

    #[tokio::test]
    async fn lines_arrive_and_the_stream_ends() {
        let (read_end, write_end) = pipe().unwrap();
        let buffer = Arc::new(OutputBuffer::new(0, 1));
        nix::unistd::write(&write_end, b"one\ntwo").unwrap();
        drop(write_end);
        let taps = Arc::new(Taps::new(1, Duration::from_secs(1)));
        let mut listener = taps.listen(true, true);
        run(Arc::new(AsyncFile::new(read_end).unwrap()), Stream::Stderr, buffer.clone(), taps).await;
        assert_eq!(listener.next().await.map(|chunk| chunk.data), Some(b"one\ntwo".to_vec()));
        assert_eq!(listener.next().await, None);
        buffer.container_exited();
        let ticket = buffer.take_over();
        let mut texts = Vec::new();
        while let Next::Record(record) = buffer.next(ticket, texts.len() as u64).await {
            assert_eq!(record.stream(), Stream::Stderr);
            texts.push(record.data);
        }
        assert_eq!(texts, [b"one", b"two"]);
    }
}
