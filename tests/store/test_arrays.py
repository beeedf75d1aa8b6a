"""Columns that are put together without pa.array: the same as pa.array's, and no pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_cache.store.arrays import array_of, lists_of, record_batch

VALUES = {
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32),
    pa.float64(): st.floats() | st.integers(-1000, 1000),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(),
}


@pytest.mark.parametrize("type_", VALUES, ids=str)
@given(data=st.data())
def test_a_column_is_the_one_that_arrow_makes(type_: pa.DataType, data: st.DataObject) -> None:
    values = data.draw(st.lists(VALUES[type_] | st.none()))
    found, expected = array_of(values, type_), pa.array(values, type_)
    found.validate(full=True)
    assert found.type == type_
    assert found.null_count == expected.null_count
    assert repr(found.to_pylist()) == repr(expected.to_pylist())  # NaN is not equal to itself


@given(st.lists(st.lists(st.integers(-5, 5))))
def test_lists_are_those_that_arrow_makes(values: list[list[int]]) -> None:
    type_ = pa.list_(pa.field("element", pa.int32(), nullable=False))
    found = lists_of([np.array(row, np.int64) for row in values], type_)
    found.validate(full=True)
    assert found.equals(pa.array(values, type_))


@pytest.mark.parametrize(
    ("values", "type_", "error"),
    [
        ([2**31], pa.int32(), OverflowError),
        (np.array([2**40]), pa.int32(), OverflowError),
        ([-1], pa.uint64(), OverflowError),
        ([1.5], pa.int32(), TypeError),
        (["1"], pa.float64(), TypeError),
        ([1], pa.string(), TypeError),
    ],
)
def test_what_does_not_fit_is_refused(values: object, type_: pa.DataType, error: type[Exception]) -> None:
    with pytest.raises(error):
        array_of(values, type_)  # type: ignore[arg-type]


def test_a_list_with_a_number_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        lists_of([[1], [], [2**31]], pa.list_(pa.int32()))


def test_hashes_keep_their_64_bits() -> None:
    hashes = np.array([2**64 - 1, 0, 2**63], np.uint64)
    batch = record_batch({"a": hashes, "b": [1, None, 2]}, pa.schema([("b", pa.int64()), ("a", pa.uint64())]))
    assert batch.to_pydict() == {"b": [1, None, 2], "a": [2**64 - 1, 0, 2**63]}


def test_a_run_imports_no_pandas(task: Path, tmp_path: Path) -> None:
    """datasets and TRL bring it along; pyarrow loads it for half a second wherever it is asked to look at Python values."""
    code = """
import sys
from opd_cache.cli import main
sys.argv = ["opd-cache", *sys.argv[1:]]
try:
    main()
finally:
    print("pandas" in sys.modules)
"""
    command = [
        sys.executable,
        "-c",
        code,
        "run",
        str(task / "recipe.yaml"),
        f"run_dir={tmp_path}/run",
        "num_episodes=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
