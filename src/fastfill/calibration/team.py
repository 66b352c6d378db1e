"""Processes that calibrate together: each takes its share of the text, and results are summed (data parallel).

They are started by `fastfill calibrate --processes N` or by `accelerate launch`; every process runs the same code, ends
with the same weights, and the first one writes. One process is a team of one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastfill.errors import UserError


@dataclass(frozen=True)
class Team:
    """rank: of this process, 0 to size - 1. device: where it computes, in a team of several."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def share(self, n: int) -> slice:
        """This process's part of n things, in order; all of it for a team of one."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, *tensors: torch.Tensor) -> None:
        """Sum tensors over the team, in place; every process gets the same."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def total(self, *values: float) -> list[float]:
        """The same for numbers."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum(tensor)
        return tensor.tolist()

    def place(self, n: int) -> tuple[int, int]:
        """(how many things the processes before this one have, how many all have) if this one has n."""
        counts = [0.0] * self.size
        counts[self.rank] = n
        counts = self.total(*counts)
        return int(sum(counts[: self.rank])), int(sum(counts))


ALONE = Team()


def launched() -> bool:
    """Whether this process was started as one of several. Raises UserError where the environment makes no sense of it."""
    size = _number("WORLD_SIZE", 1, None, default=1)
    if size == 1:
        return False
    for rank in ("RANK", "LOCAL_RANK"):
        _number(rank, 0, size - 1)
    _number("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(_odd("MASTER_ADDR", "the first process's address"))
    return True


def _number(name: str, least: int, most: int | None, default: int | None = None) -> int:
    """The value of an environment variable; the default where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or not least <= int(text) <= (
        int(text) if most is None else most
    ):
        wanted = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
        raise UserError(_odd(name, wanted))
    return int(text)


def _odd(name: str, wanted: str) -> str:
    return (
        f"The environment variable {name} is {os.environ.get(name, '')!r}, not {wanted}; start several processes with "
        "--processes or accelerate launch, or unset WORLD_SIZE."
    )


def join(device: str | torch.device) -> Team:
    """The team this process was started in. device: of the model; in a team on CUDA each process has a GPU of its own.

    Raises UserError without `accelerate`, which connects the processes.
    """
    if not launched():
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UserError("Several processes need the package accelerate; run: pip install 'fastfill[accelerate]'.") from error
    try:
        state = PartialState(cpu=torch.device(device).type == "cpu")
    except Exception as error:  # accelerate and torch.distributed raise many kinds
        raise UserError(f"The {os.environ['WORLD_SIZE']} processes could not be connected: {error}") from error
    return Team(state.process_index, state.num_processes, state.device)


def leave() -> None:
    """At the end of a process: leave the group in good order."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `fastfill ARGUMENTS` as a team of so many processes on this machine and wait. Returns the exit code: 0 if all went
    well, else that of the first that failed; the others are ended then. Output and errors are the first process's; of
    the others only the errors of one that fails first are shown."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = _number("OMP_NUM_THREADS", 1, None, default=max(1, (os.cpu_count() or 1) // processes))
    team: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as errors:
        try:
            for rank in range(processes):
                ranks = {"RANK": rank, "LOCAL_RANK": rank}
                env = os.environ | {k: str(v) for k, v in (shared | ranks).items()} | {"OMP_NUM_THREADS": str(threads)}
                quiet = {"stdout": subprocess.DEVNULL, "stderr": errors} if rank else {}
                team.append(subprocess.Popen([sys.executable, "-m", "fastfill", *arguments], env=env, **quiet))  # type: ignore[call-overload]
            codes: list[int | None] = [None]
            while None in codes and not any(codes):
                time.sleep(0.1)
                codes = [process.poll() for process in team]
            if any(codes):
                with contextlib.suppress(subprocess.TimeoutExpired):  # 2: all find the same, and the first says it
                    team[0].wait(60 if 2 in codes else 5)
                if team[0].poll() != 2:  # 2: what the user can mend, which is the same for all and was said once
                    errors.seek(0)
                    sys.stderr.write(errors.read().decode(errors="replace"))
            return next((max(code, 1) for code in (team[0].poll(), *codes) if code), 0)
        finally:
            for process in team:
                if process.poll() is None:
                    process.terminate()
            for process in team:
                process.wait()
