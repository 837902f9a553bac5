use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::error::{AgentError, Result};
use crate::proto::port_forward_request::Message as Ask;
use crate::proto::port_forward_response::Message;
use crate::proto::{PortForwardRequest, PortForwardResponse};

/// What is sent at once.
const CHUNK: usize = 32 * 1024;
/// Answers on their way.
const AHEAD: usize = 4;
/// Loopback answers at once, unless the listener's backlog is full.
const PATIENCE: Duration = Duration::from_secs(10);

type Answers = mpsc::Sender<std::result::Result<PortForwardResponse, Status>>;

pub async fn call(
    mut requests: Streaming<PortForwardRequest>,
) -> std::result::Result<ReceiverStream<std::result::Result<PortForwardResponse, Status>>, Status> {
    let port = match requests.message().await?.and_then(|request| request.message) {
        Some(Ask::Port(port)) => port,
        _ => return Err(AgentError::InvalidArgument("the first message has to be `port`".into()).into()),
    };
    let port = u16::try_from(port).ok().filter(|port| *port > 0);
    let port =
        port.ok_or_else(|| AgentError::InvalidArgument("the port is not between 1 and 65535".into()))?;
    let connection = connect(port).await?;
    let (answers, stream) = mpsc::channel(AHEAD);
    tokio::spawn(serve(connection, requests, answers));
    Ok(ReceiverStream::new(stream))
}

async fn connect(port: u16) -> Result<TcpStream> {
    let mut reasons = Vec::new();
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        match timeout(PATIENCE, TcpStream::connect((address, port))).await {
            Ok(Ok(connection)) => {
                let _ = connection.set_nodelay(true);
                return Ok(connection);
            }
            Ok(Err(error)) => reasons.push(format!("{address}: {}", plain(&error))),
            Err(_) => reasons.push(format!("{address}: no answer within {} s", PATIENCE.as_secs())),
        }
    }
    Err(AgentError::FailedPrecondition(format!("connect to port {port}: {}", reasons.join("; "))))
}

fn plain(error: &io::Error) -> String {
    let errno = error.raw_os_error().map(nix::errno::Errno::from_raw);
    errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_ascii_lowercase())
}

async fn serve(connection: TcpStream, requests: Streaming<PortForwardRequest>, answers: Answers) {
    let (reader, writer) = connection.into_split();
    let both = async { tokio::try_join!(download(reader, &answers), upload(writer, requests)) };
    let outcome = tokio::select! {
        outcome = both => outcome,
        () = answers.closed() => return,
    };
    if let Err(error) = outcome {
        let _ = answers.send(Err(error.into())).await;
    }
}

async fn download(mut reader: OwnedReadHalf, answers: &Answers) -> Result<()> {
    send(answers, Message::Connected(true)).await?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = reader.read(&mut buffer).await.map_err(|error| broken(&error))?;
        match buffer.get(..count) {
            Some(data) if !data.is_empty() => send(answers, Message::Data(data.to_vec())).await?,
            _ => return send(answers, Message::Closed(true)).await,
        }
    }
}

async fn upload(mut writer: OwnedWriteHalf, mut requests: Streaming<PortForwardRequest>) -> Result<()> {
    loop {
        let message = match requests.message().await {
            Ok(Some(request)) => request.message,
            Ok(None) => Some(Ask::Closed(true)),
            Err(_) => return Err(gone()),
        };
        match message {
            Some(Ask::Data(data)) => writer.write_all(&data).await.map_err(|error| broken(&error))?,
            Some(Ask::Closed(true)) => {
                // The error is that the other side has closed already.
                let _ = writer.shutdown().await;
                return Ok(());
            }
            _ => {}
        }
    }
}

async fn send(answers: &Answers, message: Message) -> Result<()> {
    answers.send(Ok(PortForwardResponse { message: Some(message) })).await.map_err(|_| gone())
}

fn gone() -> AgentError {
    AgentError::Aborted("the client has gone".into())
}

fn broken(error: &io::Error) -> AgentError {
    AgentError::Aborted(plain(error))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn loopback_of_either_family() {
        for address in ["127.0.0.1", "::1"] {
            let listener = TcpListener::bind((address, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let connection = connect(port).await.unwrap();
            assert_eq!(connection.peer_addr().unwrap().ip().to_string(), address);
        }
    }

    #[tokio::test]
    async fn a_refusal_names_port_and_reason() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let error = connect(port).await.unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("connect to port {port}: 127.0.0.1: connection refused; ")),
            "{error}"
        );
    }
}
