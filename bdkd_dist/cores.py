"""How many CPU cores this process may use, for what shares them out."""

import joblib


def usable_cores() -> int:
    """Return the cores of this process's affinity mask, or its container's CPU limit (rounded up) where that is less.

    ``LOKY_MAX_CPU_COUNT`` in the environment lowers it further, as it does for scikit-learn.

    More threads than that would not only wait for each other: a container that has used up its limit stands still, the
    training thread too, until the next period begins.
    """
    return joblib.cpu_count()
