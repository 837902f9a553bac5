"""What can go wrong between a pod and its network.

VmruntimeError
 ├── NetworkError           a CNI plugin failed, said something unusable, or the kernel refused
 └── NetworkConfigError     a CNI configuration file cannot be used
"""

from __future__ import annotations

from vmruntime.errors import Code, FailedPrecondition, VmruntimeError

TRY_AGAIN_LATER = 11
PLUGIN_NOT_AVAILABLE = 50
LIMITED_CONNECTIVITY = 51


class NetworkError(VmruntimeError):
    """Raised when a pod's network cannot be made, checked or released.

    Attributes:
        cni_code: The plugin's error code (CNI specification, section "Error"); 0 when no plugin gave one.
    """

    code = Code.INTERNAL

    def __init__(self, message: str, *, remedy: str = "", cni_code: int = 0, code: Code = Code.INTERNAL) -> None:
        super().__init__(message, remedy=remedy)
        self.cni_code = cni_code
        self.code = code
        if cni_code in (TRY_AGAIN_LATER, PLUGIN_NOT_AVAILABLE, LIMITED_CONNECTIVITY):
            self.code = Code.UNAVAILABLE


class NetworkConfigError(FailedPrecondition):
    """Raised for a CNI configuration that cannot be used; the message names the file and the key."""
