"""How a training ends before its last epoch, with its state kept."""

from bdkd_dist.errors import Fault, Interruption


class Interrupted(Interruption):
    """The run was asked to stop; its state is in ``checkpoint``."""

    def __init__(self, step: int, checkpoint: str):
        super().__init__(f"stopped after step {step}; checkpoint {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


class Diverged(Fault):
    """A loss is no longer finite: ``what`` happened, and what may help."""

    def __init__(self, what: str, advice: str = ""):
        super().__init__("; ".join(filter(None, (what, advice))))
        self.what = what
