"""A whole seed: the files of its format, in an image with the label by which cloud-init finds it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmruntime import yamltext
from vmruntime.model.image_pod import SeedFormat
from vmruntime.seed.iso import SIZE_LIMIT, iso_image, write_image
from vmruntime.seed.meta_data import meta_data
from vmruntime.seed.network import network_config, network_data
from vmruntime.seed.request import SeedRequest
from vmruntime.seed.user_data import user_data

LABELS = {SeedFormat.NOCLOUD: "cidata", SeedFormat.CONFIGDRIVE: "config-2"}
_OPENSTACK = "openstack/latest"


def seed_files(request: SeedRequest) -> dict[str, bytes]:
    """Return the files of a seed by path.

    There is no network configuration where the pod wants DHCP, and cloud-init's own default is that.

    Raises:
        NotFound: A ConfigMap or Secret lacks a key.
        InvalidArgument: Something cannot be used; the message names it.
    """
    user, vendor = user_data(request)
    network = None if request.image_pod.force_dhcp else request.network
    files = {}
    if request.image_pod.seed_format is SeedFormat.NOCLOUD:
        files = {"meta-data": meta_data(request), "user-data": user.encode()}
        if vendor:
            files["vendor-data"] = vendor.encode()
        if network is not None:
            files["network-config"] = yamltext.dump(network_config(network, request.dns)).encode()
    else:
        files = {f"{_OPENSTACK}/meta_data.json": meta_data(request), f"{_OPENSTACK}/user_data": user.encode()}
        if vendor:
            files[f"{_OPENSTACK}/vendor_data.json"] = msgspec.json.encode({"cloud-init": vendor})
        if network is not None:
            files[f"{_OPENSTACK}/network_data.json"] = msgspec.json.encode(network_data(network, request.dns))
    return files


def build_seed(request: SeedRequest, out: Path | int, *, limit: int = SIZE_LIMIT) -> None:
    """Write a pod's seed image to a new file or an open descriptor. For use in a thread: it blocks.

    Raises:
        NotFound, InvalidArgument: See seed_files().
        ResourceExhausted: It is larger than `limit` bytes.
        OSError: It cannot be written.
    """
    write_image(iso_image(seed_files(request), LABELS[request.image_pod.seed_format], limit=limit), out)
