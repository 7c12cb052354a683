import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from search_samples import lost, numbers, report, searched, trial

from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.figures import save_png
from bdkd_dist.records.search_figures import CHOSEN, FINISHED, curves_figure, frame, pareto_figure, pareto_front
from bdkd_dist.records.search_values_figures import (
    Scale,
    importance_figure,
    importances,
    parallel_figure,
    slice_figure,
)
from bdkd_dist.records.trials import Trial

NLL, PARETO = Goal.parse("nll"), Goal.parse("pareto")
SIX = [
    trial(0, top1=0.60, ece=0.010, nll=1.2),
    trial(1, top1=0.70, ece=0.020, nll=1.0),
    trial(2, top1=0.72, ece=0.060, nll=1.3),
    trial(3, top1=0.69, ece=0.030, nll=1.1),
    trial(4, top1=0.71, ece=0.008, nll=1.4, status="stopped"),
    lost(5),
]


def marks(figure: Figure) -> dict[tuple[float, float], str]:
    """Where each point lies, and its colour, ``none`` for hollow ones."""
    found = {}
    for mark in figure.axes[0].collections:
        x, y = np.asarray(mark.get_offsets())[0]
        face = mark.get_facecolor()
        found[round(x, 3), round(y, 3)] = to_hex(face[0]) if len(face) else "none"
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_point_is_a_trial_and_its_looks_say_how_it_ended() -> None:
    assert marks(pareto_figure(SIX, NLL)) == {
        (60, 1): FINISHED.lower(),
        (70, 2): CHOSEN.lower(),
        (72, 6): FINISHED.lower(),
        (69, 3): FINISHED.lower(),
        (71, 0.8): "none",
    }
    assert "not drawn: 1 failed" in legend(pareto_figure(SIX, NLL))


def test_the_front_is_the_line_below_which_no_finished_trial_lies() -> None:
    assert numbers(pareto_front(SIX, NLL)) == [0, 1, 2]
    axes = pareto_figure(SIX, NLL).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "front"]
    assert line.get_drawstyle() == "steps-pre"  # between two points the height is that of the more accurate one
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    np.testing.assert_allclose(x, [axes.get_xlim()[0], 60, 70, 72, 72])
    np.testing.assert_allclose(y, [1, 1, 2, 6, axes.get_ylim()[1]])


@pytest.mark.parametrize("seed", range(5))
def test_no_finished_trial_dominates_one_of_the_front_and_each_other_one_is_dominated(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 12, (40, 2)) / 20  # coarse: there are ties
    trials = [trial(n, top1=top1, ece=ece, nll=1.0) for n, (top1, ece) in enumerate(values)]
    better = np.array([-1.0, 1.0]) * values
    no_worse = (better[:, None] <= better[None]).all(2)
    beaten = (no_worse & (better[:, None] < better[None]).any(2)).any(0)
    assert sorted(numbers(pareto_front(trials, NLL))) == np.flatnonzero(~beaten).tolist()


def test_the_front_leaves_out_what_misses_a_constraint_and_its_bound_is_drawn() -> None:
    goal = Goal.parse("accuracy", ["student/ece<=0.025"])
    assert numbers(pareto_front(SIX, goal)) == [0, 1]
    figure = pareto_figure(SIX, goal)
    bounds = [line for line in figure.axes[0].lines if np.allclose(line.get_ydata(), 2.5)]
    assert len(bounds) == 1
    assert "ECE ≤ 2.5 %" in [text.get_text() for text in figure.axes[0].texts]
    assert marks(figure)[70, 2] == CHOSEN.lower()


def test_chosen_trials_of_a_front_have_their_numbers_beside_them_unless_they_meet() -> None:
    close = [*SIX, trial(6, top1=0.7001, ece=0.02001, nll=0.9)]
    texts = pareto_figure(close, PARETO).axes[0].texts
    assert {text.get_text(): tuple(text.xy) for text in texts} == {
        "0": pytest.approx((60, 1)),
        "2": pytest.approx((72, 6)),
        "6": pytest.approx((70.01, 2.001)),
    }


def test_outliers_do_not_squeeze_the_picture_and_are_counted() -> None:
    trials = [trial(n, top1=0.7 + n / 1000, ece=0.03 + n / 2000, nll=1.0) for n in range(9)]
    figure = pareto_figure([*trials, trial(9, top1=0.01, ece=0.032, nll=4.6)], NLL)
    left = figure.axes[0].get_xlim()[0]
    assert 65 < left < 70
    assert (round(left, 3), 3.2) in marks(figure), "it lies at the edge"
    assert "1 beyond the edge" in legend(figure)


