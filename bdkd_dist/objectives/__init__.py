"""What is minimised, as pure functions of logits and targets. Needs torch alone."""

from bdkd_dist.objectives.balances import ABKD, AKL, JSD, Jeffreys, Skew
from bdkd_dist.objectives.base import Losses, Objective, student_names
from bdkd_dist.objectives.bdkd import BDKD
from bdkd_dist.objectives.ce import CE
from bdkd_dist.objectives.competitive import Competitive
from bdkd_dist.objectives.dml import DML
from bdkd_dist.objectives.focal import Focal
from bdkd_dist.objectives.kd import KD
from bdkd_dist.objectives.kdcl import KDCL
from bdkd_dist.objectives.mdca import MDCA
from bdkd_dist.objectives.ps_kd import PSKD
from bdkd_dist.objectives.schedule import ParameterSchedule
from bdkd_dist.objectives.switokd import SwitOKD

OBJECTIVES: dict[str, type[Objective]] = {
    "bdkd": BDKD,
    "ce": CE,
    "kd": KD,
    "dml": DML,
    "kdcl": KDCL,
    "switokd": SwitOKD,
    "competitive": Competitive,
    "ps_kd": PSKD,
    "focal": Focal,
    "mdca": MDCA,
    "jeffreys": Jeffreys,
    "jsd": JSD,
    "skew": Skew,
    "akl": AKL,
    "abkd": ABKD,
}
"""Every objective by the ``name`` that a recipe gives it."""

__all__ = [
    "ABKD",
    "AKL",
    "BDKD",
    "CE",
    "DML",
    "JSD",
    "KD",
    "KDCL",
    "MDCA",
    "OBJECTIVES",
    "PSKD",
    "Competitive",
    "Focal",
    "Jeffreys",
    "Losses",
    "Objective",
    "ParameterSchedule",
    "Skew",
    "SwitOKD",
    "student_names",
]
