"""Protobuf messages as nobody would send them: hypothesis strategies made from descriptors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

NUMBERS: Mapping[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.one_of(st.integers(-2, 256), st.integers(-(2**31), 2**31 - 1)),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.one_of(st.integers(-2, 2), st.integers(-(2**63), 2**63 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.one_of(st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)),
}


@st.composite
def messages(
    draw: st.DrawFn, descriptor: Descriptor, texts: st.SearchStrategy[str], octets: st.SearchStrategy[bytes]
) -> Message:
    """Draw a message whose fields, and theirs, are filled in more often than not.

    Args:
        draw: Hypothesis's.
        descriptor: Of the message.
        texts: What strings may be.
        octets: What bytes may be.
    """
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        # Required parts are mostly there, or nothing but "is required" would ever be seen.
        if draw(st.integers(0, 3)) > 0:
            _fill(draw, message, field, texts, octets)
    return message


def _fill(
    draw: st.DrawFn,
    message: Any,
    field: FieldDescriptor,
    texts: st.SearchStrategy[str],
    octets: st.SearchStrategy[bytes],
) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        for key, value in draw(st.dictionaries(texts, texts, max_size=2)).items():
            getattr(message, field.name)[key] = value
        return
    value_of = messages(kind, texts, octets) if kind is not None else _scalar(field, texts, octets)
    if field.is_repeated:
        target = getattr(message, field.name)
        for _ in range(draw(st.integers(0, 2))):
            target.append(draw(value_of))
    elif kind is not None:
        getattr(message, field.name).CopyFrom(draw(value_of))
    else:
        setattr(message, field.name, draw(value_of))


def _scalar(
    field: FieldDescriptor, texts: st.SearchStrategy[str], octets: st.SearchStrategy[bytes]
) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return octets
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return texts
    return NUMBERS[field.cpp_type]


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Draw bytes that were cut short, or some of which were changed, or that never were a message."""
    data = bytearray(draw(whole))
    how = draw(st.sampled_from(["cut", "changed", "rubbish"]))
    if how == "rubbish" or not data:
        return draw(st.binary(max_size=64))
    if how == "cut":
        return bytes(data[: draw(st.integers(0, len(data) - 1))])
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)
