//! Makes a container, and unmakes it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::cgroup::Cgroup;
use super::devices;
use super::passwd::Accounts;
use super::runtime::{Launch, Stdio};
use super::spec::{self, Adaptation, PidNamespace};
use super::streams::Streams;
use super::user::{self, Identity, Wanted};
use super::user_namespace::Owner;
use super::{Container, Parts, watch};
use crate::agent::Agent;
use crate::clock::Phases;
use crate::error::{AgentError, Context, Result};
use crate::io::buffer::OutputBuffer;
use crate::io::file::{AsyncFile, pipe_of};
use crate::io::pump;
use crate::io::terminal::ConsoleSocket;
use crate::proto::container_state::Phase;
use crate::proto::output_record::Stream;
use crate::proto::{CreateContainerRequest, CreateContainerResponse, Layer, PidMode};
use crate::storage::{rootfs, volumes};

/// How long killed processes may take to be gone.
const DYING: Duration = Duration::from_secs(10);

/// # Errors
/// See `agent.proto`; nothing is left behind.
pub async fn create(agent: &Arc<Agent>, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
    let mut phases = Phases::start();
    let mut spec = spec::parse(&request.oci_spec)?;
    let pid_namespace = pid_namespace(agent, &request)?;
    let own = request.layers.len();
    let (serials, layers) = acquire(agent, &request).await?;
    phases.mark("layers");
    let layers =
        Layers { own: layers.get(..own).unwrap_or_default(), volumes: layers.get(own..).unwrap_or_default() };
    let made = assemble(agent, &request, &mut spec, layers, &pid_namespace, &mut phases).await;
    let (identity, made) = match made {
        Ok(both) => both,
        Err(error) => {
            discard(agent, &request.id, &serials).await;
            return Err(error);
        }
    };
    let Identity { uid, gid, groups, .. } = identity;
    let pid = u32::try_from(made.number).unwrap_or_default();
    enroll(agent, &request, spec, serials, made);
    Ok(CreateContainerResponse { pid, uid, gid, groups, phases: phases.into_vec() })
}

/// Stops what runs, removes every trace and answers the layers that are free now.
pub async fn destroy(agent: &Agent, container: &Container) -> Vec<String> {
    if let Err(error) = container.cgroup.kill() {
        log::warn!("container {}: {error}", container.id);
    }
    if container.phase() != Phase::Exited {
        // Where a host has no control group of version 2 the first process is all there is to signal.
        let _ = container.signal(libc::SIGKILL);
        if timeout(DYING, container.wait_exited()).await.is_err() {
            log::warn!("container {} does not die", container.id);
        }
    }
    container.output.close();
    container.taps.close();
    agent.registry.remove(&container.id);
    discard(agent, &container.id, &container.layers).await
}

async fn discard(agent: &Agent, id: &str, serials: &[String]) -> Vec<String> {
    if let Err(error) = agent.runtime.delete(id).await {
        log::warn!("container {id}: {error}");
    }
    for number in 0.. {
        let volume = agent.config.paths.image_volume(id, number);
        if !volume.exists() {
            break;
        }
        volumes::unmount_image(&volume, agent.mounter.as_ref());
    }
    rootfs::take_apart(&agent.config.paths, id, agent.mounter.as_ref());
    agent.layers.release(serials).await
}

/// A process the OCI runtime made, with the agent's ends of its streams.
struct Made {
    number: i32,
    oom_score: Option<i32>,
    streams: Streams,
    outputs: Vec<(Arc<AsyncFile>, Stream)>,
}

