use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::mount::MsFlags;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::agent::Agent;
use crate::clock::Phases;
use crate::container::pod_init::{self, PodNamespaces, User};
use crate::container::user_namespace::Mapping;
use crate::error::{AgentError, Context, Result};
use crate::network::{self, files, home, sysctl};
use crate::proto::{Phase, SetupSandboxRequest, SetupSandboxResponse};
use crate::sandbox::Progress;
use crate::storage::mounter::Mount;
use crate::storage::scratch;
use crate::{sys, validate};

/// A sane amount; the pool itself is smaller.
const MOST_ENTROPY: usize = 4096;

pub async fn call(agent: Arc<Agent>, request: SetupSandboxRequest) -> Result<SetupSandboxResponse> {
    validate::id("sandbox id", &request.sandbox_id)?;
    let mut progress = agent.sandbox.setup.lock().await;
    let present = agent.sandbox.id();
    if present == request.sandbox_id {
        return Ok(SetupSandboxResponse::default());
    }
    if !present.is_empty() {
        let text = format!("this agent serves sandbox {present:?} already");
        return Err(AgentError::FailedPrecondition(text));
    }
    let mut phases = Phases::start();
    if agent.in_vm() {
        set_machine(&request)?;
        phases.mark("machine");
    }
    let namespaces = match &progress.namespaces {
        Some(made) => made.clone(),
        None => {
            let made = namespaces(&agent, &request, progress.spare_init.take()).await?;
            progress.namespaces.insert(made).clone()
        }
    };
    phases.mark("namespaces");
    let (storage, network) = tokio::join!(
        storage(&agent, &request, &mut progress, phases.beside()),
        network(&agent, &request, phases.beside())
    );
    phases.extend(storage?);
    phases.extend(network?);
    // After the interfaces are there, since each has parameters of its own.
    sysctl::apply(&request.sysctls, namespaces.user())?;
    phases.mark("sysctls");
    if let Some(user) = namespaces.user() {
        files::give(&agent.config.paths, user.root()?)?;
    }
    agent.sandbox.set_ready(&request.sandbox_id, namespaces);
    Ok(SetupSandboxResponse { phases: phases.into_vec() })
}

/// Makes the machine one of its own. It may have been restored from the memory of another, as several others were.
fn set_machine(request: &SetupSandboxRequest) -> Result<()> {
    // First, so that nothing draws bytes that another machine draws as well.
    set_random(&request.entropy)?;
    if request.time_unix_ns != 0 {
        let second = 1_000_000_000;
        let time =
            TimeSpec::new(request.time_unix_ns.div_euclid(second), request.time_unix_ns.rem_euclid(second));
        clock_settime(ClockId::CLOCK_REALTIME, time).context(|| "set the clock")?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .context(|| format!("set the hostname {:?}", request.hostname))?;
    }
    Ok(())
}

/// Mixes bytes in that nobody else has; none: nothing changes.
///
/// # Errors
/// `InvalidArgument` when they are too many.
pub fn set_random(entropy: &[u8]) -> Result<()> {
    if entropy.len() > MOST_ENTROPY {
        return Err(AgentError::InvalidArgument(format!("more than {MOST_ENTROPY} bytes of entropy")));
    }
    if entropy.is_empty() {
        return Ok(());
    }
    let pool = OpenOptions::new().write(true).open("/dev/random").context(|| "open /dev/random")?;
    sys::add_entropy(&pool, entropy).context(|| "add entropy")?;
    sys::reseed_random(&pool).context(|| "reseed the random number generator")?;
    forget_hardware_random();
    Ok(())
}

/// The driver of the hardware generator keeps some bytes in store (virtio-rng 64 of them), which came with the memory.
/// Read without waiting, they are gone, and new ones are asked for. A machine without one has none to forget.
fn forget_hardware_random() {
    let device = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/hwrng");
    if let Ok(mut device) = device {
        let _ = device.read(&mut [0; 256]);
    }
}

