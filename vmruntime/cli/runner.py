"""What `vmruntime run` does: a pod with one container, from the image to the end of both."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path

import click

from vmruntime.cli import images
from vmruntime.cli.client import Client
from vmruntime.cli.crilog import LogFile
from vmruntime.cli.follow import Follower, printer, report_malformed, status_after_streams, status_of
from vmruntime.cli.interactive import join_container
from vmruntime.cli.interrupts import Interrupted, Interrupts
from vmruntime.cli.logdirs import make_log_directory, remove_log_directory
from vmruntime.cli.podspec import RunOptions, container_config, pod_config
from vmruntime.cli.progress import working
from vmruntime.cli.render import printable
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import NotFound, Unavailable, VmruntimeError
from vmruntime.generated import cri_pb2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPolicy:
    """How to go about it.

    Attributes:
        pull: "always", "missing" or "never".
        remove: Remove the pod at the end.
        stop_timeout: Seconds between the stop signal and the end, after Ctrl-C.
        logs: Where the pods' log directories are.
        streaming: How the daemon serves streams.
    """

    pull: str
    remove: bool
    stop_timeout: int
    logs: Path
    streaming: StreamingSettings = dataclasses.field(default_factory=StreamingSettings)


class Runner:
    """One pod made by hand."""

    def __init__(self, client: Client, options: RunOptions, policy: RunPolicy) -> None:
        self._client = client
        self._options = options
        self._policy = policy
        self._pod = pod_config(options, policy.logs)
        self._pod_id = ""
        self._container_id = ""

    def run(self) -> int:
        """Run the container to its end and return the exit status; Ctrl-C and SIGTERM stop it."""
        with Interrupts() as interrupts:
            try:
                self._create(interrupts)
                if self._options.stdin or self._options.tty:
                    if not self._converse(interrupts):
                        return 0
                    status = self._wait_exit()
                else:
                    self._start()
                    status = self._follow(interrupts)
            except Interrupted as interrupted:
                self._clean_up()
                return 128 + interrupted.signum
            except BaseException:
                self._clean_up()
                raise
            self._finish()
        if status.reason != "Completed" and (status.message or status.reason not in ("", "Error")):
            words = f"{status.reason}: {status.message}" if status.message else status.reason
            click.echo(f"vmruntime: the container ended: {printable(words)}", err=True)
        return status.exit_code if 0 <= status.exit_code <= 255 else 255

    def detach(self) -> tuple[str, str]:
        """Start the pod and leave it running; return the ids of pod and container."""
        with Interrupts() as interrupts:
            try:
                self._create(interrupts)
                self._start()
            except BaseException as error:
                self._discard()
                if isinstance(error, Interrupted):
                    raise KeyboardInterrupt from None
                raise
        return self._pod_id, self._container_id

    def _create(self, interrupts: Interrupts) -> None:
        client = self._client
        image = images.ensure(client, self._options.image, self._policy.pull, self._pod, while_waiting=interrupts.check)
        make_log_directory(Path(self._pod.log_directory))
        with working("starting the virtual machine"):
            # Not given up halfway: a pod whose id never arrived could not be removed.
            request = cri_pb2.RunPodSandboxRequest(config=self._pod)
            self._pod_id = client.call(client.runtime.RunPodSandbox, request).pod_sandbox_id
            interrupts.check()
            config = container_config(self._options, image)
            create = cri_pb2.CreateContainerRequest(
                pod_sandbox_id=self._pod_id, config=config, sandbox_config=self._pod
            )
            self._container_id = client.call(client.runtime.CreateContainer, create).container_id
            interrupts.check()

    def _start(self) -> None:
        request = cri_pb2.StartContainerRequest(container_id=self._container_id)
        self._client.call(self._client.runtime.StartContainer, request)

    def _converse(self, interrupts: Interrupts) -> bool:
        """Join the container's streams, start it and stay until its end; False when the user left it running."""
        start: Callable[[], None] | None = self._start
        try:
            if self._options.vm is not None:
                # There is no console to join before there is a VM.
                self._start()
                start = None
            return join_container(
                self._client,
                self._policy.streaming,
                self._container_id,
                stdin=self._options.stdin,
                tty=self._options.tty,
                console=self._options.vm is not None,
                ready=start,
                watch=interrupts.check,
            )
        except Interrupted:
            timeout = self._policy.stop_timeout if interrupts.count == 1 else 0
            request = cri_pb2.StopContainerRequest(container_id=self._container_id, timeout=timeout)
            self._client.call(self._client.runtime.StopContainer, request)
            return True

    def _wait_exit(self) -> cri_pb2.ContainerStatus:
        """Return the container's status when it has exited; its streams have ended, so that is soon."""
        status = status_after_streams(self._client, self._container_id)
        if status.state != cri_pb2.CONTAINER_EXITED:
            raise Unavailable("the container's streams ended, but it did not")
        return status

    def _follow(self, interrupts: Interrupts) -> cri_pb2.ContainerStatus:
        path = status_of(self._client, self._container_id).log_path
        if not path:
            raise NotFound("the daemon keeps no log of the container")
        log = LogFile(Path(path))
        follower = Follower(self._client, self._container_id, log, printer())
        handled = 0

        def stop_when_told() -> None:
            nonlocal handled
            if interrupts.count > handled:
                handled = interrupts.count
                self._stop_container(follower, interrupts)

        try:
            return follower.until_exit(stop_when_told)
        finally:
            log.close()
            report_malformed(log)

    def _stop_container(self, follower: Follower, interrupts: Interrupts) -> None:
        """Ask the container to end; a second signal while it takes its time kills it."""
        before = interrupts.count
        timeout = self._policy.stop_timeout if before == 1 else 0
        if timeout:
            name = signal.Signals(interrupts.signum).name
            click.echo(f"vmruntime: {name}: stopping, at most {timeout} s; once more kills", err=True)

        def while_stopping() -> None:
            follower.pump()
            if timeout and interrupts.count > before:
                raise Interrupted(interrupts.signum)

        request = cri_pb2.StopContainerRequest(container_id=self._container_id, timeout=timeout)
        try:
            self._client.call(self._client.runtime.StopContainer, request, while_waiting=while_stopping)
        except Interrupted:
            # The next turn of until_exit() sees the new signal and comes back here without patience.
            return

    def _finish(self) -> None:
        """Release what the pod holds; with --rm everything, else all but its record and its logs."""
        if self._policy.remove:
            self._remove_all()
        else:
            self._stop_pod()

    def _clean_up(self) -> None:
        """After a failure or an early signal: a pod whose container never started is of no use to anyone."""
        if self._pod_id and self._container_id and not self._policy.remove:
            self._quietly(self._finish)
        else:
            self._discard()

    def _discard(self) -> None:
        if self._pod_id:
            self._quietly(self._remove_all)
        else:
            remove_log_directory(self._policy.logs, self._pod)

    def _stop_pod(self) -> None:
        request = cri_pb2.StopPodSandboxRequest(pod_sandbox_id=self._pod_id)
        self._client.call(self._client.runtime.StopPodSandbox, request)

    def _remove_all(self) -> None:
        self._stop_pod()
        client = self._client
        client.call(client.runtime.RemovePodSandbox, cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=self._pod_id))
        remove_log_directory(self._policy.logs, self._pod)

    def _quietly(self, step: Callable[[], None]) -> None:
        try:
            step()
        except VmruntimeError as error:
            # The failure that led here is the one to report; this one says what it left behind.
            click.echo(f"vmruntime: pod {self._pod.metadata.name} is left behind: {error.message}", err=True)
