"""Where a figure comes from, in two lines that stand above it."""

import datetime

from bdkd_dist.records.environment import environment


def header(command: str) -> str:
    """Return date, commit, hardware and versions, and the command as a person would type it."""
    found = environment()
    git, hardware, packages = found["code"]["git"] or {}, found["hardware"], found["packages"]
    commit = git.get("commit", "?")[:7] + (" with changes" if git.get("dirty") else "")
    machine = " and ".join(
        [f"{hardware['cpu']}, {hardware['usable_cores']} cores", *(gpu["name"] for gpu in hardware["gpus"] or [])]
    )
    named = [f"{name} {packages[name]}" for name in ("torch", "ray", "ffcv") if packages[name]]
    versions = ", ".join([f"Python {found['python']}", *named])
    return f"date: {datetime.date.today()}   commit: {commit}   hardware: {machine}; {versions}\ncommand: {command}"
