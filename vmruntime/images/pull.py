"""One pull: find out what the image is, fetch what is missing, turn it into layers while more arrives."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vmruntime import tracing
from vmruntime.aio.beside import group
from vmruntime.aio.pipeline import in_thread
from vmruntime.clock import Clock
from vmruntime.errors import Aborted
from vmruntime.images import manifest as manifests
from vmruntime.images.layers import LayerStore
from vmruntime.images.layout import Layout
from vmruntime.images.manifest import BadImage, Content, Descriptor, Index, Manifest, digest_of
from vmruntime.images.platform import Platform
from vmruntime.images.progress import Phase, PullProgress, Report
from vmruntime.images.reference import Reference
from vmruntime.images.skopeo import Session
from vmruntime.images.skopeo_errors import RegistryUnavailable
from vmruntime.model.image import ImageConfig, Layer

# How often arriving blobs are looked for; short against the time one takes to unpack.
POLL_SECONDS = 0.05
# A tag that moves between two requests is asked for again, this often.
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Pulled:
    """An image whose layers are on disk.

    Attributes:
        id: Digest of the configuration.
        digest: Of the manifest or index the reference stands for; empty for archives.
    """

    id: str
    digest: str
    layers: list[Layer]
    config: ImageConfig


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """What the registry says an image is, checked down from the reference by digests."""

    digest: str
    manifest: Manifest
    content: Content


class TagMoved(Aborted):
    """Raised when what was fetched is not what was found out before."""


class Pull:
    """The steps of one pull or import.

    Layers are held under `owner` from the moment they are known; whoever made the pull releases them.
    """

    def __init__(
        self, session: Session, layers: LayerStore, platform: Platform, clock: Clock, *, owner: str, stall: float
    ) -> None:
        """Do nothing yet.

        Args:
            session: To skopeo, with the pull's credentials.
            layers: Where layers are kept.
            platform: What the image has to be for.
            clock: Against which a stall is measured.
            owner: Under which layers are held.
            stall: Seconds without a byte arriving after which the pull fails.
        """
        self._session = session
        self._layers = layers
        self._platform = platform
        self._clock = clock
        self._owner = owner
        self._stall = stall

    async def from_registry(self, reference: Reference, work: Path, report: Report) -> Pulled:
        """Pull an image; `work` is an empty directory beside the layers.

        Raises:
            VmruntimeError: See skopeo_errors, manifest and erofs.
        """
        for attempt in range(1, ATTEMPTS + 1):
            report(PullProgress(reference=str(reference), phase=Phase.RESOLVING))
            with tracing.span("image.resolve"):
                resolved = await self._resolve(reference)
            self._layers.hold(self._owner, resolved.content.diff_ids)
            try:
                with tracing.span("image.fetch", {"vmruntime.layers": len(resolved.content.diff_ids)}):
                    await self._fetch(reference, resolved, Layout(work / str(attempt)), report)
            except TagMoved:
                if attempt == ATTEMPTS:
                    raise
            else:
                break
        return Pulled(
            resolved.manifest.config.digest,
            resolved.digest,
            self._stack(resolved.content.diff_ids),
            resolved.content.config,
        )

    async def from_archive(self, source: str, work: Path) -> Pulled:
        """Import an image from an archive or directory on this host; `source` has skopeo's transport in front."""
        config = await self._session.config(source)
        layout = Layout(work / "archive")
        await self._session.copy(source, layout.directory)
        manifest, content = await in_thread(lambda: layout.read(source, self._platform))
        if manifests.parse_config(config, source, self._platform, len(manifest.layers)) != content:
            raise TagMoved(f"{source} changed while it was read")
        self._layers.hold(self._owner, content.diff_ids)
        async with group() as layers:
            for digest, diff_id in self._missing(manifest, content).items():
                layers.create_task(self._layers.add(diff_id, layout.blob(digest)))
        return Pulled(digest_of(config), "", self._stack(content.diff_ids), content.config)

    async def _resolve(self, reference: Reference) -> _Resolved:
        name = str(reference)
        raw = await self._session.manifest(f"docker://{name}")
        digest = digest_of(raw)
        if reference.digest:
            _check_digest(raw, reference.digest, name)
        found = manifests.parse_manifest(raw, name)
        own = digest
        if isinstance(found, Index):
            own = manifests.choose(found, self._platform, name).digest
            raw = await self._session.manifest(f"docker://{reference.with_digest(own)}")
            _check_digest(raw, own, name)
            found = manifests.parse_manifest(raw, name)
            if isinstance(found, Index):
                raise BadImage(f"{name} is an index of indexes")
        config = await self._session.config(f"docker://{reference.with_digest(own)}")
        _check_digest(config, found.config.digest, name)
        content = manifests.parse_config(config, name, self._platform, len(found.layers))
        return _Resolved(digest, found, content)

    async def _fetch(self, reference: Reference, resolved: _Resolved, layout: Layout, report: Report) -> None:
        """Have skopeo copy the image by the name it was asked for, and unpack layers as they arrive.

        The name matters: a signature policy judges the tag that was asked for, not just the content.
        skopeo runs even when no layer is missing, for the policy's sake.
        """
        missing = self._missing(resolved.manifest, resolved.content)
        sizes = {layer.digest: layer.size for layer in resolved.manifest.layers}
        await in_thread(lambda: layout.prepare({d: size for d, size in sizes.items() if d not in missing}))
        watch = _Watch(layout, {digest: sizes[digest] for digest in missing}, self._clock, self._stall)
        stages = _Stages(report, str(reference), watch, len(set(resolved.content.diff_ids)), len(missing))
        async with group() as parts:
            copying = parts.create_task(self._session.copy(f"docker://{reference}", layout.directory))
            while not copying.done():
                # Woken by: the copy's end, the next look at what has arrived, or a failed task of the group.
                await asyncio.wait([copying], timeout=POLL_SECONDS)
                for digest in await watch.look():
                    parts.create_task(self._unpack(missing[digest], layout.blob(digest), stages))
                stages.tell(Phase.DOWNLOADING)
            manifest, content = await in_thread(lambda: layout.read(str(reference), self._platform))
            _check_same(reference, resolved, manifest.layers, content)
            stages.tell(Phase.UNPACKING)

    async def _unpack(self, diff_id: str, blob: Path, stages: _Stages) -> None:
        with tracing.span("image.layer", {"vmruntime.layer": diff_id}):
            await self._layers.add(diff_id, blob)
        stages.layer_done()

    def _missing(self, manifest: Manifest, content: Content) -> dict[str, str]:
        """Return diffIDs by blob for the layers that are not on disk, each once."""
        pairs = zip(manifest.layers, content.diff_ids, strict=True)
        return {layer.digest: diff_id for layer, diff_id in pairs if self._layers.get(diff_id) is None}

    def _stack(self, diff_ids: list[str]) -> list[Layer]:
        """Return the layers, each once: of equal layers the topmost hides all that the others have.

        overlayfs refuses the same layer twice.
        """
        top_down = dict.fromkeys(reversed(diff_ids))
        ready = [self._layers.get(diff_id) for diff_id in reversed(top_down)]
        if None in ready:
            raise BadImage("the manifest gives one blob for layers that differ")
        return [layer for layer in ready if layer is not None]


