"""A real vLLM server on the loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

STARTS_WITHIN_S = 240

# The command `vllm serve` asks for a distribution named vllm, which the wheel for CPUs is not. Behind it is this.
SHIM = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
ARGUMENTS = [
    "--host=127.0.0.1", "--dtype=float32", "--enforce-eager", "--block-size=32", f"--kv-cache-memory-bytes={64 << 20}",
    "--enable-scale-out",  # else /inference/v1/generate answers 403
    "--disable-uvicorn-access-log",
]  # fmt: skip
# One thread: sums in one order, whatever runs beside it.
ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


class ServedVllm:
    """`ServedVllm(folder, log_path)` starts a server; `ready()` waits until it answers and gives its root."""

    def __init__(self, folder: Path, name: str, log_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log_path = f"http://127.0.0.1:{port}", log_path
        arguments = [f"--model={folder}", f"--served-model-name={name}", f"--port={port}", *ARGUMENTS]
        with open(log_path, "wb") as log:
            # A group of its own: the server's engine is a process beside it.
            self.process = subprocess.Popen(
                [sys.executable, "-c", SHIM, *arguments], env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def ready(self) -> str:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self.url
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log_path.read_text()[-4000:]}")

    def kill(self) -> None:
        """End it and its engine at once, without a last word."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