/// Makes the namespaces that containers share, and takes the agent into those a user namespace owns.
async fn namespaces(
    agent: &Agent,
    request: &SetupSandboxRequest,
    spare_init: Option<i32>,
) -> Result<Arc<PodNamespaces>> {
    let pid = request.shared_pid_namespace;
    if let Some(init) = spare_init {
        if pid && request.user_namespace.is_none() {
            return Ok(Arc::new(PodNamespaces { init: Some(init), user: None }));
        }
        let _ = sys::kill(init, libc::SIGKILL);
    }
    let user = match &request.user_namespace {
        None if !pid => return Ok(Arc::default()),
        None => User::Agents,
        Some(wanted) if agent.in_vm() => User::New(Mapping::parse(wanted)?),
        Some(wanted) => User::OfNetwork(Mapping::parse(wanted)?),
    };
    let made = pod_init::start(&agent.reaper, pid, user).await?;
    if let Some(owned) = &made.user {
        owned.join()?;
        if agent.in_vm() {
            enter_network(agent, request, &owned.network).await?;
        }
    }
    Ok(Arc::new(made))
}

async fn enter_network(agent: &Agent, request: &SetupSandboxRequest, namespace: &OwnedFd) -> Result<()> {
    network::hand_over(&request.interfaces, namespace).await?;
    home::leave(namespace.try_clone().context(|| "keep the pod's network namespace")?)
        .context(|| "join the pod's network namespace")?;
    sys::bring_up_loopback().context(|| "bring up lo")?;
    let target = agent.config.paths.sysfs();
    fs::create_dir_all(&target).context(|| format!("create {}", target.display()))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    agent.mounter.mount(Mount { source: "sysfs", target: &target, kind: "sysfs", flags, options: "" })
}

async fn storage(
    agent: &Agent,
    request: &SetupSandboxRequest,
    progress: &mut Progress,
    mut phases: Phases,
) -> Result<Vec<Phase>> {
    if !request.host_ipc {
        shm(agent, request.shm_size_bytes, progress)?;
    } else if progress.shm.is_none() {
        scratch::bind_shm(&agent.config.paths, agent.mounter.as_ref())?;
        progress.shm = Some(0);
    }
    phases.mark("shm");
    // On a host it is a directory of the host's disk, bound there before the agent starts.
    if agent.in_vm() {
        scratch(agent, &request.scratch_serial, progress).await?;
        phases.mark("scratch");
    }
    Ok(phases.into_vec())
}

/// Mounts what the pod's containers see as /dev/shm, or gives it another size; 0 is the usual one.
///
/// # Errors
/// When the kernel refuses.
pub fn shm(agent: &Agent, size: u64, progress: &mut Progress) -> Result<()> {
    let size = if size == 0 { scratch::DEFAULT_SHM } else { size };
    if progress.shm != Some(size) {
        scratch::mount_shm(&agent.config.paths, size, progress.shm.is_some(), agent.mounter.as_ref())?;
        progress.shm = Some(size);
    }
    Ok(())
}

/// Mounts the writable disk.
///
/// # Errors
/// `FailedPrecondition` when another one is mounted; see also `scratch::mount_disk`.
pub async fn scratch(agent: &Agent, serial: &str, progress: &mut Progress) -> Result<()> {
    match &progress.scratch {
        Some(mounted) if mounted == serial => return Ok(()),
        Some(mounted) => {
            let text = format!("the disk {mounted:?} is the writable one already, not {serial:?}");
            return Err(AgentError::FailedPrecondition(text));
        }
        None => {}
    }
    scratch::mount_disk(&agent.config.paths, serial, agent.mounter.as_ref()).await?;
    progress.scratch = Some(serial.into());
    Ok(())
}

async fn network(agent: &Agent, request: &SetupSandboxRequest, mut phases: Phases) -> Result<Vec<Phase>> {
    let dns = request.dns.clone().unwrap_or_default();
    files::write(&agent.config.paths, &request.hostname, &dns, &request.interfaces)?;
    phases.mark("files");
    if agent.in_vm() {
        network::configure(&request.interfaces, &request.routes).await?;
        phases.mark("network");
    }
    Ok(phases.into_vec())
}
