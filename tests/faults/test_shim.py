"""The shim sees what the kernel sees."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from fault import CALLS
from fault_client import FaultServer
from stages import STAGES, Stages

# strace's names of the calls that the shim counts together.
KINDS = {
    "openat": "openat", "write": "write", "pwrite64": "write", "writev": "write", "sendfile": "write",
    "copy_file_range": "write", "ftruncate": "write", "fsync": "fsync", "fdatasync": "fsync", "close": "close",
    "link": "link", "linkat": "link", "unlink": "unlink", "unlinkat": "unlink", "rmdir": "unlink", "mkdir": "mkdir",
    "mkdirat": "mkdir", "rename": "rename", "renameat": "rename", "renameat2": "rename", "openat2": "openat",
    "pwritev": "write", "pwritev2": "write", "fallocate": "write", "io_uring_enter": "write", "creat": "openat",
}  # fmt: skip
# safetensors gives its file its name by a system call of its own, past libc, inside a folder that nobody sees yet.
OWN_RENAME = re.compile(r"rename\w*\(.*\.tmp/.*\.safetensors\"")
LINE = re.compile(r"(?:\[pid +)?\d*\]? *(\w+)\(")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_it_counts_every_call_that_strace_sees(shim: Path, stages: Stages, tmp_path: Path) -> None:
    log = tmp_path / "strace"
    wanted = ",".join(f"?{name}" for name in KINDS)
    traced = FaultServer(shim, (), ("strace", "-f", "--seccomp-bpf", "-y", "-o", str(log), "-e", f"trace={wanted}"))
    seen, counted = Counter[str](), Counter[str]()
    for stage in STAGES:
        with stages.fresh(stage) as run:
            ended, counts, _ = traced.run(stages.command(stage, run), run)
            assert ended.status == 0, ended
            counted.update(counts)
            seen.update(calls_on(run, log))
    traced.close()
    # A directory stream closes its own descriptor inside libc, after nothing but reading.
    seen["close"] = min(seen["close"], counted["close"])
    assert {call: counted[call] for call in CALLS} == {call: seen[call] for call in CALLS}


def calls_on(run: Path, log: Path) -> Counter[str]:
    """How often a traced process made each call on a run, by the names in its arguments."""
    lines = (line for line in log.read_text(errors="replace").splitlines() if str(run) in line)
    names = (match[1] for line in lines if (match := LINE.match(line)) and not OWN_RENAME.search(line))
    return Counter(KINDS[name] for name in names)
