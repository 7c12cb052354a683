"""The parts of ``benchmarks/trial_overhead.py`` that need no cluster."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_same_training_runs_here_and_its_seeds_are_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trial_overhead

    from bdkd_dist.launch.tune.space import load_space

    recipe = trial_overhead.recipe_of(tmp_path, epochs=1)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_limit": 128})})
    monkeypatch.setattr(trial_overhead, "WARM_RUNS", 1)
    assert trial_overhead.warm_training_s(recipe) > 0
    assert len(list(tmp_path.glob("warm-*/checkpoints/step-00000002.pt"))) == 2
    (tmp_path / "seeds.py").write_text(trial_overhead.SPACE.format(trials=3))
    draws = load_space(str(tmp_path / "seeds.py"), recipe).draws(5, 0)
    assert [draw["train.seed"] for draw in draws] == [0, 1, 2]
