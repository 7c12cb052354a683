import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from records_samples import NAN, diagnosis

from bdkd_dist.engine.observer import NetworkDiagnosis
from bdkd_dist.metrics import Reliability
from bdkd_dist.records.figures import reliability_figure, save_png


def test_a_png_has_its_size_and_is_not_blank(tmp_path: Path) -> None:
    save_png(reliability_figure({"teacher": diagnosis(), "student": diagnosis()}), tmp_path / "r.png")
    image = Image.open(tmp_path / "r.png")
    assert image.size == (1056, 752)  # 6.6 × 4.7 inches at 160 dots per inch
    assert np.asarray(image.convert("L")).std() > 20
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]


def test_bars_stand_where_the_bins_and_their_gaps_are() -> None:
    bins = Reliability((0.0, 0.5, 0.8, 1.0), (0, 40, 60), (NAN, 0.9, 0.75), (NAN, 0.6, 0.95))
    upper, lower = reliability_figure({"student": NetworkDiagnosis(diagnosis().metrics, bins)}).axes
    bars = [
        (round(bar.get_x()), round(bar.get_width()), round(bar.get_y()), round(bar.get_height()))
        for bar in upper.patches
        if np.isfinite(bar.get_height())
    ]
    accuracy = [(50, 30, 0, 90), (80, 20, 0, 75)]
    over, under = (80, 20, 75, 20), (50, 30, 90, -30)
    assert sorted(bars) == sorted([*accuracy, over, under])
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([0, 40, 60])
    assert [text.get_text() for text in upper.texts] == ["student", "ECE 1.25 %   accuracy 97.20 %"]


def test_bins_of_hardly_any_samples_are_pale() -> None:
    bins = Reliability((0.0, 0.5, 1.0), (1, 999), (1.0, 0.9), (0.4, 0.9))
    upper, _ = reliability_figure({"student": NetworkDiagnosis(diagnosis().metrics, bins)}).axes
    alpha = {round(bar.get_x()): bar.get_alpha() for bar in upper.patches}
    assert alpha[0] < 0.5 < alpha[50]


def test_a_network_without_samples_has_an_empty_diagram(tmp_path: Path) -> None:
    empty = NetworkDiagnosis(
        dict.fromkeys(diagnosis().metrics, NAN), Reliability((0.0, 0.5, 1.0), (0, 0), (NAN, NAN), (NAN, NAN))
    )
    save_png(reliability_figure({"student": empty}), tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size == (528, 752)


@pytest.mark.slow
def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from records_samples import diagnosis\n"
        "from bdkd_dist.records import tensorboard, figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "tensorboard._pixels(figures.reliability_figure({'student': diagnosis()}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, *sys.path], check=True)


def test_the_legend_fits_below_one_network_and_below_two() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for names in (("student",), ("student", "teacher")):
        figure = reliability_figure({name: diagnosis(0.9) for name in names})
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        extent = legend.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width
