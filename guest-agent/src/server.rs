//! Listens and answers.

use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use tonic::transport::Server;
use tonic::transport::server::Router;

use crate::agent::Agent;
use crate::error::{AgentError, Context, Result};
use crate::{clock, console, rpc};

/// What a client may send in one call before it is read: input that nobody takes waits here.
const STREAM_WINDOW: u32 = 128 * 1024;
/// The same for a whole connection. Many times larger, so that calls that wait do not hold up the others.
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Serves the host of this virtual machine. Returns only with an error.
///
/// # Errors
/// When the port cannot be had or the listener breaks.
pub async fn serve_vsock(agent: Arc<Agent>, port: u32) -> Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .context(|| format!("listen on vsock port {port}"))?;
    announce();
    ended(router(agent).serve_with_incoming(listener.incoming()).await)
}

/// Serves whoever may open the socket. Returns only with an error.
///
/// # Errors
/// When the socket cannot be made or breaks.
pub async fn serve_unix(agent: Arc<Agent>, path: &Path) -> Result<()> {
    let listener = listen(path).context(|| format!("listen on {}", path.display()))?;
    announce();
    ended(router(agent).serve_with_incoming(UnixListenerStream::new(listener)).await)
}

/// Makes a socket that whoever sees it can connect to: it gets its name when it listens. One left behind by an earlier
/// process is replaced.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let unnamed = path.with_extension("new");
    let _ = std::fs::remove_file(&unnamed);
    let listener = UnixListener::bind(&unnamed)?;
    std::fs::rename(&unnamed, path)?;
    Ok(listener)
}

fn router(agent: Arc<Agent>) -> Router {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .add_service(rpc::server(agent))
}

/// The one line the host may wait for.
fn announce() {
    console::line(&format!("ready uptime_us={}", clock::uptime_us()));
}

fn ended(outcome: std::result::Result<(), tonic::transport::Error>) -> Result<()> {
    let text = outcome.err().map_or("it closed".into(), |error| error.to_string());
    Err(AgentError::Internal(format!("the listener ended: {text}")))
}
