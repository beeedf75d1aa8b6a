"""Peak memory of processes, as the kernel counts it for each; and of a GPU, as torch does."""

import resource
import sys
from pathlib import Path


def peak_bytes(pid: int | str = "self") -> int:
    """Peak resident set of a process since it began, or since `forget_peak`. Not ru_maxrss: that one begins with the
    peak of the process that started it."""
    return _status(pid, "VmHWM")


def resident_bytes() -> int:
    """Resident set of this process now."""
    return _status("self", "VmRSS")


def forget_peak() -> None:
    """Let this process's peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def largest_child_bytes() -> int:
    """Peak of the largest process that this one, or a process below it, has waited for; 0 without any."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def device_peak_bytes(device: str) -> int:
    """Peak of this process where it computes: of what torch allocated on a GPU since it began or forgot, else resident."""
    if device == "cpu":
        return peak_bytes()
    return sys.modules["torch"].cuda.max_memory_allocated(device)


def _status(pid: int | str, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
