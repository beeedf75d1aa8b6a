"""Columns of Arrow tables from Python values and NumPy arrays, without pa.array: that imports pandas wherever it is
installed, more than half a second in every process."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def array_of(values: Iterable, type_: pa.DataType) -> pa.Array:
    """A column of numbers, booleans or texts; None is null. Raises TypeError, OverflowError on what does not fit."""
    if isinstance(values, np.ndarray):
        return _array(type_, len(values), None, _data(values, type_))
    values = list(values)
    is_null = np.array([value is None for value in values], bool)
    nulls = _bits(~is_null) if is_null.any() else None
    if pa.types.is_string(type_):
        return _array(type_, len(values), nulls, *_texts(["" if value is None else value for value in values]))
    return _array(type_, len(values), nulls, _data([0 if value is None else value for value in values], type_))


def lists_of(values: Sequence[Sequence], type_: pa.ListType) -> pa.ListArray:
    """A column of lists of numbers, one sequence a row. Raises what array_of does."""
    offsets = _offsets([len(row) for row in values])
    filled = [row for row in values if len(row)]  # an empty list would make floats of all
    inner = array_of(np.concatenate(filled) if filled else np.zeros(0), type_.value_type)
    return pa.ListArray.from_arrays(array_of(offsets, pa.int32()), inner, type=type_)


def record_batch(columns: Mapping[str, Iterable], schema: pa.Schema) -> pa.RecordBatch:
    """Values by column, of list columns one sequence a row, in the order and the types of a schema."""
    arrays = [
        lists_of(list(columns[field.name]), field.type)
        if pa.types.is_list(field.type)
        else array_of(columns[field.name], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(type_: pa.DataType, length: int, nulls: pa.Buffer | None, *buffers: pa.Buffer) -> pa.Array:
    return pa.Array.from_buffers(type_, length, [nulls, *buffers])


def _data(values: Sequence | npt.NDArray, type_: pa.DataType) -> pa.Buffer:
    if pa.types.is_boolean(type_):
        return _bits(np.asarray(values, bool))
    given, dtype = np.asarray(values), np.dtype(type_.to_pandas_dtype())
    if given.size and given.dtype.kind not in ("iub" if dtype.kind in "iu" else "iubf"):
        raise TypeError(f"found {given.dtype}, expected {type_}")
    found = np.ascontiguousarray(given, dtype)
    if dtype.kind in "iu" and not np.array_equal(found, given):
        raise OverflowError(f"found {given.min()} to {given.max()}, expected {type_}")
    return pa.py_buffer(found)


def _texts(texts: list[str]) -> tuple[pa.Buffer, pa.Buffer]:
    joined = "".join(texts)
    if joined.isascii():
        return pa.py_buffer(_offsets([len(text) for text in texts])), pa.py_buffer(joined.encode("ascii"))
    encoded = [text.encode() for text in texts]
    return pa.py_buffer(_offsets([len(text) for text in encoded])), pa.py_buffer(b"".join(encoded))


def _offsets(lengths: list[int]) -> npt.NDArray[np.int32]:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
