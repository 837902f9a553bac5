"""skopeo(1), which speaks to registries for us: authentication, mirrors, certificates, signature policy."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog

from vmruntime.aio import process
from vmruntime.aio.pipeline import in_thread
from vmruntime.config.settings import ImageSettings
from vmruntime.errors import DeadlineExceeded
from vmruntime.images.platform import Platform
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.skopeo_errors import RegistryUnavailable, translate

log = structlog.get_logger()

# The largest manifest and configuration that registries take (distribution's limit is 4 MiB).
MANIFEST_LIMIT = 4 * 1024 * 1024
# A pull may last for days while bytes arrive: progress is what is watched.
NO_DEADLINE = 30 * 24 * 3600.0

_HOST_POLICIES = (Path("/etc/containers/policy.json"), Path("/usr/share/containers/policy.json"))
# What a helper needs of the daemon's environment; the rest (tokens, homes) is none of its business.
_KEPT = (
    "PATH",
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "TZ"),
)


class Session:
    """One pull's way to skopeo: a private home with the credentials, gone when the pull ends."""

    def __init__(
        self,
        settings: ImageSettings,
        platform: Platform,
        home: Path,
        policy: list[str],
        secrets: Sequence[str],
        tls_verify: bool | None,
    ) -> None:
        self._settings = settings
        self._platform = platform
        self._home = home
        self._policy = policy
        self._secrets = secrets
        self._tls_verify = tls_verify

    async def manifest(self, source: str) -> bytes:
        """Return the manifest or index of an image, as the bytes its digest is made of.

        Args:
            source: With transport: docker://registry.example/app:1.

        Raises:
            VmruntimeError: As skopeo_errors.translate finds.
        """
        return await self._inspect(source, [])

    async def config(self, source: str) -> bytes:
        """Return the configuration of an image, as the bytes its digest is made of."""
        return await self._inspect(source, ["--config"])

    async def copy(self, source: str, layout: Path) -> None:
        """Copy an image into an OCI layout, after the signature policy has accepted it.

        Blobs that the layout has by digest are not fetched. The caller watches for progress and cancels.
        """
        argv = [
            *self._global_options(),
            "copy",
            "--quiet",
            "--remove-signatures",  # they are checked before; a layout cannot hold them
            "--dest-oci-accept-uncompressed-layers",
            *self._source_options("--src-tls-verify"),
            "--",
            source,
            f"oci:{layout}:image",
        ]
        done = await process.run(argv, timeout=NO_DEADLINE, env=self._environment(layout.parent), die_with_us=True)
        if done.returncode != 0:
            raise translate(done.stderr, source, self._secrets, str(layout.parent))

    async def _inspect(self, source: str, options: list[str]) -> bytes:
        argv = [*self._global_options(), "inspect", "--raw", *options]
        argv += [*self._source_options("--tls-verify"), "--", source]
        timeout = self._settings.pull_timeout
        try:
            done = await process.run(
                argv,
                timeout=timeout,
                env=self._environment(self._home),
                output_limit=MANIFEST_LIMIT,
                die_with_us=True,
            )
        except DeadlineExceeded:
            raise RegistryUnavailable(
                f"{source} did not answer within {timeout:g} s",
                remedy="check the registry and the network, or raise images.pull_timeout",
            ) from None
        if done.returncode != 0:
            raise translate(done.stderr, source, self._secrets)
        return done.stdout

    def _global_options(self) -> list[str]:
        argv = ["skopeo", "--override-os", "linux", "--override-arch", self._platform.architecture]
        if self._settings.registries_conf:
            argv += ["--registries-conf", self._settings.registries_conf]
        if self._settings.registries_d:
            argv += ["--registries.d", self._settings.registries_d]
        return argv + self._policy

    def _source_options(self, tls_flag: str) -> list[str]:
        options = ["--authfile", str(self._home / "auth.json")]
        if self._tls_verify is not None:
            options.append(f"{tls_flag}={'true' if self._tls_verify else 'false'}")
        return options

    def _environment(self, scratch: Path) -> dict[str, str]:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # A home of our own keeps credentials and policies of the daemon's user out of pulls.
        home = str(self._home)
        return environment | {
            "HOME": home,
            "XDG_CONFIG_HOME": home,
            "XDG_RUNTIME_DIR": home,
            "TMPDIR": str(scratch),
            "LC_ALL": "C.UTF-8",
        }


@contextlib.asynccontextmanager
async def session(
    settings: ImageSettings,
    platform: Platform,
    homes: ScratchSpace,
    auth_file: bytes,
    secrets: Sequence[str],
    tls_verify: bool | None = None,
) -> AsyncIterator[Session]:
    """Open a session; its credentials are readable by this user alone and removed with its home at the end.

    Args:
        settings: [images].
        platform: What images have to be for.
        homes: On a tmpfs, so that credentials never reach a disk.
        auth_file: containers-auth.json(5).
        secrets: Texts that must not appear in errors.
        tls_verify: None leaves it to registries.conf.
    """
    async with homes.directory() as home:
        await in_thread(lambda: _write_private(home / "auth.json", auth_file))
        policy = await in_thread(lambda: policy_options(settings.policy))
        yield Session(settings, platform, home, policy, secrets, tls_verify)


def policy_options(policy: str, host_policies: tuple[Path, ...] = _HOST_POLICIES) -> list[str]:
    """Return how skopeo is to judge signatures: by our policy file, the host's, or, when there is none, not at all."""
    if policy:
        return ["--policy", policy]
    if any(path.exists() for path in host_policies):
        return []
    _warn_once()
    return ["--insecure-policy"]


@functools.cache
def _warn_once() -> None:
    log.warning("no signature policy on this host, images are accepted unsigned", looked_for=str(_HOST_POLICIES[0]))


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
