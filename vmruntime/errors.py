"""Every error vmruntime raises on purpose.

    VmruntimeError            a message for people, the code that crosses the CRI socket
     ├── InvalidArgument      a field of a request or file cannot be used
     ├── NotFound             no such sandbox, container, image
     ├── AlreadyExists        the name or id is taken
     ├── FailedPrecondition   right request, wrong state
     ├── PermissionDenied     a policy or credential refuses
     ├── ResourceExhausted    disk, memory or another limit is used up
     ├── DeadlineExceeded     it took longer than allowed
     ├── Aborted              another request got in the way; try again
     ├── Unavailable          something vmruntime depends on does not answer
     ├── Unimplemented        not built
     └── Internal             a defect, or a helper that misbehaved

Modules raise one of these, or a subclass of their own. Foreign exceptions (OSError, QMPError, grpc.RpcError)
are translated where they enter.
"""

from __future__ import annotations

import enum


class Code(enum.Enum):
    """The status a failure has on the wire; the names and numbers of gRPC's status codes."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class VmruntimeError(Exception):
    """A failure with a cause a person can read and, where there is one, a remedy.

    Attributes:
        message: What went wrong, naming the field, file or program and the value.
        remedy: What to do about it; empty when nothing general can be said.
    """

    code = Code.INTERNAL

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class InvalidArgument(VmruntimeError):
    """Raised when a field of a request or file cannot be used."""

    code = Code.INVALID_ARGUMENT

    @classmethod
    def field(cls, name: str, value: object, why: str, *, remedy: str = "") -> InvalidArgument:
        """Build the error for one field: its name, the offending value and why it cannot be used."""
        return cls(f"{name}: {value!r} {why}", remedy=remedy)


class NotFound(VmruntimeError):
    """Raised when an id or reference names nothing."""

    code = Code.NOT_FOUND


class AlreadyExists(VmruntimeError):
    """Raised when a name or id is taken."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(VmruntimeError):
    """Raised when the request is right but the state is not."""

    code = Code.FAILED_PRECONDITION


class PermissionDenied(VmruntimeError):
    """Raised when a policy or a credential refuses."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(VmruntimeError):
    """Raised when a disk, memory or another limit is used up."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(VmruntimeError):
    """Raised when an operation took longer than it was allowed."""

    code = Code.DEADLINE_EXCEEDED


class Aborted(VmruntimeError):
    """Raised when another request got in the way; the same request may succeed later."""

    code = Code.ABORTED


class Unavailable(VmruntimeError):
    """Raised when something vmruntime depends on does not answer."""

    code = Code.UNAVAILABLE


class Unimplemented(VmruntimeError):
    """Raised for what this version does not do."""

    code = Code.UNIMPLEMENTED


class Internal(VmruntimeError):
    """Raised for a defect, or when a helper program misbehaved."""

    code = Code.INTERNAL