async fn assemble(
    agent: &Arc<Agent>,
    request: &CreateContainerRequest,
    spec: &mut Value,
    layers: Layers<'_>,
    pid_namespace: &PidNamespace,
    phases: &mut Phases,
) -> Result<(Identity, Made)> {
    let paths = &agent.config.paths;
    let root = agent.sandbox.owner(0, 0)?;
    rootfs::assemble(paths, &request.id, layers.own, root, agent.mounter.as_ref())?;
    phases.mark("rootfs");
    mount_volumes(agent, request, layers.volumes).await?;
    let identity = identify(agent, request, spec)?;
    let mut devices = devices::find(&request.devices, &identity).await?;
    if request.all_devices {
        devices.extend(devices::all(&devices));
    }
    phases.mark("volumes");
    let namespaces = agent.sandbox.namespaces();
    let owner = agent.sandbox.owner(identity.uid, identity.gid)?;
    if let Some(user) = namespaces.user() {
        identity.groups.iter().try_for_each(|group| user.group(*group).map(drop))?;
        devices::give(&devices, user)?;
    }
    let adaptation = Adaptation {
        id: &request.id,
        paths,
        identity: &identity,
        readonly_rootfs: request.readonly_rootfs,
        tty: request.tty,
        pid_namespace,
        user_namespace: namespaces.user(),
        cgroup: &agent.config.cgroup,
    };
    spec::adapt(spec, &adaptation)?;
    devices::add(spec, &devices, namespaces.user().is_some())?;
    let oom_score = spec::take_oom_score(spec);
    let config = paths.bundle(&request.id).join("config.json");
    fs::write(&config, spec.to_string()).context(|| format!("write {}", config.display()))?;
    phases.mark("spec");
    let made = launch(agent, request, spec, owner, oom_score).await?;
    phases.mark("create");
    Ok((identity, made))
}

/// Mount points of the layers of the root file system, and of all image volumes in order.
#[derive(Clone, Copy)]
struct Layers<'a> {
    own: &'a [PathBuf],
    volumes: &'a [PathBuf],
}

async fn mount_volumes(
    agent: &Agent,
    request: &CreateContainerRequest,
    mut layers: &[PathBuf],
) -> Result<()> {
    let (paths, mounter) = (&agent.config.paths, agent.mounter.as_ref());
    agent.volumes.mount_share(paths, &request.share_tag, mounter).await?;
    for volume in &request.memory_volumes {
        volumes::mount_memory(paths, volume, mounter)?;
    }
    for (number, volume) in request.image_volumes.iter().enumerate() {
        let (own, rest) = layers.split_at(volume.layers.len().min(layers.len()));
        layers = rest;
        volumes::mount_image(&paths.image_volume(&request.id, number), own, mounter)?;
    }
    Ok(())
}

fn identify(agent: &Agent, request: &CreateContainerRequest, spec: &Value) -> Result<Identity> {
    let accounts = Accounts::read(&agent.config.paths.rootfs(&request.id))?;
    let (spec_uid, spec_gid) = spec::user_ids(spec);
    let mut groups = spec::user_groups(spec);
    groups.extend(&request.supplemental_groups);
    let wanted = Wanted {
        user: &request.user,
        spec_uid,
        spec_gid,
        groups: &groups,
        image_groups: request.image_groups,
    };
    user::resolve(wanted, &accounts)
}

async fn launch(
    agent: &Arc<Agent>,
    request: &CreateContainerRequest,
    spec: &Value,
    owner: Option<Owner>,
    oom_score: Option<i32>,
) -> Result<Made> {
    let program = spec.pointer("/process/args/0").and_then(Value::as_str).unwrap_or_default();
    let bundle = agent.config.paths.bundle(&request.id);
    let launch =
        |stdio, console| Launch { id: &request.id, description: &bundle, program, console, stdio, oom_score };
    if request.tty {
        let console = ConsoleSocket::bind(agent.console_socket_path())?;
        let number = agent.runtime.create(launch(Stdio::default(), Some(console.path()))).await?;
        let terminal = Arc::new(AsyncFile::new(console.receive().await?).context(|| "open the terminal")?);
        let streams = Streams::on_terminal(terminal.clone(), request.stdin);
        return Ok(Made { number, oom_score, streams, outputs: vec![(terminal, Stream::Stdout)] });
    }
    let what = || "open a pipe";
    let (mut stdin, mut keep) = (None, None);
    if request.stdin {
        let (give_stdin, write_end) = pipe_of(owner).context(what)?;
        stdin = Some(give_stdin);
        keep = Some(Arc::new(AsyncFile::new(write_end).context(what)?));
    }
    let (stdout, give_stdout) = pipe_of(owner).context(what)?;
    let (stderr, give_stderr) = pipe_of(owner).context(what)?;
    let stdio = Stdio { stdin, stdout: Some(give_stdout), stderr: Some(give_stderr) };
    let number = agent.runtime.create(launch(stdio, None)).await?;
    let open = |end| AsyncFile::new(end).map(Arc::new).context(what);
    let outputs = vec![(open(stdout)?, Stream::Stdout), (open(stderr)?, Stream::Stderr)];
    Ok(Made { number, oom_score, streams: Streams::on_pipes(keep, request.stdin_once), outputs })
}

