"""The template by itself: valid, one text with the switch's file, agreed with the code's tags and the settings' defaults."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import instances

INFRA = Path(__file__).resolve().parents[2] / "infra"
TEMPLATE = INFRA / "crpbot.yaml"


@pytest.fixture(scope="module")
def switch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dead_mans_switch", INFRA / "dead_mans_switch.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cfn_lint_finds_nothing_not_even_a_hint() -> None:
    command = [Path(sys.executable).with_name("cfn-lint"), "--include-checks", "I", "--regions", "us-east-1", "eu-central-1"]
    result = subprocess.run([*command, "--", TEMPLATE], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_one_deploy_command_takes_it_as_it_is(template: dict[str, Any]) -> None:
    # CloudFormation API reference: TemplateBody at most 51,200 bytes; beyond, a bucket is needed before the bucket
    assert len(TEMPLATE.read_bytes()) < 51_200
    # Lambda: inline code at most 4,096 characters in the older documentation
    assert len(template["Resources"]["Switch"]["Properties"]["Code"]["ZipFile"]) < 4_096


def test_the_switchs_code_is_the_file_that_is_tested(template: dict[str, Any]) -> None:
    assert template["Resources"]["Switch"]["Properties"]["Code"]["ZipFile"] == (INFRA / "dead_mans_switch.py").read_text()


def test_the_switch_goes_by_the_same_tags_states_and_grace_as_the_reaper(switch: ModuleType) -> None:
    assert (switch.TAG_PROJECT, switch.TAG_DEADLINE) == (instances.TAG_PROJECT, instances.TAG_DEADLINE)
    assert tuple(switch.ALIVE) == instances.ALIVE
    assert timedelta(minutes=GpuSettings().reap_grace_minutes) == switch.GRACE


def test_every_tag_in_a_policy_is_one_that_the_code_sets_or_reads(template: dict[str, Any]) -> None:
    known = {value for name, value in vars(instances).items() if name.startswith("TAG_")}

    def tags(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set().union(*(tags(key) | tags(value) for key, value in node.items())) if node else set()
        if isinstance(node, list):
            return set().union(*map(tags, node)) if node else set()
        text = str(node)
        return {text[text.index("crpbot:") :]} if "crpbot:" in text and " " not in text else set()

    policies = [r["Properties"].get("Policies", []) for r in template["Resources"].values()]
    assert tags(policies) == {instances.TAG_PROJECT, instances.TAG_DEADLINE, instances.TAG_REAP}
    assert tags(policies) <= known


def test_defaults_are_those_of_the_settings(template: dict[str, Any]) -> None:
    gpu = GpuSettings()
    defaults = {name: parameter.get("Default") for name, parameter in template["Parameters"].items()}
    assert defaults["ProjectTag"] == gpu.project_tag
    assert set(defaults["InstanceTypes"].split(",")) == {candidate.instance_type for candidate in gpu.candidates}
    assert f"resolve:ssm:{defaults['ImageParameter']}" == gpu.ami
    # the same limit twice: ours before each launch, AWS's on the bill
    assert defaults["MonthlyBudgetUsd"] == gpu.max_month_usd


def test_only_what_cannot_be_known_has_no_default(template: dict[str, Any]) -> None:
    without = {name for name, parameter in template["Parameters"].items() if "Default" not in parameter}
    assert without == {"VpcId", "AlarmEmail"}


def test_the_lake_outlives_the_stack(template: dict[str, Any]) -> None:
    lake = template["Resources"]["Lake"]
    assert (lake["DeletionPolicy"], lake["UpdateReplacePolicy"]) == ("Retain", "Retain")
