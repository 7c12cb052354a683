"""The Kubernetes files against a strict schema of KubeRay's resources, and what they promise beyond it."""

import copy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from kuberay_schema import SCHEMAS

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = {"RayCluster": "kuberay-raycluster.yaml", "RayJob": "kuberay-rayjob.yaml"}
KINDS = pytest.mark.parametrize("kind", FILES)


def read(kind: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / FILES[kind]).read_text())


def check(resource: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[resource["kind"]]).validate(resource)


def cluster_spec(kind: str) -> dict[str, Any]:
    spec = read(kind)["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


def groups(kind: str) -> list[dict[str, Any]]:
    spec = cluster_spec(kind)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each key that Kubernetes gives a meaning to."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in branches:
        if isinstance(tree, dict):
            yield (*path, key)
        if key not in ("rayStartParams", "requests", "limits"):
            yield from paths(value, (*path, key))


@KINDS
def test_the_file_fits_the_resource(kind: str) -> None:
    resource = read(kind)
    assert resource["kind"] == kind
    check(resource)


@KINDS
def test_any_misspelt_key_fails(kind: str) -> None:
    resource = read(kind)
    misspelt = 0
    for *parents, key in paths(resource):
        wrong = copy.deepcopy(resource)
        place = wrong
        for parent in parents:
            place = place[parent]
        place[f"{key}x"] = place.pop(key)
        with pytest.raises(jsonschema.ValidationError):
            check({**wrong, "kind": kind})
        misspelt += 1
    assert misspelt > 60


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("authOptions", "mode"), "tokens"),
        (("headGroupSpec", "serviceType"), "Public"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"), "64 GB"),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "envFrom", 0, "secretRef", "optional"), "yes"),
        (("headGroupSpec", "template", "spec", "volumes", 0), {"name": "shared"}),
    ],
)
def test_a_value_of_the_wrong_kind_fails(path: tuple[Any, ...], value: object) -> None:
    resource = read("RayCluster")
    place = resource["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(resource)


@KINDS
def test_ray_is_the_version_that_is_locked(kind: str) -> None:
    assert cluster_spec(kind)["rayVersion"] == ray.__version__


@KINDS
def test_every_volume_that_is_mounted_is_there(kind: str) -> None:
    for group in groups(kind):
        pod = group["template"]["spec"]
        volumes = [volume["name"] for volume in pod["volumes"]]
        mounted = [mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounted)


@KINDS
def test_probes_of_ours_do_not_need_tools_that_the_image_lacks(kind: str) -> None:
    for group in groups(kind):
        for container in group["template"]["spec"]["containers"]:
            for probe in ("readinessProbe", "livenessProbe"):
                assert "httpGet" in container[probe] or container[probe]["exec"]["command"][0] == "python"


@KINDS
def test_workers_scale_between_bounds_and_the_head_takes_none(kind: str) -> None:
    spec = cluster_spec(kind)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_a_command_that_is_a_recipe_of_ours() -> None:
    from bdkd_dist import config

    program, command, recipe, *overrides = shlex.split(read("RayJob")["spec"]["entrypoint"])
    assert (program, command) == ("bdkd", "train")
    config.load(recipe, overrides)


@KINDS
def test_no_token_is_written_and_every_pod_is_unprivileged(kind: str) -> None:
    assert cluster_spec(kind)["authOptions"] == {"mode": "token"}
    for group in groups(kind):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not [variable for variable in container.get("env", []) if "value" in variable]
