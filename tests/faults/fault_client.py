"""The tests' side of fault_server.py: opd-cache commands in forked children, one of whose system calls goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from fault import Fault
from oracle import Ended

SOURCE = Path(__file__).with_name("faulty_io.c")


class Counted(NamedTuple):
    """How a command ended, how often it made each call on the run directory, and where the fault met it ("": nowhere)."""

    ended: Ended
    counts: Mapping[str, int]
    place: str


def build_shim(folder: Path) -> Path:
    """Compile faulty_io.c, or skip the test."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc) is installed to build tests/faults/faulty_io.c with")
    library = folder / "faulty_io.so"
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class FaultServer:
    """One fault_server.py and its children."""

    def __init__(self, shim: Path, warm_up: Sequence[str] = (), prefix: Sequence[str] = ()) -> None:
        command = [*prefix, sys.executable, str(Path(__file__).with_name("fault_server.py")), *warm_up]
        places = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": places}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(
        self, command: Sequence[str], folder: Path, fault: Fault | None = None, kill_after_s: float | None = None
    ) -> Counted:
        """`opd-cache COMMAND`, with a fault at one of its calls on the folder, or killed from outside."""
        job = {
            "command": command,
            "folder": str(folder),
            "fault": fault and fault.to_job(),
            "kill_after_s": kill_after_s,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Counted(Ended(answer["status"], answer["said"]), answer["counts"], answer["place"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
