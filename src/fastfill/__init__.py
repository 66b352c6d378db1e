"""fastfill: faster LLM prefill by predictive feed-forward sparsity.

An independent implementation of the system of "Fast Forward: Accelerating LLM Prefill with Predictive FFN Sparsity"
(arXiv 2602.00397). Importing the package loads nothing heavy and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfill.artifact import Artifact
    from fastfill.attachment import Attachment, attach, detach
    from fastfill.calibration import calibrate
    from fastfill.config import CalibrationConfig, PrefillConfig
    from fastfill.errors import UserError

__version__ = "0.1.0"
__all__ = ["Artifact", "Attachment", "CalibrationConfig", "PrefillConfig", "UserError", "attach", "calibrate", "detach"]

_HOME = {
    "Artifact": "fastfill.artifact",
    "Attachment": "fastfill.attachment",
    "attach": "fastfill.attachment",
    "detach": "fastfill.attachment",
    "calibrate": "fastfill.calibration",
    "CalibrationConfig": "fastfill.config",
    "PrefillConfig": "fastfill.config",
    "UserError": "fastfill.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastfill' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
