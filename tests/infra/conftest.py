"""The template, deployed to moto over HTTP, and what became of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.backends import get_backend
from moto.cloudformation.parsing import clean_json
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_api._internal.models import moto_api_backend
from moto.server import ThreadedMotoServer

from crpbot_lib.config import GpuSettings, Settings

INFRA = Path(__file__).resolve().parents[2] / "infra"
TEMPLATE = INFRA / "crpbot.yaml"
ACCOUNT, REGION = DEFAULT_ACCOUNT_ID, "us-east-1"
MAIL = "operator@example.com"


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms: ``!Ref x`` becomes ``{"Ref": x}``."""


def _short_form(loader: _Loader, suffix: str, node: Any) -> dict[str, Any]:
    read = {"scalar": loader.construct_scalar, "sequence": loader.construct_sequence, "mapping": loader.construct_mapping}
    value = read[node.id](node) if node.id == "scalar" else read[node.id](node, deep=True)
    return {suffix if suffix == "Ref" else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _short_form)


@pytest.fixture(scope="session")
def template() -> dict[str, Any]:
    """The template as written, short forms unfolded."""
    loaded: dict[str, Any] = yaml.load(TEMPLATE.read_text(), _Loader)
    return loaded


@dataclass(frozen=True)
class Stack:
    """A deployment in moto, with a client maker for its endpoint."""

    client: Callable[[str], Any]
    vpc: str
    outputs: dict[str, tuple[str, str]]
    """Output → (description, value)."""
    physical: dict[str, str]
    """Logical name → physical id, of what moto made."""
    _resources: Any

    def properties(self, logical: str) -> dict[str, Any]:
        """A resource's properties with parameters, references and conditions worked out, by moto's CloudFormation."""
        rendered: dict[str, Any] = clean_json(self._resources._resource_json_map[logical]["Properties"], self._resources)
        return rendered

    def variables(self) -> dict[str, str]:
        """The settings that the outputs give, as environment variables."""
        return dict(pair for pair in self.outputs.values() if pair[0].startswith("CRPBOT_"))

    def settings(self) -> Settings:
        """The settings of a deployment that takes them from the outputs and from nowhere else."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("CRPBOT_")]:
                patch.delenv(name)
            for name, value in self.variables().items():
                patch.setenv(name, value)
            return Settings()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The template with the parameters that have no default and those that the settings' defaults say."""
    moto_api_backend.reset()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    def client(service: str) -> Any:
        return boto3.session.Session().client(service, region_name=REGION, endpoint_url=f"http://{host}:{port}")

    try:
        vpc = client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
        types = ",".join(candidate.instance_type for candidate in GpuSettings().candidates)
        parameters = {"VpcId": vpc, "AlarmEmail": MAIL, "InstanceTypes": types}
        cloudformation = client("cloudformation")
        cloudformation.create_stack(
            StackName="crpbot",
            TemplateBody=TEMPLATE.read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        (described,) = cloudformation.describe_stacks(StackName="crpbot")["Stacks"]
        assert described["StackStatus"] == "CREATE_COMPLETE"
        made = cloudformation.list_stack_resources(StackName="crpbot")["StackResourceSummaries"]
        yield Stack(
            client=client,
            vpc=vpc,
            outputs={o["OutputKey"]: (o["Description"], o["OutputValue"]) for o in described["Outputs"]},
            physical={r["LogicalResourceId"]: r["PhysicalResourceId"] for r in made if r.get("LogicalResourceId")},
            _resources=get_backend("cloudformation")[ACCOUNT][REGION].get_stack("crpbot").resource_map,
        )
    finally:
        server.stop()
        moto_api_backend.reset()
