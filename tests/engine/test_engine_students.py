"""Several students, a frozen teacher, and what explains the weighting."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainer import SAMPLES, Noise, Recorder, final_state, trainer

from bdkd_dist import models
from bdkd_dist.engine.checkpoint import Checkpoints, load_teacher
from bdkd_dist.engine.endings import Interrupted
from bdkd_dist.engine.pair import Pair
from bdkd_dist.errors import UserError
from bdkd_dist.objectives import BDKD

TWO_STUDENTS = "models.students=[resnet8,resnet14]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a finished teacher."""
    folder = tmp_path_factory.mktemp("finished")
    trainer(folder / "checkpoints", "objective.name=ce").run()
    return folder


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("objective", ["bdkd", "dml", "kdcl", "ce"])
def test_several_students_learn_and_are_measured_each(tmp_path: Path, objective: str) -> None:
    observer = Recorder()
    made = trainer(tmp_path, TWO_STUDENTS, f"objective.name={objective}", "train.log_every_steps=5", observer=observer)
    before = {name: weights(network) for name, network in made.networks.items()}
    assert list(before) == ["teacher", "student_1", "student_2"]
    made.run()
    for name, network in made.networks.items():
        changed = [not torch.equal(before[name][key], value) for key, value in network.state_dict().items()]
        assert all(changed), name
        assert observer.evaluations[-1].networks[name].metrics["count"] == SAMPLES
        assert f"train/{name}/loss" in observer.steps[-1].scalars
        assert f"lr/{name}" in observer.steps[-1].scalars
    assert {"train/student_1/forward_kl", "train/student_2/entropy_gap_p50"} <= observer.steps[-1].scalars.keys()


def test_several_students_with_averages_stop_and_go_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = [TWO_STUDENTS, "train.ema_decay=0.9"]
    unbroken = trainer(tmp_path / "unbroken", *settings)
    unbroken.run()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *settings, stop_at=3).run()
    resumed = trainer(tmp_path / "cut", *settings)
    resumed.run()
    assert list(unbroken.networks) == ["teacher", "student_1", "student_2", "student_1_ema", "student_2_ema"]
    for name, network in unbroken.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(resumed.networks[name].state_dict()[key], value), f"{name}.{key}"


def test_a_list_of_one_student_is_that_student(tmp_path: Path) -> None:
    one, listed = trainer(tmp_path / "one"), trainer(tmp_path / "listed", "models.students=[resnet8]")
    assert list(one.networks) == list(listed.networks) == ["teacher", "student"]
    assert one.recipe == listed.recipe


def test_the_teacher_of_kd_is_the_finished_one_and_stays_as_it_is(finished: Path, tmp_path: Path) -> None:
    taught = Checkpoints(finished / "checkpoints").load_newest()
    assert taught is not None
    observer = Recorder()
    settings = ["objective.name=kd", f"models.teacher_checkpoint={finished}"]
    made = trainer(tmp_path, *settings, observer=observer)
    made.run()
    for key, value in made.networks["teacher"].state_dict().items():  # running statistics too
        assert torch.equal(value, taught["networks"]["teacher"][key]), key
    made.pair.train()
    assert not made.networks["teacher"].training
    assert made.networks["student"].training
    assert [group["name"] for group in made.stepper.optimizer.param_groups] == ["student"]
    (first, last) = (log.networks for log in observer.evaluations)
    assert first["teacher"].metrics["nll"] == last["teacher"].metrics["nll"]
    assert first["student"].metrics["nll"] != last["student"].metrics["nll"]


def test_a_run_under_way_goes_on_without_the_finished_teachers_file(finished: Path, tmp_path: Path) -> None:
    settings = ["objective.name=kd", f"models.teacher_checkpoint={finished}"]
    unbroken = trainer(tmp_path / "unbroken", *settings)
    unbroken.run()
    moved = tmp_path / "teacher"
    moved.symlink_to(finished)
    settings = ["objective.name=kd", f"models.teacher_checkpoint={moved}"]
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *settings, stop_at=3).run()
    moved.unlink()
    resumed = trainer(tmp_path / "cut", *settings)
    resumed.run()
    for name, network in unbroken.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(resumed.networks[name].state_dict()[key], value), f"{name}.{key}"


def test_a_learning_teacher_may_begin_as_a_finished_one(finished: Path, tmp_path: Path) -> None:
    taught = Checkpoints(finished / "checkpoints").load_newest()
    assert taught is not None
    made = trainer(tmp_path, f"models.teacher_checkpoint={finished}")
    assert torch.equal(made.networks["teacher"].state_dict()["fc.weight"], taught["networks"]["teacher"]["fc.weight"])
    made.run()
    assert not torch.equal(
        made.networks["teacher"].state_dict()["fc.weight"], taught["networks"]["teacher"]["fc.weight"]
    )


