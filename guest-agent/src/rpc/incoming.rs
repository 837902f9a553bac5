//! What a client says in a conversation that has input among other things.

use std::future::pending;

use tokio::sync::mpsc;
use tonic::Streaming;

/// Nothing is read while the input before has not been taken: so a slow process slows the client down. (What follows
/// input waits behind it; cancelling does not.)
pub struct Incoming<M> {
    requests: Option<Streaming<M>>,
    input: Option<mpsc::Sender<Vec<u8>>>,
}

pub enum Said<M> {
    Message(M),
    /// It says no more; that is no break.
    Done,
    /// It has broken off.
    Broken,
}

impl<M> Incoming<M> {
    /// `input` is where input goes; without it, input is thrown away.
    pub fn new(requests: Streaming<M>, input: Option<mpsc::Sender<Vec<u8>>>) -> Self {
        Self { requests: Some(requests), input }
    }

    /// The next message; nothing after `Done` or `Broken`. Safe to cancel: no message is lost.
    pub async fn next(&mut self) -> Said<M> {
        if let Some(input) = &self.input {
            // The error is that nobody reads any more; then input is thrown away.
            if input.reserve().await.is_err() {
                self.input = None;
            }
        }
        let Some(requests) = &mut self.requests else { return pending().await };
        let said = match requests.message().await {
            Ok(Some(message)) => return Said::Message(message),
            Ok(None) => Said::Done,
            Err(_) => Said::Broken,
        };
        self.requests = None;
        said
    }

    /// Passes input on. There is room for it: `next` has seen to that, and nobody else sends.
    pub async fn pass(&mut self, bytes: Vec<u8>) {
        if let Some(input) = &self.input
            && !bytes.is_empty()
        {
            let _ = input.send(bytes).await;
        }
    }

    /// No more input comes.
    pub fn close_input(&mut self) {
        self.input = None;
    }
}
