"""``train.label_smoothing`` in whole steps, beside torch's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainer import Noise, trainer
from torch.nn import functional as F

from bdkd_dist.data.loader import Batch
from bdkd_dist.engine.optim import set_learning_rate


def one_batch(size: int = 8) -> Batch:
    return next(iter(Noise().batches(0, np.arange(size)[None])))


def test_a_step_is_that_of_torchs_label_smoothing(tmp_path: Path) -> None:
    smooth, plain = (["objective.name=ce", f"train.label_smoothing={share}"] for share in (0.2, 0))
    ours, unsmoothed, peer = (trainer(tmp_path / str(n), *s) for n, s in enumerate((smooth, plain, plain)))
    batch = one_batch()
    for made in (ours, unsmoothed, peer):
        made.pair.train()
    ours._train_step(batch)
    unsmoothed._train_step(batch)
    logits = peer.pair.logits(batch.images)
    sum(F.cross_entropy(z, batch.labels, label_smoothing=0.2) for z in logits.values()).backward()  # type: ignore[union-attr]
    set_learning_rate(peer.stepper.optimizer, peer._learning_rate(0))
    peer.stepper.optimizer.step()
    for name, network in peer.networks.items():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(ours.networks[name].state_dict()[key], value, rtol=1e-4, atol=1e-6)
        moved = (network.state_dict()["fc.weight"] - unsmoothed.networks[name].state_dict()["fc.weight"]).abs().max()
        assert moved > 1e-4, name


def test_mixed_targets_are_smoothed_too(tmp_path: Path) -> None:
    mix = "data.augment.mixup_alpha=1"
    mixed, both = trainer(tmp_path / "1", mix), trainer(tmp_path / "2", mix, "train.label_smoothing=0.3")
    (images, shares), (same, targets) = mixed._on_device(one_batch()), both._on_device(one_batch())
    assert torch.equal(images, same)
    assert ((shares > 0) & (shares < 1)).any()
    torch.testing.assert_close(targets, 0.7 * shares + 0.1)


def test_without_smoothing_labels_stay_labels(tmp_path: Path) -> None:
    batch = one_batch()
    _, targets = trainer(tmp_path, "train.label_smoothing=0")._on_device(batch)
    assert targets.dtype == torch.int64
    assert torch.equal(targets, batch.labels)


@pytest.mark.parametrize("objective", ["bdkd", "kd", "focal", "mdca", "competitive"])
def test_any_objective_takes_smoothed_targets(tmp_path: Path, objective: str) -> None:
    settings = [f"objective.name={objective}", "train.label_smoothing=0.2"]
    if objective == "kd":
        trainer(tmp_path / "finished" / "checkpoints", "objective.name=ce").run()
        settings.append(f"models.teacher_checkpoint={tmp_path / 'finished'}")
    made = trainer(tmp_path / "run", *settings)
    batch = one_batch()
    _, losses = made.pair.eval()(*made._on_device(batch))
    for name, z in made.pair.logits(batch.images).items():
        peer = F.cross_entropy(z, batch.labels, label_smoothing=0.2)
        torch.testing.assert_close(losses.diagnostics[f"{name}/ce"], peer.detach(), rtol=1e-5, atol=1e-6)
    made.run()
    assert made.finished
