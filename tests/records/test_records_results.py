import io
import json
import math
from pathlib import Path
from typing import Any

from records_samples import NAN, diagnosis
from rich.console import Console

from bdkd_dist.records.results import read_results, results_table, write_results


def some_results() -> dict[str, Any]:
    def network(top1: float, temperature: float) -> dict[str, Any]:
        raw = diagnosis(top1).metrics
        scaled, vector = {**raw, "ece": 0.00504, "nll": NAN}, {**raw, "ece": 0.007}
        return {
            "raw": raw,
            "temperature_scaled": scaled,
            "temperature": temperature,
            "vector_scaled": vector,
            "intervals": {"ece": [0.004, 0.021], "auroc": [NAN, NAN]},
        }

    split = {"teacher": network(0.98, 1.234), "student": network(0.97218, 0.9), "student_ema": network(0.975, 1.0)}
    return {"validation": split, "test": split, "step": 500, "epochs": 20}


def test_results_read_back_equal_with_nan_as_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, some_results())

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    plain = json.loads(path.read_text(), parse_constant=refuse)
    assert plain["test"]["teacher"]["temperature_scaled"]["nll"] is None
    back = read_results(path)
    assert math.isnan(back["test"]["teacher"]["temperature_scaled"].pop("nll"))
    assert all(map(math.isnan, back["test"]["teacher"]["intervals"].pop("auroc")))
    expected = some_results()
    del expected["test"]["teacher"]["intervals"]["auroc"]
    del expected["test"]["teacher"]["temperature_scaled"]["nll"]
    assert back["test"]["teacher"] == expected["test"]["teacher"]
    assert (back["step"], back["epochs"]) == (500, 20)


def test_the_table_has_a_row_per_network_and_temperature(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", some_results())
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(read_results(tmp_path / "results.json")))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines() if line.strip(" ─")]
    assert rows == [
        ["test,", "after", "20", "epochs"],
        ["network", "top-1", "%", "ECE", "%", "AdaECE", "%", "NLL", "Brier", "T"],
        ["teacher", "raw", "98.00", "1.25", "1.20", "0.1000", "0.0500", "1.00"],
        ["T-scaled", "98.00", "0.50", "1.20", "–", "0.0500", "1.23"],
        ["V-scaled", "98.00", "0.70", "1.20", "0.1000", "0.0500"],
        ["student", "raw", "97.22", "1.25", "1.20", "0.1000", "0.0500", "1.00"],
        ["T-scaled", "97.22", "0.50", "1.20", "–", "0.0500", "0.90"],
        ["V-scaled", "97.22", "0.70", "1.20", "0.1000", "0.0500"],
        ["student_ema", "raw", "97.50", "1.25", "1.20", "0.1000", "0.0500", "1.00"],
        ["T-scaled", "97.50", "0.50", "1.20", "–", "0.0500", "1.00"],
        ["V-scaled", "97.50", "0.70", "1.20", "0.1000", "0.0500"],
    ]


def test_results_of_an_earlier_version_are_shown_without_what_they_lack() -> None:
    results = some_results()
    for network in results["test"].values():
        del network["vector_scaled"], network["intervals"]
    assert results_table(results).row_count == 6


def test_a_network_with_too_many_classes_for_vector_scaling_has_a_table(tmp_path: Path) -> None:
    results = some_results()
    results["test"]["student"]["vector_scaled"] = None
    write_results(tmp_path / "results.json", results)
    console = Console(file=io.StringIO(), width=100)
    console.print(results_table(read_results(tmp_path / "results.json")))
    assert console.file.getvalue().count("V-scaled") == 2  # type: ignore[attr-defined]