def test_a_teacher_is_read_from_a_folder_a_checkpoint_or_a_bare_state(finished: Path, tmp_path: Path) -> None:
    file = max((finished / "checkpoints").glob("*.pt"))
    expected = torch.load(file, weights_only=True)["networks"]["teacher"]
    bare = tmp_path / "bare.pt"
    torch.save(expected, bare)
    for path in (finished, file, bare):
        network = models.build("resnet8", 3)
        load_teacher(network, path)
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_of_a_teachers_cut_checkpoint_the_one_before_is_read(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", folder)
    before, newest = sorted(folder.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    network = models.build("resnet8", 3)
    load_teacher(network, tmp_path)
    expected = torch.load(before, weights_only=True)["networks"]["teacher"]
    assert torch.equal(network.state_dict()["fc.weight"], expected["fc.weight"])


def test_layers_that_a_users_network_froze_stay_frozen() -> None:
    networks: dict[str, torch.nn.Module] = {role: models.build("resnet8", 3) for role in ("teacher", "student")}
    networks["teacher"].get_submodule("conv1").requires_grad_(False)
    pair = Pair(networks, BDKD(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    frozen = [name for name, parameter in pair.networks["teacher"].named_parameters() if not parameter.requires_grad]
    assert frozen == ["conv1.weight"]


@pytest.mark.slow
def test_a_frozen_teacher_on_two_ranks_gives_what_it_gives_on_one(finished: Path, tmp_path: Path) -> None:
    settings = ["objective.name=kd", f"models.teacher_checkpoint={finished}", "optimizer.clip_grad_norm=0.5"]
    settings += ["train.ema_decay=0.9", "optimizer.lr=0.002"]
    one, two = (final_state(tmp_path / str(world), world, *settings) for world in (1, 2))
    for name, network in one["networks"].items():
        for key, value in network.items():
            exact = {"rtol": 0, "atol": 0} if name == "teacher" else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(two["networks"][name][key], value, **exact)


def test_a_teacher_that_is_none_is_one_line(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"networks": [1, 2]}, tmp_path / "other.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    cases = [
        (tmp_path / "absent", "resnet8", 3, "no whole checkpoint there"),
        (tmp_path, "resnet8", 3, "no whole checkpoint there"),
        (tmp_path / "foreign.pt", "resnet8", 3, "holds no weights of a network like models.teacher"),
        (tmp_path / "text.pt", "resnet8", 3, "not a checkpoint"),
        (tmp_path / "other.pt", "resnet8", 3, "not a checkpoint"),
        (finished, "resnet14", 3, "its teacher is another network"),
        (finished, "resnet8", 4, "for another number of classes"),
    ]
    for path, name, classes, words in cases:
        with pytest.raises(UserError, match=f"models.teacher_checkpoint=.*{words}") as caught:
            load_teacher(models.build(name, classes), path)
        assert "\n" not in str(caught.value)


def test_entropies_stand_sample_by_sample_at_the_gates_temperature(tmp_path: Path) -> None:
    observer = Recorder()
    made = trainer(tmp_path, "objective.entropy_temperature=2", observer=observer)
    made.run()
    entropies = observer.evaluations[-1].entropies
    images = torch.cat([batch.images.clone() for batch in Noise().batches(0, np.array_split(np.arange(SAMPLES), 5))])
    for name, network in made.networks.items():
        with torch.no_grad():
            z = network.eval()(made.pair.normalise(images)).double().numpy() / 2
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(entropies[name].numpy(), -(p * np.log(p)).sum(1), rtol=1e-4, atol=1e-5)


def test_gradient_shares_are_recorded_on_request_and_add_up(tmp_path: Path) -> None:
    observer = Recorder()
    trainer(tmp_path, "train.gradient_shares=true", "train.log_every_steps=1", observer=observer).run()
    for log in observer.steps:
        shares = {tag: value for tag, value in log.scalars.items() if "gradient_share" in tag}
        assert set(shares) == {
            *(f"train/student/gradient_share_{term}" for term in ("ce", "forward", "reverse")),
            *(f"train/teacher/gradient_share_{term}" for term in ("ce", "forward")),
        }
        for network in ("student", "teacher"):
            assert sum(v for tag, v in shares.items() if f"/{network}/" in tag) == pytest.approx(1, abs=1e-6)
