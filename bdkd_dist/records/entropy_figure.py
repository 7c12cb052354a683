"""The figure of entropies: on which samples a student is surer than its teacher, and which divergence that boosts."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bdkd_dist.records.figures import DASHES, INK, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 2000
"""Samples drawn at most, evenly spaced over the split."""
SIDE_IN = 4.2
# Okabe and Ito's palette, as in the reliability diagram: over-confident is vermilion there too.
COLOURS = {"forward": "#D55E00", "reverse": "#009E73"}


def entropy_figure(student: torch.Tensor, teacher: torch.Tensor, name: str = "student") -> "Figure":
    """Draw the entropy of a student against its teacher's, sample by sample.

    Above the diagonal the student is the less sure one, and BD-KD boosts the reverse divergence, KL(p_s‖p_t), which
    sharpens it; below it is the surer one, and the forward divergence, KL(p_t‖p_s), is boosted, which softens it.
    Objectives without a gate boost neither; the sides say as much of the networks all the same.

    Args:
        student: (N,) entropies in nats.
        teacher: (N,) in the same order.
        name: The student's.

    Returns:
        The figure, 4.2 inches wide, 100 dots per inch.
    """
    step = max(1, -(-len(student) // POINTS))
    x, y = teacher[::step].numpy(), student[::step].numpy()
    shares = {
        "reverse": float((student > teacher).float().mean()),
        "forward": float((student < teacher).float().mean()),
    }
    top = 1.05 * max(0.1, float(np.max(x, initial=0)), float(np.max(y, initial=0)))

    figure = new_figure(SIDE_IN, SIDE_IN)
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.11, top=0.84)
    for term, chosen, side in (("reverse", y > x, "less sure"), ("forward", y < x, "surer")):
        label = f"{side} on {shares[term]:.0%}: BD-KD boosts {term}".replace("%", " %")
        axes.scatter(x[chosen], y[chosen], s=7, alpha=0.5, linewidths=0, color=COLOURS[term], label=label)
    axes.plot([0, top], [0, top], color=INK, linewidth=1, linestyle=DASHES)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_aspect("equal")
    axes.set_xlabel("teacher's entropy (nats)", color=INK, fontsize=9)
    axes.set_ylabel(f"{name}'s entropy (nats)", color=INK, fontsize=9)
    style(axes)
    axes.text(0, 1.14, f"{name} against its teacher", transform=axes.transAxes, fontsize=11, color=INK, weight="bold")
    legend: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (-0.02, 0.99),
        "frameon": False,
        "borderaxespad": 0.2,
    }
    axes.legend(**legend, fontsize=8, markerscale=2, handletextpad=0.1, labelspacing=0.2)
    return figure
