"""curl(1), which speaks HTTP for us: proxies, redirects, TLS, ranges."""

from __future__ import annotations

import dataclasses
import os
import signal
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from vmruntime.aio import process
from vmruntime.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    VmruntimeError,
)
from vmruntime.images.endpoint import Endpoint, Tls, redacted
from vmruntime.images.skopeo_errors import RegistryUnavailable

CONNECT_TIMEOUT = 30.0
STALL_TIMEOUT = 60.0
"""Seconds in which not a byte arrives."""

ASK_TIMEOUT = 30.0
NO_LIMIT = 2**62
# A download may last for days while bytes arrive.
NO_DEADLINE = 30 * 24 * 3600.0

_REPORT_LIMIT = 64 * 1024
_KEPT = (
    "PATH",
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "TZ"),
)
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

# curl's exit codes (curl(1), EXIT CODES).
OK, HTTP_ERROR, RANGE_ERROR = 0, 22, 33
_TRANSIENT = frozenset({5, 6, 7, 16, 18, 28, 35, 52, 55, 56, 92})
_TLS_TRUST, _TLS_LOCAL = frozenset({51, 60}), frozenset({53, 54, 58, 59, 66, 77, 82, 83, 90, 91})
_WRITE_ERROR, _NOT_READ, _REDIRECTS, _TOO_LARGE, _PROTOCOL = 23, 37, 47, 63, 1
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Report(msgspec.Struct):
    """Members of %{json} (curl 7.75 and later)."""

    http_code: int = 0
    errormsg: str | None = None


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """Tls in files, as curl wants it; empty: nothing."""

    authorities: str = ""
    client: str = ""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A run of curl.

    Attributes:
        code: Its exit code; negative: a signal.
        status: Of the last HTTP answer; 0: there was none.
        words: What curl says of a failure.
    """

    code: int
    status: int
    words: str

    @property
    def transient(self) -> bool:
        """Whether the same may work in a moment."""
        return self.code in _TRANSIENT or (self.code == HTTP_ERROR and self.status in _LATER)


async def transfer(
    endpoint: Endpoint,
    output: Path,
    heads: Path,
    *,
    limit: int,
    tls: TlsFiles = TlsFiles(),
    offset: int = 0,
    if_range: str = "",
    timeout: float = NO_DEADLINE,
) -> Transfer:
    """Fetch a URL into a file.

    Nothing of what is secret is in the arguments, which every user of the host may read.

    Args:
        endpoint: What to fetch.
        output: Written anew, or continued at `offset`.
        heads: Gets the HTTP heads as they come.
        limit: Most bytes of the file.
        tls: Of the endpoint's transport.
        offset: Bytes that are there already.
        if_range: The validator of these bytes.
        timeout: Seconds for all of it.

    Raises:
        FailedPrecondition: curl is not installed.
        DeadlineExceeded: The time is up.
    """
    config = _config(endpoint, tls, output, heads, limit, offset, if_range)
    return await _run(config, limit, timeout)


async def ask(endpoint: Endpoint, heads: Path, *, tls: TlsFiles = TlsFiles()) -> Transfer:
    """Have a server say what it would send, and write the HTTP heads down; see transfer()."""
    config = _config(endpoint, tls, Path("/dev/null"), heads, NO_LIMIT, 0, "") + "head\n"
    timeout = endpoint.transport.timeout
    return await _run(config, 1024 * 1024, min(ASK_TIMEOUT, timeout) if timeout else ASK_TIMEOUT)


async def _run(config: str, limit: int, timeout: float) -> Transfer:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"LC_ALL": "C.UTF-8", "HOME": "/"}
    argv = ["prlimit", f"--fsize={limit}", "--core=0", "--", "curl", "--disable", "--config", "-"]
    done = await process.run(
        argv, input=config.encode(), timeout=timeout, env=environment, output_limit=_REPORT_LIMIT, die_with_us=True
    )
    if "failed to execute curl" in done.stderr:
        raise FailedPrecondition(
            "the program 'curl' is not installed", remedy="vmruntime doctor says which package has it"
        )
    try:
        report = msgspec.json.decode(done.stdout, type=_Report) if done.stdout else _Report()
    except msgspec.DecodeError as error:
        raise Internal(f"curl reports in a form that is not understood: {error}") from error
    words = report.errormsg or process.last_lines(done.stderr)
    return Transfer(done.returncode, report.http_code, redacted(words))


def write_tls(directory: Path, tls: Tls) -> TlsFiles:
    """Write authorities (behind the system's) and client certificate into a private directory. Blocks."""
    files = {"authorities": "", "client": ""}
    if tls.authorities:
        files["authorities"] = _system_authorities() + tls.authorities
    files["client"] = tls.client
    for name, content in files.items():
        if content:
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as file:
                file.write(content)
    return TlsFiles(**{name: str(directory / name) if content else "" for name, content in files.items()})


def problem(found: Transfer, endpoint: Endpoint, limit: int, size: int) -> VmruntimeError:
    """Return what a failed transfer means.

    Args:
        found: The transfer.
        endpoint: What was to be fetched.
        limit: Most bytes that were allowed.
        size: Bytes that the file has now.
    """
    url = redacted(endpoint.url)
    if found.code == _TOO_LARGE or found.code == -signal.SIGXFSZ or (found.code == _WRITE_ERROR and size >= limit):
        return ResourceExhausted(
            f"{url}: is larger than {limit} bytes", remedy="use a smaller image, or raise the limit"
        )
    if found.code == _WRITE_ERROR:
        return ResourceExhausted(f"{url}: cannot be written: {found.words}", remedy="free space on the disk of images")
    if found.code in (OK, HTTP_ERROR) and found.status:
        return _refusal(found.status, url)
    if found.transient:
        return RegistryUnavailable(f"{url}: {found.words}", remedy="check the server and the network")
    if found.code in _TLS_TRUST:
        return FailedPrecondition(
            f"{url}: the server's certificate is not trusted: {found.words}",
            remedy="add its authority to tls.certificates of the rule's transport",
        )
    if found.code in _TLS_LOCAL:
        return FailedPrecondition(
            f"{url}: TLS cannot be used: {found.words}", remedy="correct tls of the rule's transport"
        )
    if found.code == _REDIRECTS:
        most = endpoint.transport.max_redirects
        return FailedPrecondition(
            f"{url}: redirects more than {most} times",
            remedy="raise maxRedirects of the rule's transport, or use the last URL",
        )
    if found.code == _NOT_READ:
        return NotFound(f"{url}: cannot be read: {found.words}", remedy="correct the URL, or put the file there")
    if found.code == _PROTOCOL:
        return FailedPrecondition(
            f"{url}: leads to what is not fetched: {found.words}",
            remedy="https may lead to http only where there is a checksum, and nothing may lead to other schemes",
        )
    return Internal(f"{url}: curl failed with status {found.code}: {found.words}")


def _refusal(status: int, url: str) -> VmruntimeError:
    said = f"{url}: the server answers with status {status}"
    if status in (401, 403, 407):
        return PermissionDenied(said, remedy="give it a user and password in the URL, or a client certificate")
    if status in (404, 410):
        return NotFound(said, remedy="correct the image's name or the URL of the rule")
    if status in _LATER:
        return RegistryUnavailable(said, remedy="check the server")
    return FailedPrecondition(said, remedy="check the server")


def _config(
    endpoint: Endpoint, tls: TlsFiles, output: Path, heads: Path, limit: int, offset: int, if_range: str
) -> str:
    """Return what curl reads from its stdin: an option a line, values in quotes."""
    transport = endpoint.transport
    scheme = urlsplit(endpoint.url).scheme
    # Who sends https somewhere else without TLS sends anything, unless a checksum says what it has to be.
    plain = scheme == "http" or endpoint.checksum is not None
    protocols = "file" if scheme == "file" else "http,https" if plain else "https"
    options: list[tuple[str, str]] = [
        ("output", str(output)),
        ("dump-header", str(heads)),
        ("write-out", "%{json}"),
        ("user-agent", "vmruntime"),
        ("proto", f"={protocols}"),
        ("proto-redir", f"={protocols}"),
        ("max-redirs", str(transport.max_redirects)),
        ("max-filesize", str(limit)),
        ("connect-timeout", f"{CONNECT_TIMEOUT:g}"),
        ("speed-limit", "1"),
        ("speed-time", f"{STALL_TIMEOUT:g}"),
    ]
    # no-buffer: what has arrived is in the file, also when curl is killed.
    flags = ["silent", "show-error", "fail", "location", "globoff", "path-as-is", "no-buffer", "tlsv1.2"]
    options += _destination(endpoint.url, transport.tls.server_name)
    if offset:
        options.append(("continue-at", str(offset)))
        options += [("header", f"If-Range: {if_range}")] if if_range else []
    if transport.proxy:
        options += [("proxy", transport.proxy), ("noproxy", "")]
    if transport.tls.insecure:
        flags.append("insecure")
    options += [("cacert", tls.authorities)] if tls.authorities else []
    options += [("cert", tls.client)] if tls.client else []
    return "".join([*(f"{flag}\n" for flag in flags), *(f"{name} = {_quoted(value)}\n" for name, value in options)])


def _destination(url: str, server_name: str) -> list[tuple[str, str]]:
    """Return the options that say where to connect; with a server's name, that is what its certificate has to have."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not server_name:
        return [("url", url)]
    user, at, place = parts.netloc.rpartition("@")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = parts.port or 443
    named = parts._replace(netloc=f"{user}{at}{server_name}:{port}").geturl()
    return [("url", named), ("connect-to", f"{server_name}:{port}:{host}:{port}"), ("header", f"Host: {place}")]


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _system_authorities() -> str:
    """Return the system's bundle: an own one replaces it for curl, and Virtlet added to it."""
    for name in (os.environ.get("SSL_CERT_FILE", ""), ssl.get_default_verify_paths().cafile or "", *_BUNDLES):
        if name and Path(name).is_file():
            return Path(name).read_text() + "\n"
    return ""


def time_is_up(endpoint: Endpoint) -> DeadlineExceeded:
    """Build the error for a download that took too long."""
    return DeadlineExceeded(
        f"{redacted(endpoint.url)}: was not fetched within {endpoint.transport.timeout:g} s",
        remedy="raise timeout of the rule's transport; what has arrived is kept",
    )
