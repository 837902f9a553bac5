//! The verbs together, on a fake OCI runtime and a fake kernel's mounts.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::config::{Config, Mode, Paths};
use crate::container::runtime::RuntimeError;
use crate::container::runtime::fake::RecordingRuntime;
use crate::init::reaper::Reaper;
use crate::proto::container_state::Phase;
use crate::proto::{Layer, PidMode};
use crate::storage::mounter::fake::RecordingMounter;

struct Fixture {
    _directory: TempDir,
    agent: Arc<Agent>,
    runtime: Arc<RecordingRuntime>,
    mounter: Arc<RecordingMounter>,
}

impl Fixture {
    fn new(runtime: RecordingRuntime) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config =
            Config { mode: Mode::Host, paths: Paths::new(directory.path(), "no-crun"), cgroup: "x".into() };
        let (runtime, mounter) = (Arc::new(runtime), Arc::new(RecordingMounter::default()));
        let reaper = Arc::new(Reaper::default());
        let agent = Agent::with(config, reaper, runtime.clone(), mounter.clone(), 7).unwrap();
        Self { _directory: directory, agent: Arc::new(agent), runtime, mounter }
    }

    async fn set_up(&self) -> Result<SetupSandboxResponse> {
        let request =
            SetupSandboxRequest { sandbox_id: "pod".into(), hostname: "h".into(), ..Default::default() };
        setup_sandbox::call(self.agent.clone(), request).await
    }

    async fn create(
        &self,
        change: impl FnOnce(&mut CreateContainerRequest),
    ) -> Result<CreateContainerResponse> {
        let oci_spec = br#"{"process": {"args": ["x"]}}"#.to_vec();
        let mut request = CreateContainerRequest { id: "c1".into(), oci_spec, ..Default::default() };
        change(&mut request);
        create_container::call(self.agent.clone(), request).await
    }

    async fn delete(&self) -> Result<DeleteContainerResponse> {
        delete_container::call(self.agent.clone(), DeleteContainerRequest { id: "c1".into() }).await
    }

    fn state(&self) -> ContainerState {
        list_containers::call(&self.agent).containers.remove(0)
    }
}

#[tokio::test]
async fn hello_tells_the_sandbox_once_it_is_set_up() {
    let fixture = Fixture::new(RecordingRuntime::default());
    let hello = |fixture: &Fixture| hello::call(&fixture.agent, &HelloRequest { protocol: 1 });
    assert_eq!((hello(&fixture).sandbox_id.as_str(), hello(&fixture).agent_started_us), ("", 7));
    fixture.set_up().await.unwrap();
    assert_eq!(hello(&fixture).sandbox_id, "pod");
    let mounts = fixture.mounter.calls().len();
    fixture.set_up().await.unwrap();
    assert_eq!(fixture.mounter.calls().len(), mounts, "again is success, and does nothing");
}

#[tokio::test]
async fn another_sandbox_is_refused() {
    let fixture = Fixture::new(RecordingRuntime::default());
    fixture.set_up().await.unwrap();
    let request = SetupSandboxRequest { sandbox_id: "other".into(), ..Default::default() };
    let error = setup_sandbox::call(fixture.agent.clone(), request).await.unwrap_err();
    assert!(matches!(error, AgentError::FailedPrecondition(_)));
}

#[tokio::test]
async fn what_cannot_be_created() {
    let fixture = Fixture::new(RecordingRuntime::default());
    assert!(matches!(fixture.create(|_| {}).await, Err(AgentError::FailedPrecondition(_))), "no sandbox yet");
    fixture.set_up().await.unwrap();
    let bad_id = fixture.create(|request| request.id = "../x".into()).await;
    assert!(matches!(bad_id, Err(AgentError::InvalidArgument(_))));
    let file = Layer { path: "/image".into(), ..Default::default() };
    let from_file = fixture.create(|request| request.layers = vec![file]).await;
    assert!(matches!(from_file, Err(AgentError::InvalidArgument(_))), "no such directory");
    let no_namespace = fixture.create(|request| request.set_pid_mode(PidMode::Pod)).await;
    assert!(matches!(no_namespace, Err(AgentError::FailedPrecondition(_))));
    let no_target = fixture.create(|request| request.set_pid_mode(PidMode::Target)).await;
    assert!(matches!(no_target, Err(AgentError::NotFound(_))));
    let no_user = fixture.create(|request| request.user = "nobody".into()).await.unwrap_err();
    assert_eq!(no_user.to_string(), "user \"nobody\" is not in the image's /etc/passwd");
    assert!(!fixture.agent.config.paths.bundle("c1").exists(), "nothing is left behind");
}

