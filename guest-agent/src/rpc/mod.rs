//! The service: one verb a file, and here the table of them.

mod attach;
mod create_container;
mod delete_container;
mod events;
mod exec;
mod hello;
mod incoming;
mod list_containers;
mod online_cpus;
mod port_forward;
pub mod prepare;
mod read_output;
mod setup_sandbox;
mod shutdown;
mod signal_container;
pub mod start_container;
mod stats;
#[cfg(test)]
mod tests;
mod update_container;

use std::future::Future;
use std::sync::Arc;

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::agent::Agent;
use crate::error::{AgentError, Result};
use crate::proto::agent_server::{Agent as Rpc, AgentServer};
use crate::proto::{
    AttachRequest, AttachResponse, ContainerState, CreateContainerRequest, CreateContainerResponse,
    DeleteContainerRequest, DeleteContainerResponse, EventsRequest, ExecRequest, ExecResponse, HelloRequest,
    HelloResponse, ListContainersRequest, ListContainersResponse, OnlineCpusRequest, OnlineCpusResponse,
    OutputRecord, PortForwardRequest, PortForwardResponse, PrepareRequest, PrepareResponse,
    ReadOutputRequest, SetupSandboxRequest, SetupSandboxResponse, ShutdownRequest, ShutdownResponse,
    SignalContainerRequest, SignalContainerResponse, StartContainerRequest, StartContainerResponse,
    StatsRequest, StatsResponse, UpdateContainerRequest, UpdateContainerResponse,
};

/// An OCI spec with everything in it is far smaller.
const LARGEST_MESSAGE: usize = 16 * 1024 * 1024;

/// The version of `agent.proto` spoken here.
const PROTOCOL: u32 = 1;

pub struct Service(Arc<Agent>);

pub fn server(agent: Arc<Agent>) -> AgentServer<Service> {
    AgentServer::new(Service(agent))
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_MESSAGE)
}

/// Runs a call that changes something to its end, even if the caller goes away: half-made is worse than made.
async fn to_the_end<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> std::result::Result<Response<T>, Status> {
    match tokio::spawn(call).await {
        Ok(result) => Ok(Response::new(result?)),
        Err(error) => Err(AgentError::Internal(format!("the call broke off: {error}")).into()),
    }
}

type Answer<T> = std::result::Result<Response<T>, Status>;
type Answers<T> = ReceiverStream<std::result::Result<T, Status>>;

#[tonic::async_trait]
impl Rpc for Service {
    type EventsStream = Answers<ContainerState>;
    type ReadOutputStream = Answers<OutputRecord>;
    type ExecStream = Answers<ExecResponse>;
    type AttachStream = Answers<AttachResponse>;
    type PortForwardStream = Answers<PortForwardResponse>;

    async fn hello(&self, request: Request<HelloRequest>) -> Answer<HelloResponse> {
        Ok(Response::new(hello::call(&self.0, request.get_ref())))
    }

    async fn setup_sandbox(&self, request: Request<SetupSandboxRequest>) -> Answer<SetupSandboxResponse> {
        to_the_end(setup_sandbox::call(self.0.clone(), request.into_inner())).await
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Answer<PrepareResponse> {
        to_the_end(prepare::call(self.0.clone(), request.into_inner())).await
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        to_the_end(create_container::call(self.0.clone(), request.into_inner())).await
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        to_the_end(start_container::call(self.0.clone(), request.into_inner())).await
    }

    async fn signal_container(
        &self,
        request: Request<SignalContainerRequest>,
    ) -> Answer<SignalContainerResponse> {
        Ok(Response::new(signal_container::call(&self.0, request.get_ref())?))
    }

    async fn delete_container(
        &self,
        request: Request<DeleteContainerRequest>,
    ) -> Answer<DeleteContainerResponse> {
        to_the_end(delete_container::call(self.0.clone(), request.into_inner())).await
    }

    async fn list_containers(&self, _: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        Ok(Response::new(list_containers::call(&self.0)))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Answer<Self::EventsStream> {
        Ok(Response::new(events::call(&self.0)))
    }

    async fn read_output(
        &self,
        request: Request<Streaming<ReadOutputRequest>>,
    ) -> Answer<Self::ReadOutputStream> {
        Ok(Response::new(read_output::call(&self.0, request.into_inner()).await?))
    }

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Answer<Self::ExecStream> {
        Ok(Response::new(exec::call(&self.0, request.into_inner()).await?))
    }

    async fn attach(&self, request: Request<Streaming<AttachRequest>>) -> Answer<Self::AttachStream> {
        Ok(Response::new(attach::call(&self.0, request.into_inner()).await?))
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<PortForwardRequest>>,
    ) -> Answer<Self::PortForwardStream> {
        Ok(Response::new(port_forward::call(request.into_inner()).await?))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Answer<StatsResponse> {
        Ok(Response::new(stats::call(&self.0, request.get_ref()).await?))
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Answer<UpdateContainerResponse> {
        to_the_end(update_container::call(self.0.clone(), request.into_inner())).await
    }

    async fn online_cpus(&self, request: Request<OnlineCpusRequest>) -> Answer<OnlineCpusResponse> {
        Ok(Response::new(online_cpus::call(request.get_ref()).await?))
    }

    async fn shutdown(&self, request: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        Ok(Response::new(shutdown::call(&self.0, request.get_ref())))
    }
}
