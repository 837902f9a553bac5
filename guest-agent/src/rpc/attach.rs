use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::incoming::{Incoming, Said};
use crate::agent::Agent;
use crate::container::Container;
use crate::error::AgentError;
use crate::io::taps::Listener;
use crate::proto::attach_ended::Cause;
use crate::proto::attach_request::Message as Ask;
use crate::proto::attach_response::Message;
use crate::proto::container_state::Phase;
use crate::proto::output_record::Stream;
use crate::proto::{AttachEnded, AttachRequest, AttachResponse, AttachStart};
use crate::validate;

/// Answers on their way.
const AHEAD: usize = 4;
/// What comes within this time of the last output still belongs to a session that is over otherwise.
const SILENCE: Duration = Duration::from_millis(500);

type Answers = mpsc::Sender<Result<AttachResponse, Status>>;

pub async fn call(
    agent: &Arc<Agent>,
    mut requests: Streaming<AttachRequest>,
) -> Result<ReceiverStream<Result<AttachResponse, Status>>, Status> {
    let start = match requests.message().await?.and_then(|request| request.message) {
        Some(Ask::Start(start)) => start,
        _ => return Err(AgentError::InvalidArgument("the first message has to be `start`".into()).into()),
    };
    validate::id("container id", &start.container_id)?;
    let container = agent.registry.get(&start.container_id)?;
    if container.phase() == Phase::Exited {
        container.require(Phase::Running)?;
    }
    if let Some(size) = &start.size {
        container.streams.resize(size);
    }
    // Listens before this call returns, so that the caller misses nothing of what it does next.
    let listener = container.taps.listen(start.stdout, start.stderr);
    let (answers, stream) = mpsc::channel(AHEAD);
    tokio::spawn(converse(container, start, listener, requests, answers));
    Ok(ReceiverStream::new(stream))
}

async fn converse(
    container: Arc<Container>,
    start: AttachStart,
    listener: Listener,
    requests: Streaming<AttachRequest>,
    answers: Answers,
) {
    let _ = reply(&answers, Message::Started(true)).await;
    let mut input = Incoming::new(requests, if start.stdin { feed(&container) } else { None });
    let (hurry, hurried) = watch::channel(false);
    let mut output = tokio::spawn(forward(container.clone(), listener, answers.clone(), hurried));
    loop {
        tokio::select! {
            biased;
            _ = &mut output => break,
            () = answers.closed() => break,
            said = input.next() => match said {
                Said::Message(AttachRequest { message: Some(ask) }) => match ask {
                    Ask::Stdin(bytes) => input.pass(bytes).await,
                    Ask::StdinClosed(true) => end_input(&container, &start, &mut input, &hurry),
                    Ask::Resize(size) => container.streams.resize(&size),
                    Ask::StdinClosed(false) | Ask::Start(_) => {}
                },
                Said::Message(_) => {}
                Said::Done => end_input(&container, &start, &mut input, &hurry),
                Said::Broken => break,
            }
        }
    }
    // A client that is gone is done with its input, too. What it has sent is still written.
    if start.stdin && container.streams.ends_with_client() {
        container.streams.close_input();
    }
    output.abort();
}

/// The client's input has ended: with it the container's, or else the session, after what is still being said.
fn end_input(
    container: &Container,
    start: &AttachStart,
    input: &mut Incoming<AttachRequest>,
    hurry: &watch::Sender<bool>,
) {
    input.close_input();
    if !start.stdin {
        return;
    }
    if container.streams.ends_with_client() {
        container.streams.close_input();
    } else {
        hurry.send_replace(true);
    }
}

/// Starts writing input to the container, as long as that lives. The end of the channel leaves its input open.
fn feed(container: &Arc<Container>) -> Option<mpsc::Sender<Vec<u8>>> {
    let file = container.streams.input()?;
    let container = container.clone();
    let (sender, mut chunks) = mpsc::channel::<Vec<u8>>(1);
    tokio::spawn(async move {
        while let Some(chunk) = chunks.recv().await {
            tokio::select! {
                written = file.write_all(&chunk) => if written.is_err() { return },
                () = container.wait_exited() => return,
            }
        }
    });
    Some(sender)
}

/// Sends output until there is no more, and says why.
async fn forward(
    container: Arc<Container>,
    mut listener: Listener,
    answers: Answers,
    mut hurried: watch::Receiver<bool>,
) {
    let cause = loop {
        let chunk = tokio::select! {
            biased;
            chunk = listener.next() => chunk,
            // Someone in the background may hold the streams open after the container's end.
            () = silence_after(container.wait_exited()) => None,
            () = silence_after(told(&mut hurried)) => break Cause::InputEnded,
        };
        let Some(chunk) = chunk else {
            break if listener.was_dropped() { Cause::TooSlow } else { Cause::OutputEnded };
        };
        let message = match chunk.stream {
            Stream::Stdout => Message::Stdout(chunk.data),
            Stream::Stderr => Message::Stderr(chunk.data),
        };
        if reply(&answers, message).await.is_err() {
            return;
        }
    };
    if cause == Cause::OutputEnded {
        // So that who is told of the end finds the exit known.
        container.wait_exited().await;
    }
    let _ = reply(&answers, Message::Ended(AttachEnded { cause: cause.into() })).await;
}

async fn told(hurried: &mut watch::Receiver<bool>) {
    if hurried.wait_for(|hurried| *hurried).await.is_err() {
        pending().await
    }
}

async fn silence_after(event: impl Future<Output = ()>) {
    event.await;
    tokio::time::sleep(SILENCE).await;
}

async fn reply(answers: &Answers, message: Message) -> Result<(), ()> {
    answers.send(Ok(AttachResponse { message: Some(message) })).await.map_err(|_| ())
}
