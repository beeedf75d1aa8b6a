"""The log of all faults: FAULT_LOG names the folder that tools/fault_table.py reads."""

import os
from pathlib import Path

import pytest
from fault_log import FaultLog


@pytest.fixture(scope="session")
def faults() -> FaultLog:
    folder = os.environ.get("FAULT_LOG")
    return FaultLog(Path(folder) if folder else None)
