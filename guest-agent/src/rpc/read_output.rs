use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::agent::Agent;
use crate::error::AgentError;
use crate::io::buffer::{Next, OutputBuffer, Ticket};
use crate::proto::{OutputRecord, ReadOutputRequest};
use crate::validate;

/// Records on their way; they are in the buffer as well, so few is best.
const AHEAD: usize = 16;

type Reader = mpsc::Sender<Result<OutputRecord, Status>>;

pub async fn call(
    agent: &Arc<Agent>,
    mut requests: Streaming<ReadOutputRequest>,
) -> Result<ReceiverStream<Result<OutputRecord, Status>>, Status> {
    let first = requests.message().await?;
    let first = first.ok_or_else(|| AgentError::InvalidArgument("the container is not named".into()))?;
    validate::id("container id", &first.container_id)?;
    let buffer = agent.registry.get(&first.container_id)?.output.clone();
    // The host would not ask for what follows if it did not have what comes before.
    buffer.acknowledge(first.after_seq)?;
    let ticket = buffer.take_over();
    let (reader, stream) = mpsc::channel(AHEAD);
    tokio::spawn(serve(buffer, ticket, first.after_seq, requests, reader));
    Ok(ReceiverStream::new(stream))
}

async fn serve(
    buffer: Arc<OutputBuffer>,
    ticket: Ticket,
    after: u64,
    requests: Streaming<ReadOutputRequest>,
    reader: Reader,
) {
    tokio::select! {
        () = send(&buffer, ticket, after, &reader) => {}
        error = acknowledge(&buffer, requests) => {
            let _ = reader.send(Err(error)).await;
        }
        () = reader.closed() => {}
    }
}

async fn send(buffer: &OutputBuffer, ticket: Ticket, after: u64, reader: &Reader) {
    let mut sent = after;
    loop {
        match buffer.next(ticket, sent).await {
            Next::Record(record) => {
                sent = record.seq;
                if reader.send(Ok(record)).await.is_err() {
                    return;
                }
            }
            Next::End => return,
            Next::Replaced => {
                let replaced = AgentError::Aborted("another reader has taken over".into());
                let _ = reader.send(Err(replaced.into())).await;
                return;
            }
        }
    }
}

/// Takes acknowledgements until one is wrong. A client that has closed its side may still read.
async fn acknowledge(buffer: &OutputBuffer, mut requests: Streaming<ReadOutputRequest>) -> Status {
    loop {
        match requests.message().await {
            Ok(Some(request)) => {
                if let Err(error) = buffer.acknowledge(request.after_seq) {
                    return error.into();
                }
            }
            Ok(None) => std::future::pending().await,
            Err(status) => return status,
        }
    }
}