#[tokio::test]
async fn a_program_that_does_not_exist_leaves_nothing_behind() {
    let missing = RuntimeError::NotFound { program: "x".into() };
    let fixture = Fixture::new(RecordingRuntime { fail: Some(missing), ..Default::default() });
    fixture.set_up().await.unwrap();
    let error = fixture.create(|_| {}).await.unwrap_err();
    assert!(
        matches!(&error, AgentError::InvalidArgument(text) if text.contains("executable file not found"))
    );
    assert!(list_containers::call(&fixture.agent).containers.is_empty());
    let overlay = |verb: &str| {
        fixture.mounter.calls().iter().any(|call| call.starts_with(verb) && call.contains("rootfs"))
    };
    assert!(overlay("mount") && overlay("unmount"));
}

#[tokio::test]
async fn the_life_of_a_container() {
    // The agent's reaper waits for it.
    #[expect(clippy::zombie_processes)]
    let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
    let fixture = Fixture::new(RecordingRuntime { pid: child.id().cast_signed(), ..Default::default() });
    let reaper = fixture.agent.reaper.clone();
    tokio::spawn(async move { reaper.run().await });
    fixture.set_up().await.unwrap();
    fixture.create(|_| {}).await.unwrap();
    assert!(matches!(fixture.create(|_| {}).await, Err(AgentError::AlreadyExists(_))));
    assert_eq!(fixture.state().phase(), Phase::Created);

    let mut changes = fixture.agent.registry.listen();
    let start = || start_container::call(fixture.agent.clone(), StartContainerRequest { id: "c1".into() });
    start().await.unwrap();
    assert_eq!(changes.recv().await.unwrap().phase(), Phase::Running);
    assert!(matches!(start().await, Err(AgentError::FailedPrecondition(_))));

    let term = SignalContainerRequest { id: "c1".into(), signal: 15, all: false };
    signal_container::call(&fixture.agent, &term).unwrap();
    let end = timeout(Duration::from_secs(10), changes.recv()).await.unwrap().unwrap();
    assert_eq!((end.phase(), end.exit_code, end.oom_killed), (Phase::Exited, 143, false));
    signal_container::call(&fixture.agent, &term).unwrap();

    let request = StatsRequest { container_ids: vec!["removed".into(), "c1".into()] };
    let stats = stats::call(&fixture.agent, &request).await.unwrap();
    assert_eq!(stats.containers.iter().map(|one| &one.id).collect::<Vec<_>>(), ["c1"]);

    fixture.delete().await.unwrap();
    fixture.delete().await.unwrap();
    assert!(list_containers::call(&fixture.agent).containers.is_empty());
    assert!(signal_container::call(&fixture.agent, &term).is_err());
    assert_eq!(*fixture.runtime.calls.lock().unwrap(), ["create c1 x", "start c1", "delete c1"]);
}

#[tokio::test]
async fn limits_of_a_container_change_until_it_has_exited() {
    let fixture = Fixture::new(RecordingRuntime { pid: 4_000_000, ..RecordingRuntime::default() });
    fixture.set_up().await.unwrap();
    fixture.create(|_| {}).await.unwrap();
    let update = |resources: &[u8]| {
        let request = UpdateContainerRequest { id: "c1".into(), resources: resources.to_vec() };
        update_container::call(fixture.agent.clone(), request)
    };
    update(br#"{"memory":{"limit":1}}"#).await.unwrap();
    assert_eq!(fixture.runtime.calls.lock().unwrap().last().unwrap(), "update c1 {\"memory\":{\"limit\":1}}");
    assert!(update(b"[]").await.is_err());
    fixture.agent.registry.get("c1").unwrap().ended(0, false);
    assert!(matches!(update(b"{}").await, Err(AgentError::FailedPrecondition(_))));
}
