"""What the machine lacks, where an exception says so: no fault of a file and none of the command."""

import errno

from opd_cache.errors import causes

BY_ERRNO = {
    errno.EMFILE: "too many open files (raise ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "out of memory",
    errno.EAGAIN: "no more processes or threads (raise ulimit -u)",
}
GPU_MEMORY = "out of GPU memory"
# Said in exceptions of no class of their own, by torch, the linker and the interpreter.
BY_TEXT = {
    "can't allocate memory": BY_ERRNO[errno.ENOMEM],
    "Cannot allocate memory": BY_ERRNO[errno.ENOMEM],
    "cannot allocate memory": BY_ERRNO[errno.ENOMEM],
    "failed to map segment": BY_ERRNO[errno.ENOMEM],
    "bad_alloc": BY_ERRNO[errno.ENOMEM],
    "CUDA out of memory": GPU_MEMORY,
    "CUDA error: out of memory": GPU_MEMORY,
    "start new thread": BY_ERRNO[errno.EAGAIN],
    "Resource temporarily unavailable": BY_ERRNO[errno.EAGAIN],
    "Too many open files": BY_ERRNO[errno.EMFILE],
}


def shortage(error: BaseException) -> str | None:
    """What was lacking, in words; None where the error says something else."""
    for one in causes(error):
        if isinstance(one, MemoryError):
            return BY_ERRNO[errno.ENOMEM]
        if isinstance(one, OSError) and one.errno in BY_ERRNO:
            return BY_ERRNO[one.errno]
        if isinstance(one, RuntimeError | ImportError | OSError):
            for text, said in BY_TEXT.items():
                if text in str(one):
                    return said
    return None
