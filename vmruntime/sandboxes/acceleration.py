"""Which accelerator works here: proven by booting our own guest, because /dev/kvm being there proves nothing.

Some hosts offer a /dev/kvm on which no ordinary guest boots (a hypervisor below without nested virtualisation). The
answer is remembered for as long as the host is up and QEMU and the guest's kernel stay the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import structlog

from vmruntime.aio.process import last_lines, run
from vmruntime.errors import FailedPrecondition, VmruntimeError
from vmruntime.hypervisor.interface import Accelerator
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.sandboxes.interface import SandboxBackend
from vmruntime.store.records import Facts

log = structlog.get_logger(__name__)

KVM = Path("/dev/kvm")
PROOF_SECONDS = 10.0
FACT = "accelerator"


async def choose_accelerator(
    wanted: str, qemu: str, kernel: Path, facts: Facts, backend: Callable[[], SandboxBackend], probe_id: str
) -> Accelerator:
    """Return how guests are to run.

    Args:
        wanted: The setting hypervisor.accelerator: auto, kvm or tcg.
        qemu: Path of the QEMU program.
        kernel: The guest's kernel.
        facts: Where the answer is remembered.
        backend: Makes a backend that boots with KVM within PROOF_SECONDS.
        probe_id: Sandbox id of the trial guest.

    Raises:
        FailedPrecondition: KVM was asked for and does not work.
    """
    if wanted == "tcg":
        return Accelerator.TCG
    if not os.access(KVM, os.R_OK | os.W_OK):
        works, why = False, f"{KVM} is missing or cannot be opened"
    else:
        works, why = await _remembered_proof(qemu, kernel, facts, backend, probe_id)
    if works:
        return Accelerator.KVM
    if wanted == "kvm":
        raise FailedPrecondition(f"hypervisor.accelerator is 'kvm' but KVM does not work: {why}")
    log.warning("guests run without hardware acceleration", why=why)
    return Accelerator.TCG


async def _remembered_proof(
    qemu: str, kernel: Path, facts: Facts, backend: Callable[[], SandboxBackend], probe_id: str
) -> tuple[bool, str]:
    key = await _proof_key(qemu, kernel)
    remembered = (await facts.get(FACT) or b"").decode()
    if remembered.startswith(f"{key}\n"):
        verdict = remembered.partition("\n")[2]
        return verdict == "works", verdict
    works, why = await _prove(backend(), probe_id)
    await facts.put(FACT, f"{key}\n{why}".encode())
    return works, why


async def _proof_key(qemu: str, kernel: Path) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    version = await _version(qemu)
    status = kernel.stat() if kernel.exists() else None
    return f"{boot} {version} {status.st_size if status else 0} {status.st_mtime_ns if status else 0}"


async def _version(qemu: str) -> str:
    done = await run([qemu, "--version"])
    line = done.stdout.decode(errors="replace").partition("\n")[0]
    if done.returncode != 0 or not line:
        raise FailedPrecondition(
            f"hypervisor.qemu: {qemu} --version failed with status {done.returncode}: {last_lines(done.stderr)}",
            remedy="name a QEMU that runs; vmruntime doctor says what is here",
        )
    return line


async def _prove(backend: SandboxBackend, probe_id: str) -> tuple[bool, str]:
    metadata = SandboxMetadata(name="kvm-proof", uid=probe_id, namespace="vmruntime")
    sandbox = Sandbox(id=probe_id, spec=SandboxSpec(metadata=metadata), state=SandboxState.CREATING, created_at=0)
    log.info("proving KVM by booting a guest", seconds=PROOF_SECONDS)
    try:
        running = await backend.start(sandbox)
        await running.close()
    except VmruntimeError as error:
        return False, f"a guest does not boot on it: {error.message.splitlines()[0]}"
    finally:
        await backend.release(probe_id, final=True)
    return True, "works"
