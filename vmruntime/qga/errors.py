"""Failures of QEMU guest agents.

    QgaError              the agent refused; its own words
     ├── QgaUnsupported   it does not know the command, or its administrator has switched it off
     ├── QgaNotStarted    it could not start a program
     ├── QgaGone          the connection ended
     ├── QgaSilent        it does not answer in time: there is none, or it hangs
     └── QgaLied          an answer breaks the protocol

All of them are QgaErrors: whoever can do without the agent catches that.
"""

from __future__ import annotations

from vmruntime.errors import Code, VmruntimeError

HOW_TO_ADD = (
    "install and enable it in the guest: apt install qemu-guest-agent (Debian, Ubuntu) or dnf install qemu-guest-agent"
    " (Fedora, RHEL), then systemctl enable --now qemu-guest-agent; or list it under packages of cloud-init"
)


class QgaError(VmruntimeError):
    """Raised when the guest agent refused; the message has its words."""

    code = Code.FAILED_PRECONDITION


class QgaUnsupported(QgaError):
    """Raised when the guest agent does not have a command, or is not to obey it."""

    def __init__(self, command: str) -> None:
        super().__init__(
            f"the QEMU guest agent in the guest does not do {command}",
            remedy="update it, or let it: block-rpcs and allow-rpcs of its configuration say what it may do; Fedora, RHEL"
            " and openSUSE leave out guest-exec by FILTER_RPC_ARGS (older: BLOCK_RPCS, BLACKLIST_RPC) in"
            " /etc/sysconfig/qemu-ga",
        )


class QgaNotStarted(QgaError):
    """Raised when the guest agent could not start a program.

    Attributes:
        missing: There is no such program.
    """

    def __init__(self, message: str, *, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


class QgaGone(QgaError):
    """Raised when the channel to the guest agent ended: the VM did, or somebody else took it."""

    code = Code.UNAVAILABLE

    def __init__(self) -> None:
        super().__init__("the channel to the QEMU guest agent is closed")


class QgaSilent(QgaError):
    """Raised when the guest agent does not answer in time."""

    code = Code.UNAVAILABLE

    def __init__(self, command: str, seconds: float) -> None:
        super().__init__(
            f"no QEMU guest agent answered {command} within {seconds:g} s; the guest may still be starting, or has none",
            remedy=HOW_TO_ADD,
        )


class QgaLied(QgaError):
    """Raised when an answer breaks the protocol: nothing a guest says is trusted."""

    code = Code.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(f"the QEMU guest agent broke the protocol: {message}")