/// From here on the container is known, read from and watched. Nothing is awaited, so its exit cannot be missed.
fn enroll(
    agent: &Arc<Agent>,
    request: &CreateContainerRequest,
    spec: Value,
    layers: Vec<String>,
    made: Made,
) {
    let Made { number, oom_score, streams, outputs } = made;
    let limit = usize::try_from(request.output_buffer_bytes).unwrap_or_default();
    let container = Arc::new(Container::new(Parts {
        id: request.id.clone(),
        pid: number,
        pid_mode: request.pid_mode(),
        cgroup: Cgroup::of_container(&agent.config.cgroup, &request.id),
        process: spec.get("process").cloned().unwrap_or_default(),
        oom_score,
        layers,
        output: Arc::new(OutputBuffer::new(limit, outputs.len())),
        outputs: outputs.len(),
        streams,
    }));
    for (source, stream) in outputs {
        let pump = tokio::spawn(pump::run(source, stream, container.output.clone(), container.taps.clone()));
        container.keep_pump(pump.abort_handle());
    }
    agent.registry.insert(container.clone());
    watch::spawn(agent.clone(), container, agent.reaper.watch(number));
}

fn pid_namespace(agent: &Agent, request: &CreateContainerRequest) -> Result<PidNamespace> {
    match request.pid_mode() {
        PidMode::Container => Ok(PidNamespace::Own),
        PidMode::Host if agent.in_vm() => {
            Err(AgentError::InvalidArgument("a virtual machine's own PID namespace is the agent's".into()))
        }
        PidMode::Host => Ok(PidNamespace::Host),
        PidMode::Pod => agent.sandbox.pod_init().map(PidNamespace::Of).ok_or_else(|| {
            AgentError::FailedPrecondition("the sandbox was set up without a shared PID namespace".into())
        }),
        PidMode::Target => {
            let target = agent.registry.get(&request.pid_target)?;
            if target.phase() == Phase::Exited {
                let text = format!("container {:?}, whose PID namespace is wanted, has exited", target.id);
                return Err(AgentError::FailedPrecondition(text));
            }
            Ok(PidNamespace::Of(target.pid))
        }
    }
}

/// Makes every layer of the root file system and of image volumes available; answers the serials of those that are disks,
/// and where each layer is, in order.
async fn acquire(agent: &Agent, request: &CreateContainerRequest) -> Result<(Vec<String>, Vec<PathBuf>)> {
    check_once(&request.layers)?;
    let volumes = request.image_volumes.iter().flat_map(|volume| &volume.layers);
    let all: Vec<&Layer> = request.layers.iter().chain(volumes).collect();
    if !all.is_empty() && all.iter().all(|layer| !layer.path.is_empty()) {
        return mounted_already(agent, &all).map(|paths| (Vec::new(), paths));
    }
    let serials: Vec<String> = all.iter().map(|layer| layer.serial.clone()).collect();
    serials.iter().try_for_each(|serial| crate::validate::serial(serial))?;
    let paths = agent.layers.acquire(&serials, agent.sandbox.namespaces().user()).await?;
    Ok((serials, paths))
}

/// A host's layers are directories that the host has mounted.
fn mounted_already(agent: &Agent, layers: &[&Layer]) -> Result<Vec<PathBuf>> {
    if agent.in_vm() {
        let text = "a virtual machine's layers are disks, named by their serials".into();
        return Err(AgentError::InvalidArgument(text));
    }
    let directory = |layer: &&Layer| {
        let path = PathBuf::from(&layer.path);
        if path.is_absolute() && path.is_dir() {
            return Ok(path);
        }
        Err(AgentError::InvalidArgument(format!("layer {:?} is not a directory here", layer.path)))
    };
    layers.iter().map(directory).collect()
}

fn check_once(layers: &[Layer]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    match layers.iter().find(|layer| !seen.insert((&layer.serial, &layer.path))) {
        Some(layer) => {
            let text = format!("layer {:?} is named twice", format!("{}{}", layer.serial, layer.path));
            Err(AgentError::InvalidArgument(text))
        }
        None => Ok(()),
    }
}
