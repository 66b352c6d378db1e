"""Learn an artifact from a model and text: `run.calibrate` is the whole recipe on one page."""

from fastfill.calibration.run import calibrate

__all__ = ["calibrate"]
