"""Accuracy and calibration as states that add up over batches and ranks, and temperature scaling. Needs torch alone."""

from bdkd_dist.metrics.calibration import CalibrationState, Reliability
from bdkd_dist.metrics.temperature import fit_temperature

__all__ = ["CalibrationState", "Reliability", "fit_temperature"]
