//! Listens and answers.

use std::future::{Future, ready};
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;
use tonic::transport::server::Router;

use crate::agent::Agent;
use crate::error::{AgentError, Context, Result};
use crate::init::cmdline::CommandLine;
use crate::proto::PrepareRequest;
use crate::rpc::prepare;
use crate::storage::uevent::Uevents;
use crate::{clock, console, rpc};

/// What a client may send in one call before it is read: input that nobody takes waits here.
const STREAM_WINDOW: u32 = 128 * 1024;
/// The same for a whole connection. Many times larger, so that calls that wait do not hold up the others.
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Serves the host of this virtual machine. Returns only with an error.
///
/// # Errors
/// When the port cannot be had or the listener breaks.
pub async fn serve_vsock(agent: Arc<Agent>, options: CommandLine) -> Result<()> {
    let port = options.port;
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .context(|| format!("listen on vsock port {port}"))?;
    if !has_vsock() {
        tokio::spawn(until_plugged()?);
        prepare_template(&agent, options.scratch).await;
    }
    announce("ready");
    let of_host = listener.incoming().try_filter(|stream| ready(is_host(stream)));
    ended(router(agent).serve_with_incoming(of_host).await)
}

/// A machine without a vsock device is one whose memory is kept for others to start from: the host plugs one into each of
/// these.
fn has_vsock() -> bool {
    vsock::get_local_cid().is_ok_and(is_of_guest)
}

/// Says so when the machine gets a vsock device. It listens from now on.
fn until_plugged() -> Result<impl Future<Output = ()>> {
    let events = Uevents::listen().context(|| "listen to the kernel's device events")?;
    Ok(async move {
        while !has_vsock() {
            if let Err(error) = events.vsock_bound().await {
                return log::warn!("wait for a vsock device: {error}");
            }
        }
        announce("connected");
    })
}

/// What every machine that starts from this one's memory would do otherwise.
async fn prepare_template(agent: &Arc<Agent>, scratch_serial: String) {
    let request = PrepareRequest { scratch_serial, ..Default::default() };
    if let Err(error) = prepare::call(agent.clone(), request).await {
        log::warn!("prepare: {error}");
    }
}

/// The numbers below are those of the hypervisor, of a machine's way to itself and of the host; the last one is nobody's.
fn is_of_guest(cid: u32) -> bool {
    cid > VMADDR_CID_HOST && cid != VMADDR_CID_ANY
}

/// Some kernels let a machine's processes, and so its containers, reach its own ports. None of them may give orders.
fn is_host(stream: &VsockStream) -> bool {
    stream.peer_addr().is_ok_and(|peer| peer.cid() == VMADDR_CID_HOST)
}

/// Serves whoever may open the socket. Returns only with an error.
///
/// # Errors
/// When the socket cannot be made or breaks.
pub async fn serve_unix(agent: Arc<Agent>, path: &Path) -> Result<()> {
    let listener = listen(path).context(|| format!("listen on {}", path.display()))?;
    announce("ready");
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

/// The lines the host may wait for.
fn announce(what: &str) {
    console::line(&format!("{what} uptime_us={}", clock::uptime_us()));
}

fn ended(outcome: std::result::Result<(), tonic::transport::Error>) -> Result<()> {
    let text = outcome.err().map_or("it closed".into(), |error| error.to_string());
    Err(AgentError::Internal(format!("the listener ended: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_guests() {
        assert!([3, 16384].into_iter().all(is_of_guest));
        assert!(![0, 1, 2, u32::MAX].into_iter().any(is_of_guest));
    }
}
