"""The files for ``ray up``: Ray's own validation, its AWS bootstrap against a stand-in of EC2, what they promise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = pytest.mark.parametrize("name", ["aws", "onprem"])
REGION = "us-east-1"


def text(name: str) -> str:
    return (CLUSTER / f"ray-up-{name}.yaml").read_text()


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Do with a configuration what ``ray up`` does first."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return config


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


@FILES
def test_ray_takes_the_file(name: str) -> None:
    config = prepared(read(name))
    assert config["head_node_type"] in config["available_node_types"]


@FILES
@pytest.mark.parametrize("key", ["max_workers", "auth", "file_mounts", "setup_commands", "worker_start_ray_commands"])
def test_ray_refuses_a_misspelt_key(name: str, key: str) -> None:
    config = read(name)
    config[f"{key}x"] = config.pop(key)
    with pytest.raises(jsonschema.ValidationError):
        prepared(config)


@FILES
def test_what_is_copied_to_the_nodes_is_there_and_enough_to_set_one_up(name: str) -> None:
    mounts = read(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    root = CLUSTER.parent
    for there, here in mounts.items():
        assert there == f"~/bdkd-dist/{here}"
        assert (root / here).exists()
    needed = ["requirements.txt", "pyproject.toml", "README.md", "cluster", "bdkd_dist"]
    assert sorted(mounts.values()) == sorted(needed)


@FILES
def test_nodes_share_a_token_that_others_cannot_read(name: str) -> None:
    commands = read(name)["setup_commands"]
    assert commands[0] == "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token"
    (profile,) = [command for command in commands if ".bashrc" in command]
    assert "export RAY_AUTH_MODE=token" in profile
    # Ray runs its commands in `bash --login -c -i`, which reads .bashrc.
    from ray.autoscaler._private.command_runner import _with_interactive

    assert "bash --login -c -i" in " ".join(_with_interactive("true"))


@FILES
def test_the_dashboard_is_on_loopback_of_the_head(name: str) -> None:
    config = read(name)
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start.split()
    (join,) = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert "--address=$RAY_HEAD_IP:6379" in join.split()


def test_what_the_autoscaler_needs_on_aws_is_locked() -> None:
    assert "\nboto3==" in (CLUSTER.parent / "requirements.txt").read_text()


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Yield the file's configuration, filled in with what a stand-in of AWS holds."""
    import boto3
    from moto import mock_aws

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        ec2, iam = boto3.resource("ec2", REGION), boto3.client("iam", REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = vpc.create_subnet(CidrBlock="10.0.0.0/24", AvailabilityZone=f"{REGION}a")
        group = ec2.create_security_group(GroupName="bdkd", Description="bdkd", VpcId=vpc.id)
        key = ec2.create_key_pair(KeyName="bdkd")
        (tmp_path / "bdkd.pem").write_text(key.key_material)
        profile = iam.create_instance_profile(InstanceProfileName="bdkd")["InstanceProfile"]["Arn"]
        image = next(iter(ec2.images.all())).id
        filled = text("aws")
        for what, value in (
            ("arn:aws:iam::CHANGE-ME:instance-profile/CHANGE-ME", profile),
            ("subnet-CHANGE-ME", subnet.id),
            ("sg-CHANGE-ME", group.id),
            ("ami-CHANGE-ME", image),
            ("CHANGE-ME\n", "bdkd\n"),
            ("~/.ssh/bdkd.pem", str(tmp_path / "bdkd.pem")),
        ):
            assert what in filled
            filled = filled.replace(what, value)
        yield yaml.safe_load(filled)


def test_on_aws_ray_opens_no_port_and_starts_private_spot_workers(account: dict[str, Any]) -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND

    ec2 = boto3.resource("ec2", REGION)
    before = {group.id: group.ip_permissions for group in ec2.security_groups.all()}
    config = bootstrap_aws(prepared(account))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("head", "worker"):
        node = dict(config["available_node_types"][kind]["node_config"])
        provider.create_node(node, {TAG_RAY_NODE_KIND: kind}, 1)
    assert {group.id: group.ip_permissions for group in ec2.security_groups.all()} == before
    head, worker = ec2.instances.all()
    for instance in (head, worker):
        assert instance.public_ip_address is None
        assert [group["GroupName"] for group in instance.security_groups] == ["bdkd"]
        assert instance.metadata_options["HttpTokens"] == "required"
    assert head.instance_lifecycle is None
    assert worker.instance_lifecycle == "spot"


def test_without_a_security_group_of_its_own_ray_would_open_ssh_to_the_world(account: dict[str, Any]) -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws

    for kind in account["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"]
    bootstrap_aws(prepared(account))
    ranges = [
        address["CidrIp"]
        for group in boto3.resource("ec2", REGION).security_groups.all()
        for permission in group.ip_permissions
        for address in permission["IpRanges"]
    ]
    assert ranges == ["0.0.0.0/0"]
