import os
import sys
from pathlib import Path

import pytest

from bdkd_dist.launch.programs import beside


def test_a_program_is_named_from_the_current_folder_even_where_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.chdir(folder.parent)
    assert beside("tensorboard") == f"{folder.name}/tensorboard"
    monkeypatch.chdir(tmp_path)
    assert beside("tensorboard") == str(folder / "tensorboard")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert beside("tensorboard") == str(folder / "tensorboard")
    monkeypatch.chdir(tmp_path)
