"""What a failed call is to look like: the right code, and a message that names the cause and, where there is one, the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc


@contextlib.contextmanager
def refused(code: grpc.StatusCode, *words: str) -> Iterator[None]:
    """Expect the body to fail with a code and a message that has all of these words."""
    try:
        yield
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        details = error.details() or ""
        assert error.code() is code, f"{error.code()}: {details}"
        missing = [word for word in words if word not in details]
        assert not missing, f"not told: {missing} in {details!r}"
        assert "internal error" not in details
    else:
        raise AssertionError(f"succeeded instead of {code.name}")