@pytest.mark.parametrize(
    ("values", "kept", "low", "high"),
    [
        ([10, 11, 12, 13, 90], (), 10, 13),
        ([10, 11, 12, 13, 90], (90,), 10, 90),
        ([99.0, 99.5, 100.0], (), 99, 100),
        ([0.0, 0.1, 0.2], (), 0, 0.2),
        ([50.0, math.nan], (), 50, 50),
    ],
)
def test_a_frame_holds_all_but_outliers(values: list[float], kept: tuple[float, ...], low: float, high: float) -> None:
    left, right = frame(values, kept)
    assert 0 <= left <= low
    assert high <= right <= 100
    assert 0.249 < right - left < 1.2 * max(high - low, 0.6)


def test_curves_go_through_every_report_and_the_chosen_one_is_the_strongest() -> None:
    long = trial(0, nll=0.5)
    long.reports = [report(epoch, 0.1 * epoch, 0.01 * epoch, 2.0 - 0.1 * epoch) for epoch in (1, 2, 4)]
    axes = curves_figure([long, trial(1), lost(2)], NLL).axes
    for panel, factor in zip(axes, (10, 1), strict=True):
        strong = max((line for line in panel.lines if len(line.get_xdata()) > 1), key=lambda line: line.get_linewidth())
        np.testing.assert_array_equal(strong.get_xdata(), [1, 2, 4])
        np.testing.assert_allclose(strong.get_ydata(), np.array([1, 2, 4]) * factor)


def test_numbers_over_more_than_a_decade_are_on_a_logarithmic_axis() -> None:
    scale = Scale.of([0.001, 0.02, 0.1])
    assert (scale.is_log, scale.choices) == (True, None)
    np.testing.assert_allclose([scale.at(v) for v in (0.001, 0.01, 0.1)], [0, 0.5, 1], atol=1e-12)
    assert [(pytest.approx(place), text) for place, text in scale.ticks()][-1] == (pytest.approx(1), "0.1")
    assert not Scale.of([1.0, 3.0, 9.0]).is_log
    assert not Scale.of([-1.0, 3.0, 90.0]).is_log
    np.testing.assert_allclose(Scale.of([2, 4, 6]).at(5), 0.75)


def test_words_lists_and_a_few_numbers_stand_at_even_distances() -> None:
    assert Scale.of([32, 64, 128] * 2).choices == ("32", "64", "128")
    assert Scale.of([32, 64, 128]).choices is None
    assert Scale.of(["soft", "hard", None, True, [1, 2]]).choices == ("[1,2]", "hard", "null", "soft", "true")
    scale = Scale.of(["b", "a"])
    assert [scale.at(value) for value in ("a", "b")] == [0.25, 0.75]
    assert Scale.of([3.0]).at(3.0) == 0.5


def test_parallel_lines_run_from_values_to_figures_with_the_better_end_on_top() -> None:
    trials = [
        trial(0, nll=1.0, top1=0.7, ece=0.02, nu_forward=1.0, gate="hard"),
        trial(1, nll=2.0, top1=0.5, ece=0.08, nu_forward=9.0, gate="soft"),
        trial(2, nll=1.5, top1=0.6, ece=0.05, status="stopped", nu_forward=5.0, gate="hard"),
    ]
    figure = parallel_figure(trials, NLL)
    assert figure is not None
    axes = figure.axes[0]
    lines = [np.asarray(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 5]
    stopped, worst, best = sorted(lines, key=lambda line: (line[0] != 0.5, line[2]))
    np.testing.assert_allclose([stopped[0], worst[0], best[0]], [0.5, 1, 0])
    assert np.isnan(stopped[2:]).all(), "it has seen less than the others"
    assert np.all(best[2:] > worst[2:])  # NLL, top-1, ECE
    order = [line for line in axes.lines if len(line.get_ydata()) == 5]
    assert np.array_equal(np.asarray(order[-1].get_ydata()), best), "the best one is drawn last"
    titles = [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
    assert titles == ["nu_forward", "gate", "student\nNLL", "student\ntop-1 (%)", "student\nECE (%)"]


def test_a_value_that_a_trial_lacks_breaks_its_line() -> None:
    trials = [trial(0, tau=1.0, name="kd"), trial(1, tau=2.0, name="kd"), trial(2, name="ce")]
    figure = parallel_figure(trials, NLL)
    assert figure is not None
    lines = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_ydata()) == 5]
    assert sorted(int(np.isnan(line).sum()) for line in lines) == [0, 0, 1]


