"""`vmruntime run`."""

from __future__ import annotations

import click

from vmruntime.cli.context import App, pass_app
from vmruntime.cli.images import local_source
from vmruntime.cli.options import STOP_SECONDS, STOP_SECONDS_VM, terminal
from vmruntime.cli.podspec import RunOptions
from vmruntime.cli.quantities import Env, Memory, Pair, Publish, User
from vmruntime.cli.resolv import host_dns
from vmruntime.cli.runner import Runner, RunPolicy
from vmruntime.cli.vm_options import refuse_process_options, vm_options
from vmruntime.cli.vmspec import VmOptions, vm_source
from vmruntime.generated import cri_pb2


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("image")
@click.argument("cmd", nargs=-1)
@click.option("--name", default="", help="Name of the pod; made up from the image when left out.")
@click.option("-e", "--env", multiple=True, type=Env(), help="Environment variable; repeatable.")
@click.option("-m", "--memory", type=Memory(), default=0, metavar="SIZE", help="Memory limit, such as 256M or 1G.")
@click.option("--cpus", type=click.FloatRange(min=0, min_open=True), help="CPU limit, such as 0.5 or 2.")
@click.option("--hostname", default="", help="Host name in the pod; the pod's name when left out.")
@click.option(
    "-p", "--publish", multiple=True, type=Publish(), help="Lead a port of this machine to the pod; repeatable."
)
@click.option("-u", "--user", type=User(), help="Run as this user, by number or name; a group only by number.")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Working directory.")
@click.option("--entrypoint", default="", metavar="PROGRAM", help="Replace the image's entry point.")
@click.option("-l", "--label", multiple=True, type=Pair(), help="Label of pod and container; repeatable.")
@click.option("--annotation", multiple=True, type=Pair(), help="Annotation of the pod; repeatable.")
@click.option(
    "--kind", type=click.Choice(["container", "image", "host"]), help="What to boot; else the daemon's default_kind."
)
@click.option(
    "--pull", type=click.Choice(["missing", "always", "never"]), default="missing", show_default=True,
    help="When to pull the image.",
)  # fmt: skip
@click.option("--rm", is_flag=True, help="Remove the pod when the container has ended.")
@click.option("-d", "--detach", is_flag=True, help="Leave it running; print the ids of the pod and its container.")
@click.option(
    "--stop-timeout", type=click.IntRange(min=0), metavar="SECONDS",
    help=f"After Ctrl-C: time to end by itself.  [default: {STOP_SECONDS}, of a VM {STOP_SECONDS_VM}]",
)  # fmt: skip
@vm_options
@terminal
@pass_app
@click.pass_context
def run(
    ctx: click.Context,
    app: App,
    *,
    image: str,
    cmd: tuple[str, ...],
    name: str,
    env: tuple[tuple[str, str], ...],
    memory: int,
    cpus: float | None,
    hostname: str,
    publish: tuple[cri_pb2.PortMapping, ...],
    user: cri_pb2.LinuxContainerSecurityContext | None,
    workdir: str,
    entrypoint: str,
    label: tuple[tuple[str, str], ...],
    annotation: tuple[tuple[str, str], ...],
    kind: str | None,
    pull: str,
    rm: bool,
    detach: bool,
    stop_timeout: int | None,
    vm: VmOptions | None,
    interactive: bool,
    tty: bool,
) -> None:
    """Run IMAGE in a virtual machine of its own.

    CMD replaces the image's default arguments. What the container writes appears here, and its exit status becomes
    the command's. Ctrl-C stops it; with -t, it goes to the container, and Ctrl-P Ctrl-Q leaves that running. The pod
    stays, stopped, for `logs` and `rm`, unless --rm is given.

    IMAGE may also be on this machine's disk: oci:DIRECTORY, oci-archive:FILE or docker-archive:FILE.

    With --vm, IMAGE is a virtual machine's disk, and what it says on its serial console appears here until it powers
    off: a containerDisk of a registry, virtlet.cloud/NAME, the URL of a qcow2, raw or vmdk file (https, http, file), or
    such a file's path, beginning with / or ./ . It has no CMD, --entrypoint, --user and --workdir; -it joins the
    console. Ctrl-C presses its power button.

    \b
    Examples:
      vmruntime run --rm busybox echo hello
      vmruntime run --rm -it busybox sh
      vmruntime run -d --name web -p 8080:80 -m 256M nginx
      vmruntime run -d --name debian --vm -m 1G --root-size 20G ./debian-12.qcow2
    """  # noqa: D301
    if rm and detach:
        raise click.UsageError("--rm and --detach exclude each other: nobody would be there to remove the pod", ctx=ctx)
    if vm is not None:
        refuse_process_options(entrypoint=entrypoint, user=user, workdir=workdir, cmd=cmd)
    if stop_timeout is None:
        stop_timeout = STOP_SECONDS if vm is None else STOP_SECONDS_VM
    options = RunOptions(
        image=vm_source(image) if vm is not None else local_source(image) or image,
        command=cmd,
        entrypoint=entrypoint,
        name=name,
        hostname=hostname,
        kind=kind or "",
        env=env,
        labels=dict(label),
        annotations=dict(annotation),
        memory=memory,
        cpus=cpus or 0.0,
        ports=publish,
        user=user,
        workdir=workdir,
        stdin=interactive,
        tty=tty,
        dns=host_dns(),
        vm=vm,
    )
    policy = RunPolicy(pull=pull, remove=rm, stop_timeout=stop_timeout, logs=app.logs, streaming=app.settings.streaming)
    runner = Runner(app.connect(), options, policy)
    if detach:
        for identifier in runner.detach():
            click.echo(identifier)
        return
    ctx.exit(runner.run())
