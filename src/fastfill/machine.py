"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastfill.kernels import cpu


def cpu_model() -> str:
    with suppress(OSError):  # not every system has it
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[-1].strip()
    return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Processor, threads and versions, for every result that is kept. isa: the instruction set of the native kernels."""
    versions = {"torch": str(torch.__version__)}  # says the build, 2.6.0+cu124, where the package's name does not
    for package in ("fastfill", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu_model(),
        "isa": cpu.isa() if cpu.isas() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


def processor(machine: dict[str, Any]) -> str:
    """Of what `describe` gave, now or in an older version: the processor and the instruction set of the kernels, for people."""
    return f"{machine['cpu']} ({machine['isa']})" if machine.get("isa") else str(machine["cpu"])
