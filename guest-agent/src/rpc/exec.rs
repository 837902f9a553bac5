use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::incoming::{Incoming, Said};
use crate::agent::Agent;
use crate::container::Container;
use crate::container::exec::{self, Answers, Refusal, Session};
use crate::error::{AgentError, Result};
use crate::proto::container_state::Phase;
use crate::proto::exec_request::Message as Ask;
use crate::proto::exec_response::Message;
use crate::proto::{ExecExited, ExecRequest, ExecResponse, ExecStart};
use crate::sys::ExitStatus;
use crate::validate;

/// Answers on their way.
const AHEAD: usize = 4;

pub async fn call(
    agent: &Arc<Agent>,
    mut requests: Streaming<ExecRequest>,
) -> std::result::Result<ReceiverStream<std::result::Result<ExecResponse, Status>>, Status> {
    let start = match requests.message().await?.and_then(|request| request.message) {
        Some(Ask::Start(start)) => start,
        _ => return Err(AgentError::InvalidArgument("the first message has to be `start`".into()).into()),
    };
    validate::id("container id", &start.container_id)?;
    if start.args.is_empty() {
        return Err(AgentError::InvalidArgument("nothing to run: args is empty".into()).into());
    }
    let container = agent.registry.get(&start.container_id)?;
    container.require(Phase::Running)?;
    let (answers, stream) = mpsc::channel(AHEAD);
    // Of its own, so that a client that goes away cannot leave a process half started.
    tokio::spawn(serve(agent.clone(), container, start, requests, answers));
    Ok(ReceiverStream::new(stream))
}

async fn serve(
    agent: Arc<Agent>,
    container: Arc<Container>,
    start: ExecStart,
    requests: Streaming<ExecRequest>,
    answers: Answers,
) {
    let outcome = match exec::start(&agent, &container, &start).await {
        Ok(session) => converse(session, &start, requests, &answers).await,
        Err(Refusal::Call(error)) => Err(error),
        Err(Refusal::Program(error)) => match container.require(Phase::Running) {
            Err(ended_meanwhile) => Err(ended_meanwhile),
            Ok(()) => {
                Ok(ExecExited { exit_code: error.exit_code(), timed_out: false, error: error.to_string() })
            }
        },
    };
    let _ = match outcome {
        Ok(exited) => exec::reply(&answers, Message::Exited(exited)).await,
        Err(error) => answers.send(Err(error.into())).await.map_err(|_| AgentError::Aborted(String::new())),
    };
}

async fn converse(
    mut session: Session,
    start: &ExecStart,
    requests: Streaming<ExecRequest>,
    answers: &Answers,
) -> Result<ExecExited> {
    let started = exec::reply(answers, Message::Started(true)).await;
    if started.is_err() {
        session.kill();
    }
    let (exited, told) = watch::channel(false);
    let drains = session.drain(answers, &told);
    let mut input = Incoming::new(requests, session.feed());
    let mut timed_out = false;
    let mut gone = false;
    let mut deadline = pin!(deadline(start.timeout_ms));
    let status = loop {
        tokio::select! {
            biased;
            status = &mut session.exit => break status,
            () = &mut deadline, if !timed_out => {
                timed_out = true;
                session.kill();
            }
            () = answers.closed(), if !gone => {
                gone = true;
                session.kill();
            }
            said = input.next() => match said {
                Said::Message(ExecRequest { message: Some(ask) }) => obey(ask, &mut input, &session).await,
                Said::Message(_) => {}
                Said::Done => input.close_input(),
                Said::Broken => session.kill(),
            }
        }
    };
    drop(input);
    exited.send_replace(true);
    exec::finish(drains, answers).await;
    let exit_code = status.map_or(255, ExitStatus::code);
    Ok(ExecExited { exit_code, timed_out, error: String::new() })
}

async fn deadline(timeout_ms: u64) {
    match timeout_ms {
        0 => pending().await,
        milliseconds => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
    }
}

async fn obey(ask: Ask, input: &mut Incoming<ExecRequest>, session: &Session) {
    match ask {
        Ask::Stdin(bytes) => input.pass(bytes).await,
        Ask::StdinClosed(true) => input.close_input(),
        Ask::Resize(size) => session.resize(&size),
        Ask::Signal(number) => {
            if let Ok(signal) = validate::signal(number) {
                session.signal(signal);
            }
        }
        Ask::StdinClosed(false) | Ask::Start(_) => {}
    }
}
