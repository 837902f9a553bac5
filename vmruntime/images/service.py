"""Pulled images and their layers: what CRI's image service and the making of containers ask for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from secrets import token_hex

import msgspec
import structlog

from vmruntime.clock import Clock
from vmruntime.config.settings import ImageSettings
from vmruntime.errors import FailedPrecondition
from vmruntime.images import archive as archives
from vmruntime.images import reference as references
from vmruntime.images import url_names
from vmruntime.images.auth import auth_file, secrets_of
from vmruntime.images.catalog import Catalog
from vmruntime.images.endpoint import Endpoint
from vmruntime.images.layers import LayerStore
from vmruntime.images.pinned import Pins
from vmruntime.images.platform import Platform, host_platform
from vmruntime.images.progress import Phase, PullProgress, Report
from vmruntime.images.prune import bytes_of, stale
from vmruntime.images.pull import Pull, Pulled
from vmruntime.images.reference import Reference
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.shared import ToldWork
from vmruntime.images.shortnames import ShortNames
from vmruntime.images.skopeo import Session, session
from vmruntime.images.translation import PREFIX
from vmruntime.images.vm_images import VmImages, with_disk
from vmruntime.model.image import DiskImage, Image, ImageConfig, ImageUse, Layer, Pruned, RegistryAuth
from vmruntime.paths import Paths
from vmruntime.store.database import Database
from vmruntime.store.image_records import ImageRecords

log = structlog.get_logger()

_GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class FsUsage:
    """What images take (CRI's FilesystemUsage).

    Attributes:
        mountpoint: A directory on the file system the layers are on.
        used_bytes, used_inodes: Of layers and VM images' disks alone.
    """

    mountpoint: Path
    used_bytes: int
    used_inodes: int


@dataclasses.dataclass(frozen=True)
class _Job:
    """What makes two pulls the same: the name, whose credentials and whose trust; or the place that a URL says."""

    reference: Reference
    auth: RegistryAuth | None
    tls_verify: bool | None
    place: Endpoint | None = None


class ImageService:
    """The images of this host.

    Reads answer from memory; changes are in the store before they are visible. `load` comes first.
    """

    def __init__(
        self,
        paths: Paths,
        database: Database,
        settings: ImageSettings,
        clock: Clock,
        *,
        group_id: int | None = None,
        in_use: Callable[[], set[str]] = set,
        images_in_use: Callable[[], set[str]] = set,
        disks_in_use: Callable[[], set[str]] = set,
        account: str = "",
        platform: Platform | None = None,
        max_layer_bytes: int | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            paths: Where layers are and are made.
            database: Open.
            settings: [images].
            clock: For times of pull and use, and for stalls.
            group_id: The group hypervisors run in, which may read layers; None: root's alone.
            in_use: Returns the diffIDs of layers that containers run on; these stay when their image goes.
            images_in_use: Returns the ids of images that containers have; `prune` leaves them.
            disks_in_use: Returns the digests of VM images' disks that pods use; these stay when their image goes.
            account: Who VMs run as, which may read VM images' disks; empty: root alone may.
            platform: What images have to be for; None: this host's.
            max_layer_bytes: In place of settings.max_layer_gib.
        """
        self._paths = paths
        self._settings = settings
        self._clock = clock
        self._in_use = in_use
        self._images_in_use = images_in_use
        self._disks_in_use = disks_in_use
        self._platform = platform or host_platform()
        self._records = ImageRecords(database)
        self._incoming = ScratchSpace(paths.incoming)
        self._sessions = ScratchSpace(paths.run / "pulls")
        limit = max_layer_bytes or settings.max_layer_gib * _GIB
        self._layers = LayerStore(paths.layers, self._incoming, self._records, limit=limit, group_id=group_id)
        self._vm = VmImages(paths, settings, self._incoming, self._sessions, self.layer_path, account)
        self._names = ShortNames(settings.registries_conf)
        self._catalog = Catalog(resolve=self._names.resolve)
        self._pulls: ToldWork[_Job, Image, PullProgress] = ToldWork()
        # Held from reading the catalog to changing it, so that two pulls do not both take a name.
        self._changing = asyncio.Lock()
        self._pins = Pins(settings.pinned, self._names.resolve)

    async def load(self) -> None:
        """Read the store; an image that has lost a file is forgotten, so that it is pulled again."""
        try:
            await self._names.refresh()
        except FailedPrecondition as error:
            log.error("short names have no aliases", error=str(error))  # pulls say so too; what runs goes on
        images, layers = await self._records.load()
        await self._layers.load(layers)
        whole, _ = await self._vm.load(
            image for image in images if all(self._layers.get(layer.diff_id) for layer in image.layers)
        )
        kept = {image.id for image in whole}
        if broken := [image for image in images if image.id not in kept]:
            log.warning("images with missing files are forgotten", images=[image.id for image in broken])
            await self._records.delete_images(image.id for image in broken)
        self._catalog = Catalog((self._with_pin(image) for image in whole), self._names.resolve)

    async def pull(
        self,
        reference: str,
        auth: RegistryAuth | None = None,
        progress: Report | None = None,
        *,
        tls_verify: bool | None = None,
        for_vm: bool = False,
    ) -> Image:
        """Pull an image, or bring its name up to date; layers that are here are not fetched again.

        Calls for the same name with the same credentials share one pull, which ends when all of them are
        cancelled and then leaves nothing behind.

        Args:
            reference: As people write it; see vmruntime.images.reference. virtlet.cloud/NAME is a VM image by URL, and a
                URL one without a rule, which is called as url_names.name_of() says.
            auth: Credentials for this pull alone. Without them the pull is anonymous: those an administrator
                keeps on the host are not used.
            progress: Called in the event loop whenever the pull gets further; must not raise.
            tls_verify: False accepts any certificate and plain HTTP; None leaves it to registries.conf.
            for_vm: An image pod is to boot it: it has to have a disk that is fit for that.

        Raises:
            InvalidArgument: The reference or the credentials are malformed.
            NotFound: The registry has no such image, or none for this platform.
            PermissionDenied: The registry or the signature policy refuses.
            Unavailable: The registry does not answer, or stopped answering.
            FailedPrecondition: The image is corrupt or cannot run here.
            ResourceExhausted: The disk is full, or a layer or disk is larger than images.max_layer_gib or max_disk_gib.
        """
        if url_names.is_url(reference):
            job = _Job(url_names.name_of(reference), None, None, Endpoint(url=reference))
            return await self._pulls.join(job, lambda tell: self._pull_by_url(job, tell), progress)
        if reference.startswith(PREFIX):
            job = _Job(references.parse(reference), None, None)
            return await self._pulls.join(job, lambda tell: self._pull_by_url(job, tell), progress)
        # Refuses bad credentials before any work. They are for the registry that the name says, which is the default
        # one for a short name: an alias must not lead them to another.
        credentials = auth_file(auth, references.parse(reference).domain)
        await self._names.refresh()
        job = _Job(self._names.resolve(reference), auth, tls_verify)
        image = await self._pulls.join(job, lambda tell: self._pull(job, credentials, tell), progress)
        if for_vm:
            await self.vm_disk(image)
        return image

    async def import_archive(self, source: str, names: Iterable[str] = ()) -> list[Image]:
        """Take in an image from a file or directory on this host.

        Args:
            source: oci:DIR[:REF], oci-archive:FILE[:REF] or docker-archive:FILE[:REF]; absolute paths.
            names: What to call it; default: REF.

        Raises:
            InvalidArgument: `source` or a name is malformed, or there is no name.
            VmruntimeError: As for `pull`.
        """
        archive = archives.parse(source)
        await self._names.refresh()
        tags = [str(name) for name in archive.names(list(names), self._names.resolve)]
        owner = f"import {token_hex(8)}"
        try:
            async with self._incoming.directory() as work, self._session(auth_file(None, ""), []) as skopeo:
                pulled = await self._job(skopeo, owner).from_archive(source, work)
            return [await self._record(pulled, tags, [])]
        finally:
            self._layers.release(owner)

    async def vm_name(self, reference: str) -> str:
        """Return what an image pod means by a reference: virtlet.cloud/NAME where a translation knows NAME.

        Raises:
            FailedPrecondition: A translation file cannot be used; the message names it.
        """
        return reference if self._catalog.get(reference) is not None else await self._vm.name(reference)

    async def vm_disk(self, image: Image) -> tuple[Path, DiskImage]:
        """Return the disk of an image and its file, taken out of a containerDisk's layers when that was not done yet.

        It stays as long as a container has the image (`images_in_use`), or a pod the disk (`disks_in_use`).

        Raises:
            FailedPrecondition: It has none, or one that may not be given to a VM.
            ResourceExhausted: The disk is larger than images.max_disk_gib, or the host's is full.
        """
        known = self._catalog.get(image.id) or image
        disk = known.disk
        if disk is None or self._vm.disks.get(disk.digest) is None:
            disk = await self._take_out(known)
        self._vm.give(image, disk.digest)
        return self._vm.disks.path(disk), disk

    def status(self, reference: str) -> Image | None:
        """Return the image of a name, a digest, or a full or short id; None when there is none.

        Raises:
            InvalidArgument: It is a short id of several images.
        """
        return self._catalog.find(url_names.known_as(reference))

    def list(self) -> list[Image]:
        """Return all images, the oldest first."""
        return self._catalog.all()

    async def remove(self, reference: str) -> None:
        """Remove an image with all its names, by whichever of them or by its id; success when there is none.

        This is CRI's RemoveImage. Layers and disks that nothing else needs are freed; those that containers run on
        stay until `sweep`.
        """
        async with self._changing:
            image = self._catalog.find(url_names.known_as(reference))
            if image is None:
                return
            await self._records.delete_images([image.id])
            self._catalog.drop([image.id])
        log.info("image removed", image=image.id, names=image.repo_tags)
        await self._collect()

    async def sweep(self) -> None:
        """Free what nothing needs: layers, disks, and what interrupted pulls left behind.

        To be called when the daemon has started, with running containers known, and after a container is removed.
        """
        await self._incoming.sweep()
        await self._sessions.sweep()
        await self._vm.urls.sweep()
        await self._layers.sweep()
        await self._vm.disks.sweep(self._disks_in_use)
        await self._collect()

    async def prune(self, unused_seconds: float, *, dry_run: bool = False) -> Pruned:
        """Remove the images that nobody has used for some time, but for pinned ones and those that containers have.

        Args:
            unused_seconds: How long; 0: whatever is not in use.
            dry_run: Only say what would go.
        """
        async with self._changing:
            before = self._clock.now_ns() - int(unused_seconds * 1e9)
            chosen = stale(self._catalog.all(), self._images_in_use(), before)
            ids = [image.id for image in chosen]
            size = bytes_of(chosen, self._layers_needed(without=ids), self._disks_needed(without=ids))
            if dry_run or not chosen:
                return Pruned(images=chosen, freed_bytes=size)
            # Out of memory first, in the same step as the choice: a container that is made while the store is written
            # must not find an image that goes.
            self._catalog.drop(ids)
            try:
                await self._records.delete_images(ids)
            except BaseException:
                self._catalog.put(chosen)
                raise
        log.info("unused images removed", images=ids, unused_seconds=unused_seconds)
        await self._collect()
        return Pruned(images=chosen, freed_bytes=size)

    def uses(self) -> Sequence[ImageUse]:
        """Return all images, the oldest first, and whether containers have them."""
        in_use = self._images_in_use()
        return [ImageUse(image=image, in_use=image.id in in_use) for image in self._catalog.all()]

    async def touch(self, image_ids: Iterable[str]) -> None:
        """Note that images are used now, or have been until now; unknown ones: success."""
        async with self._changing:
            now = self._clock.now_ns()
            known = [image for image_id in image_ids if (image := self._catalog.get(image_id)) is not None]
            used = [msgspec.structs.replace(image, last_used_at=now) for image in known]
            if used:
                await self._records.put_images(used)
                self._catalog.put(used)

    def hold(self, layers: Iterable[Layer], owner: str) -> None:
        """Keep layers on disk until the owner releases them; for the time before `in_use` knows of them."""
        self._layers.hold(owner, (layer.diff_id for layer in layers))

    def release(self, owner: str) -> None:
        """End an owner's holds; success when it has none."""
        self._layers.release(owner)

    def layer_path(self, layer: Layer) -> Path:
        """Return where a layer's EROFS image is."""
        return self._layers.path(layer.diff_id)

    def fs_usage(self) -> FsUsage:
        """Return what layers and VM images' disks take."""
        layers, disks = self._layers.usage(), self._vm.disks.usage()
        return FsUsage(self._paths.layers, layers[0] + disks[0], layers[1] + disks[1])

    async def _pull_by_url(self, job: _Job, tell: Report) -> Image:
        name = job.reference
        owner = f"pull {token_hex(8)}"
        started = self._clock.monotonic()
        try:
            disk = await self._vm.urls.pull(name, owner, tell, job.place)
            pulled = Pulled(id=disk.digest, digest=disk.digest, layers=[], config=ImageConfig())
            image = await self._record(pulled, _tags(name), [name.with_digest(disk.digest)], disk)
        finally:
            self._vm.disks.release(owner)
        self._done(name, image, started, tell)
        return image

    async def _take_out(self, image: Image) -> DiskImage:
        owner = f"disk {token_hex(8)}"
        name = (image.repo_tags or image.repo_digests or [image.id])[0]
        if not image.layers and image.disk is not None:
            raise FailedPrecondition(f"{name}: its disk is not here any more", remedy="pull it again")
        self.hold(image.layers, owner)
        try:
            disk = await self._vm.containers.disk_of(image.layers, name, owner)
            async with self._changing:
                if (current := self._catalog.get(image.id)) is not None:  # else it was removed meanwhile
                    changed = with_disk(current, disk)
                    await self._records.put_images([changed])
                    self._catalog.put([changed])
        finally:
            self.release(owner)
            self._vm.disks.release(owner)
        log.info("disk taken out of its image", image=image.id, disk=disk.digest, format=disk.format)
        return disk

    async def _pull(self, job: _Job, credentials: bytes, tell: Report) -> Image:
        owner = f"pull {token_hex(8)}"
        started = self._clock.monotonic()
        name = job.reference
        try:
            async with (
                self._incoming.directory() as work,
                self._session(credentials, secrets_of(job.auth), job.tls_verify) as skopeo,
            ):
                pulled = await self._job(skopeo, owner).from_registry(name, work, tell)
            image = await self._record(pulled, _tags(name), [name.with_digest(pulled.digest)])
        finally:
            self._layers.release(owner)
        self._done(name, image, started, tell)
        return image

    def _done(self, name: Reference, image: Image, started: float, tell: Report) -> None:
        tell(PullProgress(reference=str(name), phase=Phase.DONE))
        seconds = round(self._clock.monotonic() - started, 3)
        log.info("image pulled", image=image.id, reference=str(name), seconds=seconds)

    def _session(
        self, credentials: bytes, secrets: Sequence[str], tls_verify: bool | None = None
    ) -> AbstractAsyncContextManager[Session]:
        return session(self._settings, self._platform, self._sessions, credentials, secrets, tls_verify)

    def _job(self, skopeo: Session, owner: str) -> Pull:
        stall = self._settings.pull_timeout
        return Pull(skopeo, self._layers, self._platform, self._clock, owner=owner, stall=stall)

    async def _record(
        self, pulled: Pulled, tags: Sequence[str], digests: Sequence[str], disk: DiskImage | None = None
    ) -> Image:
        now = self._clock.now_ns()
        image = Image(
            id=pulled.id,
            repo_tags=[*tags],
            repo_digests=[*digests],
            layers=pulled.layers,
            config=pulled.config,
            size=sum(layer.size for layer in pulled.layers) + (disk.file_size if disk else 0),
            created_at=now,
            last_used_at=now,
            disk=disk,
        )
        async with self._changing:
            changed = [self._with_pin(each) for each in self._catalog.with_image(image)]
            await self._records.put_images(changed)
            self._catalog.put(changed)
        return changed[-1]

    def _with_pin(self, image: Image) -> Image:
        return msgspec.structs.replace(image, pinned=self._pins.cover([*image.repo_tags, *image.repo_digests]))

    async def _collect(self) -> None:
        await self._layers.collect(self._layers_needed)
        await self._vm.disks.collect(self._disks_needed)

    def _layers_needed(self, without: Iterable[str] = ()) -> set[str]:
        return self._catalog.layers_in_use(without) | self._in_use()

    def _disks_needed(self, without: Iterable[str] = ()) -> set[str]:
        return self._catalog.disks_in_use(without) | self._disks_in_use() | self._vm.given(self._images_in_use())


def _tags(name: Reference) -> list[str]:
    return [] if name.digest else [str(name)]