def test_nothing_varied_is_nothing_to_draw() -> None:
    same = [trial(number, nu_forward=2.0) for number in range(9)]
    assert parallel_figure(same, NLL) is slice_figure(same, NLL) is importance_figure(same, NLL) is None


def test_slices_show_the_goal_against_each_value() -> None:
    trials = [trial(n, nll=2.0 - 0.1 * n, nu_forward=1.0 + n, temperature=9.0 - n) for n in range(5)]
    figure = slice_figure(trials, NLL)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["nu_forward", "temperature"]
    rising = sorted(tuple(np.asarray(mark.get_offsets())[0]) for mark in figure.axes[0].collections)
    np.testing.assert_allclose(rising, [(n / 4, 2.0 - 0.1 * n) for n in range(5)], atol=1e-12)


def test_importance_is_the_share_of_the_variance_that_a_value_explains() -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(8.0), np.arange(8.0)))
    score = 10 * a + 3 * b  # all different, so that ranks keep the shape
    ranks = (score[:, None] > score).sum(1) + ((score[:, None] == score).sum(1) - 1) / 2
    table = ranks.reshape(8, 8)
    main = np.array([table.mean(0).var(), table.mean(1).var()])  # of a, of b: exact ANOVA on the whole grid
    trials = [
        trial(n, nll=s, nu_forward=x, temperature=y, gate="hard")
        for n, (s, x, y) in enumerate(zip(score, a, b, strict=True))
    ]
    shares = importances([*trials, lost(90), trial(91, nll=0.0, status="stopped")], NLL)
    assert list(shares) == ["objective.nu_forward", "objective.temperature"]
    np.testing.assert_allclose(list(shares.values()), main / main.sum(), atol=0.05)


def test_importance_of_choices_and_lists_is_found_too() -> None:
    trials = [
        trial(n, nll=float(n % 2) + 0.001 * n, gate=("hard", "soft")[n % 2], nu_forward=float(n)) for n in range(12)
    ]
    for one in trials:
        one.values["schedule.milestones"] = [[9, 12], [6]][one.number // 6]
    shares = importances(trials, NLL)
    assert next(iter(shares)) == "objective.gate"
    assert shares["objective.gate"] > 0.5


def test_trials_that_all_reached_the_same_have_nothing_to_explain() -> None:
    trials = [trial(n, nll=0.5, temperature=float(n), nu_forward=float(n % 3)) for n in range(12)]
    assert importances(trials, NLL) == {}


def test_importance_needs_enough_finished_trials_and_two_values() -> None:
    trials = searched(12, constant_epochs=True)
    assert importance_figure(trials[:7], NLL) is None
    assert importance_figure(trials[:8], NLL) is not None
    alone = [
        Trial(t.number, t.name, {"optimizer.lr": t.values["optimizer.lr"]}, "finished", "", t.reports) for t in trials
    ]
    assert importance_figure(alone, NLL) is None


@pytest.mark.parametrize("trials", [[], [lost(0)], [trial(0, status="running", nu_forward=1.0)]])
def test_a_search_with_nothing_finished_has_its_pictures_all_the_same(trials: list[Trial], tmp_path: Path) -> None:
    for number, figure in enumerate((pareto_figure(trials, PARETO), curves_figure(trials, PARETO))):
        save_png(figure, tmp_path / f"{number}.png")
    assert parallel_figure(trials, PARETO) is None


def test_pictures_have_their_sizes_and_are_not_blank(tmp_path: Path) -> None:
    trials = searched()
    sizes = {}
    for draw in (pareto_figure, curves_figure, parallel_figure, slice_figure, importance_figure):
        figure = draw(trials, PARETO)
        assert figure is not None
        save_png(figure, tmp_path / "figure.png")
        image = Image.open(tmp_path / "figure.png")
        sizes[draw.__name__] = image.size
        assert np.asarray(image.convert("L")).std() > 15
    assert sizes["pareto_figure"] == (1024, 864)
    assert sizes["curves_figure"] == (1408, 624)
    assert sizes["parallel_figure"][1] == 736


@pytest.mark.slow
def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from search_samples import searched\n"
        "from bdkd_dist.metrics.goals import Goal\n"
        "from bdkd_dist.records import search_figures, search_values_figures\n"
        "assert 'matplotlib' not in sys.modules and 'optuna' not in sys.modules\n"
        "trials, goal = searched(), Goal.parse('nll')\n"
        "search_figures.pareto_figure(trials, goal), search_figures.curves_figure(trials, goal)\n"
        "search_values_figures.parallel_figure(trials, goal), search_values_figures.slice_figure(trials, goal)\n"
        "assert search_values_figures.importance_figure(trials, goal)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, *sys.path], check=True)