class _Watch:
    """Looks at a layout that is being filled: what is there, how much, and since when nothing came."""

    def __init__(self, layout: Layout, expected: dict[str, int], clock: Clock, stall: float) -> None:
        self._layout = layout
        self._expected = expected
        self._waiting = set(expected)
        self._clock = clock
        self._stall = stall
        self._moved_at = clock.monotonic()
        self.arrived = 0

    @property
    def total(self) -> int:
        """Bytes to come in all."""
        return sum(self._expected.values())

    async def look(self) -> list[str]:
        """Return the blobs that are complete since the last look.

        Raises:
            RegistryUnavailable: Nothing has arrived for too long.
        """
        scan = await in_thread(lambda: self._layout.scan(self._expected))
        now = self._clock.monotonic()
        if scan.bytes != self.arrived:
            self.arrived, self._moved_at = scan.bytes, now
        elif now - self._moved_at > self._stall:
            raise RegistryUnavailable(
                f"nothing has arrived for {self._stall:g} s; {self.arrived} of {self.total} bytes are here",
                remedy="check the registry and the network, or raise images.pull_timeout",
            )
        new = self._waiting & scan.complete
        self._waiting -= new
        return sorted(new)


class _Stages:
    """Tells a pull's progress, each state once."""

    def __init__(self, report: Report, name: str, watch: _Watch, layers: int, missing: int) -> None:
        self._report = report
        self._watch = watch
        self._phase = Phase.DOWNLOADING
        self._last = PullProgress(
            reference=name,
            phase=Phase.RESOLVING,
            total=watch.total,
            layers_total=layers,
            layers_done=max(0, layers - missing),
        )

    def tell(self, phase: Phase) -> None:
        """Report where the pull is now."""
        self._phase = phase
        self._update(self._last.layers_done)

    def layer_done(self) -> None:
        """Count one more layer."""
        self._update(self._last.layers_done + 1)

    def _update(self, layers_done: int) -> None:
        done = min(self._watch.arrived, self._watch.total)
        now = msgspec.structs.replace(self._last, phase=self._phase, done=done, layers_done=layers_done)
        if now != self._last:
            self._last = now
            self._report(now)


def _check_digest(data: bytes, expected: str, name: str) -> None:
    if digest_of(data) != expected:
        raise BadImage(
            f"the image is corrupt: {name} names {expected} but the registry sent {digest_of(data)}",
            remedy="push the image again, or check the mirror it came from",
        )


def _check_same(reference: Reference, resolved: _Resolved, layers: Iterable[Descriptor], content: Content) -> None:
    """What the policy accepted and was fetched has to be what we found out about, in all that we act on."""
    same_layers = [layer.digest for layer in layers] == [layer.digest for layer in resolved.manifest.layers]
    if not same_layers or content != resolved.content:
        raise TagMoved(f"{reference} changed while it was pulled", remedy="pull it again")
