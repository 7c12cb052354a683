"""How a training ends before its last epoch, with its state kept."""


class Interrupted(Exception):
    """The run was asked to stop; its state is in ``checkpoint``."""

    def __init__(self, step: int, checkpoint: str):
        super().__init__(f"stopped after step {step}; checkpoint {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


class Diverged(RuntimeError):
    """A loss is no longer finite: ``what`` happened, and what may help."""

    def __init__(self, what: str, advice: str = ""):
        super().__init__("; ".join(filter(None, (what, advice))))
        self.what = what
