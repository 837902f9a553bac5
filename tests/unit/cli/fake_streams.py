"""A streaming server in a thread, whose commands run on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from tests.unit.streaming.fakes import FakePods, FakeProcess
from vmruntime.aio.beside import together
from vmruntime.config.settings import StreamingSettings
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec
from vmruntime.streaming.server import StreamingServer


class FakeStreams:
    """Gives out URLs. `pods.script` is what a command or container does; it runs in the server's thread."""

    def __init__(self) -> None:
        self.pods = FakePods()
        self.pods.script = run_here
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = StreamingServer(self.pods, StreamingSettings())  # type: ignore[arg-type]
        asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def url(self, spec: ExecSpec | AttachSpec | PortForwardSpec) -> str:
        async def issue() -> str:
            match spec:
                case ExecSpec():
                    return self._server.exec_url(spec)
                case AttachSpec():
                    return self._server.attach_url(spec)
                case _:
                    return self._server.port_forward_url(spec)

        return asyncio.run_coroutine_threadsafe(issue(), self._loop).result(10)


async def run_here(process: FakeProcess) -> None:
    """Run the command on this machine."""
    assert isinstance(process.spec, ExecSpec)
    pipe = asyncio.subprocess.PIPE
    try:
        real = await asyncio.create_subprocess_exec(*process.spec.argv, stdin=pipe, stdout=pipe, stderr=pipe)
    except FileNotFoundError:
        await process.exit(127, "not found")
        return
    stdin, stdout, stderr = real.stdin, real.stdout, real.stderr
    assert stdin is not None
    assert stdout is not None
    assert stderr is not None

    async def feed() -> None:
        with contextlib.suppress(ConnectionError):
            while data := await process.read():
                stdin.write(data)
                await stdin.drain()
        stdin.close()

    async def drain(stream: asyncio.StreamReader, *, is_stderr: bool) -> None:
        while data := await stream.read(65536):
            await process.say(data, stderr=is_stderr)

    feeding = asyncio.ensure_future(feed())
    try:
        await together(drain(stdout, is_stderr=False), drain(stderr, is_stderr=True))
        await process.exit(await real.wait())
    finally:
        feeding.cancel()
        if real.returncode is None:
            real.kill()
            await real.wait()
