"""`bdkd export`: the file gives, without this package, what the run found of its images."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import BDKD, command, execute, reached
from torch import Tensor, nn

from bdkd_dist import config
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.dataset import load_dataset
from bdkd_dist.data.loader import open_loader
from bdkd_dist.engine.deploy import exported
from bdkd_dist.errors import UserError

CLASSIFY = """
import json, sys
import torch

said = {"classifier.json": ""}
network = torch.export.load(sys.argv[1], extra_files=said).module()
images = torch.load(sys.argv[2])
logits = torch.cat([network(images[:1]), network(images[1:])])
assert not [name for name in sys.modules if name.startswith(("bdkd_dist", "ray"))]
torch.save(logits, sys.argv[3])
print(json.dumps(json.loads(said["classifier.json"])))
"""


def classified(file: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the logits of an exported network in a process that has never heard of this package, and what it says."""
    places = [file, file.with_name("images.pt"), file.with_name("logits.pt")]
    torch.save(images, places[1])
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFY, *map(str, places)], capture_output=True, text=True, cwd=file.parent
    )
    assert done.returncode == 0, done.stderr
    return torch.load(places[2]), json.loads(done.stdout)


@pytest.mark.slow
class TestARun:
    @pytest.fixture(scope="class")
    def run(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        storage = tmp_path_factory.mktemp("runs")
        execute(command(cache, storage, "train.epochs=1", "train.ema_decay=0.5", "data.loader=torch"))
        return storage / "run"

    @pytest.fixture(scope="class")
    def images(self, run: Path) -> Tensor:
        """The test split's, as they come to the networks."""
        recipe = config.load(str(run / "recipe.yaml"))
        dataset = load_dataset(recipe.data)
        loader = open_loader(
            "torch", dataset.test.beton, Transform.evaluation(recipe.data), 1, "os", torch.device("cpu")
        )
        try:
            (batch,) = loader.batches(0, [np.asarray(dataset.test.indices)])
            return batch.images.clone()
        finally:
            loader.close()

    @pytest.mark.parametrize("network", ["student", "teacher", "student_ema"])
    def test_the_file_gives_the_runs_predictions_and_says_what_it_is(
        self, run: Path, images: Tensor, network: str, tmp_path: Path
    ) -> None:
        done = execute([str(BDKD), "export", str(run), str(tmp_path / "net.pt2"), "--network", network])
        assert "takes (N, 32, 32, 3) uint8 RGB, gives (N, 10) float32 logits" in done.stdout
        logits, said = classified(tmp_path / "net.pt2", images)
        predictions = pq.read_table(run / "predictions/test.parquet")
        confidence, classes = logits.double().softmax(1).max(1)
        np.testing.assert_allclose(confidence, predictions[f"{network}_confidence"], atol=1e-5)
        assert classes.tolist() == [top[0] for top in predictions[f"{network}_top5"].to_pylist()]
        result = json.loads((run / "results.json").read_text())
        measured = result["test"][network]
        assert said["network"] == network
        assert said["architecture"] == ("resnet14" if network == "teacher" else "resnet8")
        assert (said["step"], said["image_px"], said["eval_crop"]) == (result["step"], 32, 1.0)
        assert said["classes"] == [str(digit) for digit in range(10)]
        assert said["temperature"] == measured["temperature"]
        assert said["test"] == {key: measured["raw"][key] for key in ("top1", "ece", "nll")}

    def test_mistakes_are_one_line_and_leave_an_earlier_file_alone(self, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "net.pt2"
        out.write_text("earlier")
        wrong = execute([str(BDKD), "export", str(run), str(out), "--network", "studnt"], status=2)
        assert wrong.stderr.splitlines() == [
            "unknown --network 'studnt'; did you mean 'student'? (allowed: student, student_ema, teacher)"
        ]
        nowhere = execute([str(BDKD), "export", str(run), str(tmp_path / "none/net.pt2")], status=2)
        assert nowhere.stderr.splitlines() == [
            f"OUT {tmp_path}/none/net.pt2: the folder {tmp_path}/none does not exist"
        ]
        no_run = execute([str(BDKD), "export", str(tmp_path), str(out)], status=2)
        assert no_run.stderr.splitlines() == [f"{tmp_path} is not a run folder (it holds no recipe.yaml)"]
        altered = shutil.copytree(run, tmp_path / "altered")
        recipe = (run / "recipe.yaml").read_text()
        (altered / "recipe.yaml").write_text(recipe.replace("student: resnet8", "student: resnet20"))
        other = execute([str(BDKD), "export", str(altered), str(out)], status=2)
        assert other.stderr.splitlines() == [f"{altered}: its student is another network than resnet20 is now"]
        assert out.read_text() == "earlier"

    def test_of_a_checkpoint_amid_a_run_nothing_is_said_that_was_not_measured(
        self, run: Path, cache: Path, tmp_path: Path
    ) -> None:
        execute(command(cache, tmp_path, "train.epochs=2", "data.loader=torch"))
        kept = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))
        assert reached(tmp_path / "run", 10)()
        execute([str(BDKD), "export", str(kept[0]), str(tmp_path / "net.pt2")])
        _, said = classified(tmp_path / "net.pt2", torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
        assert said["step"] == int(kept[0].stem[5:]) < 10
        assert (said["classes"], said["temperature"], said["test"]) == (None, None, None)


class Undecided(nn.Module):
    """A network that goes another way by what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))


def test_a_network_that_torch_cannot_follow_is_said() -> None:
    with pytest.raises(UserError, match=r"^torch\.export cannot follow the network \(\w+: .*\)$"):
        exported(Undecided(), config.load("digits").data, "{}")
