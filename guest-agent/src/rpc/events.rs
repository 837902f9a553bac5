use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::agent::Agent;
use crate::proto::ContainerState;

const AHEAD: usize = 16;

type Listener = mpsc::Sender<Result<ContainerState, Status>>;

pub fn call(agent: &Arc<Agent>) -> ReceiverStream<Result<ContainerState, Status>> {
    let (listener, stream) = mpsc::channel(AHEAD);
    // Listens before this call returns, so that the caller misses nothing it does next.
    let changes = agent.registry.listen();
    tokio::spawn(forward(agent.clone(), changes, listener));
    ReceiverStream::new(stream)
}

/// The opening picture, then changes. Ends when the listener has gone.
async fn forward(agent: Arc<Agent>, mut changes: broadcast::Receiver<ContainerState>, listener: Listener) {
    let mut behind = true;
    loop {
        if behind && !send_picture(&agent, &listener).await {
            return;
        }
        let change = tokio::select! {
            change = changes.recv() => change,
            () = listener.closed() => return,
        };
        behind = match change {
            Ok(state) => {
                if listener.send(Ok(state)).await.is_err() {
                    return;
                }
                false
            }
            // Changes were lost on a slow listener: everything as it is now makes up for them.
            Err(RecvError::Lagged(_)) => true,
            Err(RecvError::Closed) => return,
        };
    }
}

async fn send_picture(agent: &Agent, listener: &Listener) -> bool {
    for state in agent.registry.states() {
        if listener.send(Ok(ContainerState { snapshot: true, ..state })).await.is_err() {
            return false;
        }
    }
    true
}
