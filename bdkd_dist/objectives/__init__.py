"""What is minimised, as pure functions of logits and targets. Needs torch alone."""

from bdkd_dist.objectives.base import Losses, Objective
from bdkd_dist.objectives.bdkd import BDKD
from bdkd_dist.objectives.ce import CE
from bdkd_dist.objectives.dml import DML

OBJECTIVES: dict[str, type[Objective]] = {"bdkd": BDKD, "dml": DML, "ce": CE}
"""Every objective by the ``name`` that a recipe gives it."""

__all__ = ["BDKD", "CE", "DML", "OBJECTIVES", "Losses", "Objective"]
