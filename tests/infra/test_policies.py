"""What each role may and may not do, judged by a policy simulator: moto evaluates no condition.

The policies are those of the deployed template (conftest), and the launch is the request that ``ensure_instance`` really makes with
the settings that the stack's outputs give.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from botocore import xform_name
from botocore.session import Session

from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import TAG_DEADLINE, TAG_OWNER, TAG_PROJECT, TAG_REAP
from crpbot_lib.lake import Lake

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS")  # moto, of what it skips: test_deploy.py
REPOSITORY = Path(__file__).resolve().parents[2]
INFRA = REPOSITORY / "infra"
ACCOUNT, REGION = "123456789012", "us-east-1"
EC2 = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"
OURS = {f"aws:ResourceTag/{TAG_PROJECT}": "crpbot"}
ANOTHER_PROJECTS = {f"aws:ResourceTag/{TAG_PROJECT}": "somebody-else"}
TLS, PLAIN = {"aws:SecureTransport": "true"}, {"aws:SecureTransport": "false"}

Context = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Case:
    """One request. ``{lake}`` and the like stand for what the deployment made (``names``)."""

    what: str
    allowed: bool
    action: str
    resource: str
    context: Context = field(default_factory=dict)


def may(what: str, action: str, resource: str, context: Context | None = None) -> Case:
    return Case(what, True, action, resource, context or {})


def may_not(what: str, action: str, resource: str, context: Context | None = None) -> Case:
    return Case(what, False, action, resource, context or {})


def mark(*keys: str) -> dict[str, str | list[str]]:
    return {"aws:TagKeys": list(keys)} | {f"aws:RequestTag/{key}": "2025-05-29T12:00:00+00:00" for key in keys}


AS_CREATED = {"ec2:CreateAction": "CreateVolume"}
TO_EC2, TO_LAMBDA = {"iam:PassedToService": "ec2.amazonaws.com"}, {"iam:PassedToService": "lambda.amazonaws.com"}
AT_LAUNCH = {"ec2:CreateAction": "RunInstances", **mark(TAG_PROJECT, TAG_DEADLINE)}
LOG = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:"
TRAINING_STREAM = f"{LOG}/crpbot/training:log-stream:2025-05-29/001"
PUBLIC_PARAMETER = f"arn:aws:ssm:{REGION}::parameter"
SPOT_ROLE = f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"

CASES: dict[str, list[Case]] = {
    "AirflowRole": [
        may("look for instances", "ec2:DescribeInstances", "*"),
        may("look at spot prices", "ec2:DescribeSpotPriceHistory", "*"),
        may("look for subnets and their zones", "ec2:DescribeSubnets", "*"),
        may("tag an instance as it launches it", "ec2:CreateTags", f"{EC2}instance/i-1", AT_LAUNCH),
        may("tag a volume as it launches it", "ec2:CreateTags", f"{EC2}volume/vol-1", AT_LAUNCH),
        may_not(
            "tag what another call creates",
            "ec2:CreateTags",
            f"{EC2}volume/vol-1",
            AT_LAUNCH | {"ec2:CreateAction": "CreateVolume"},
        ),
        may("mark an instance of ours as seen", "ec2:CreateTags", f"{EC2}instance/i-1", OURS | mark(TAG_REAP)),
        may_not("mark another project's instance", "ec2:CreateTags", f"{EC2}instance/i-1", ANOTHER_PROJECTS | mark(TAG_REAP)),
        may_not("mark an instance without a project", "ec2:CreateTags", f"{EC2}instance/i-1", mark(TAG_REAP)),
        may_not("move a deadline", "ec2:CreateTags", f"{EC2}instance/i-1", OURS | mark(TAG_DEADLINE)),
        may_not("move a deadline beside the mark", "ec2:CreateTags", f"{EC2}instance/i-1", OURS | mark(TAG_REAP, TAG_DEADLINE)),
        may_not("make a foreign instance ours", "ec2:CreateTags", f"{EC2}instance/i-1", mark(TAG_PROJECT)),
        may_not("remove a tag", "ec2:DeleteTags", f"{EC2}instance/i-1", OURS | mark(TAG_DEADLINE)),
        may("end an instance of ours", "ec2:TerminateInstances", f"{EC2}instance/i-1", OURS),
        may_not("end another project's instance", "ec2:TerminateInstances", f"{EC2}instance/i-1", ANOTHER_PROJECTS),
        may_not("end an instance without tags", "ec2:TerminateInstances", f"{EC2}instance/i-1"),
        may_not(
            "end an instance in another region", "ec2:TerminateInstances", f"arn:aws:ec2:eu-west-1:{ACCOUNT}:instance/i-1", OURS
        ),
        may_not("stop instead of ending", "ec2:StopInstances", f"{EC2}instance/i-1", OURS),
        may_not("protect an instance from its end", "ec2:ModifyInstanceAttribute", f"{EC2}instance/i-1", OURS),
        may("give an instance its role", "iam:PassRole", "{InstanceRole}", TO_EC2),
        may_not(
            "give an instance another role",
            "iam:PassRole",
            f"arn:aws:iam::{ACCOUNT}:role/Admin",
            {"iam:PassedToService": "ec2.amazonaws.com"},
        ),
        may_not("give an instance its own role", "iam:PassRole", "{AirflowRole}", TO_EC2),
        may_not(
            "give a function the instance's role", "iam:PassRole", "{InstanceRole}", {"iam:PassedToService": "lambda.amazonaws.com"}
        ),
        may("let spot have its own role", "iam:CreateServiceLinkedRole", SPOT_ROLE, {"iam:AWSServiceName": "spot.amazonaws.com"}),
        may_not(
            "let another service have a role",
            "iam:CreateServiceLinkedRole",
            f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/ecs.amazonaws.com/AWSServiceRoleForECS",
            {"iam:AWSServiceName": "ecs.amazonaws.com"},
        ),
        may_not(
            "let another service have spot's role",
            "iam:CreateServiceLinkedRole",
            SPOT_ROLE,
            {"iam:AWSServiceName": "ecs.amazonaws.com"},
        ),
        may("resolve the image", "ssm:GetParameters", "{image_parameter}"),
        may_not("read another parameter", "ssm:GetParameters", f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/prod/password"),
        may("follow the training log", "logs:GetLogEvents", TRAINING_STREAM),
        may_not("read another log", "logs:GetLogEvents", f"{LOG}/aws/lambda/payments:log-stream:x"),
        may_not("delete the training log", "logs:DeleteLogGroup", f"{LOG}/crpbot/training"),
        may("list the lake", "s3:ListBucket", "{lake}", TLS),
        may("read a model", "s3:GetObject", "{lake}/models/v1/manifest.json", TLS),
        may("read a model's tags", "s3:GetObjectTagging", "{lake}/models/v1/manifest.json", TLS),
        may("publish a model", "s3:PutObject", "{lake}/models/v1/lstm.pt", TLS),
        may("tag a model", "s3:PutObjectTagging", "{lake}/models/v1/lstm.pt", TLS),
        may("write the ledger", "s3:PutObject", "{lake}/ledger/month=2025-05/run-001.json", TLS),
        may_not("read the lake without TLS", "s3:GetObject", "{lake}/models/v1/lstm.pt", PLAIN),
        may_not("list the lake without TLS", "s3:ListBucket", "{lake}", PLAIN),
        may_not("delete from the lake", "s3:DeleteObject", "{lake}/models/v1/lstm.pt", TLS),
        may_not("delete a version for ever", "s3:DeleteObjectVersion", "{lake}/models/v1/lstm.pt", TLS),
        may_not("open the lake", "s3:PutBucketPolicy", "{lake}", TLS),
        may_not("write to another bucket", "s3:PutObject", "arn:aws:s3:::another-bucket/x", TLS),
        may_not("switch the switch off", "events:DisableRule", f"arn:aws:events:{REGION}:{ACCOUNT}:rule/crpbot-SwitchClock"),
        may_not("rewrite the switch", "lambda:UpdateFunctionCode", f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:crpbot-Switch"),
        may_not("give itself more", "iam:PutRolePolicy", "{AirflowRole}"),
    ],
    "InstanceRole": [
        may("read features", "s3:GetObject", "{lake}/features/version=v1/features_BTC-USD_1m.parquet", TLS),
        may("read its run", "s3:GetObject", "{lake}/training-runs/run/job.json", TLS),
        may("write its run", "s3:PutObject", "{lake}/training-runs/run/BTC-USD/checkpoint.pt", TLS),
        may("tell absent from denied", "s3:ListBucket", "{lake}", TLS),
        may_not("write a model", "s3:PutObject", "{lake}/models/v1/lstm.pt", TLS),
        may_not("promote a model", "s3:PutObject", "{lake}/models/promoted.json", TLS),
        may_not("read a model", "s3:GetObject", "{lake}/models/v1/lstm.pt", TLS),
        may_not("write features", "s3:PutObject", "{lake}/features/latest.json", TLS),
        may_not("read raw data", "s3:GetObject", "{lake}/raw/candles/1m/symbol=BTC-USD/x.parquet", TLS),
        may_not("write the ledger", "s3:PutObject", "{lake}/ledger/month=2025-05/run-001.json", TLS),
        may_not("delete its run", "s3:DeleteObject", "{lake}/training-runs/run/job.json", TLS),
        may_not("read a like-named prefix", "s3:GetObject", "{lake}/features-private/x", TLS),
        may_not("read its run without TLS", "s3:GetObject", "{lake}/training-runs/run/job.json", PLAIN),
        may_not("read another bucket", "s3:GetObject", "arn:aws:s3:::another-bucket/features/x", TLS),
        may_not("list another bucket", "s3:ListBucket", "arn:aws:s3:::another-bucket", TLS),
        may("open its log stream", "logs:CreateLogStream", TRAINING_STREAM),
        may("write its log", "logs:PutLogEvents", TRAINING_STREAM),
        may_not("write another log", "logs:PutLogEvents", f"{LOG}/aws/lambda/payments:log-stream:x"),
        may_not("write a like-named log", "logs:PutLogEvents", f"{LOG}/crpbot/training-private:log-stream:x"),
        may_not("make a log group", "logs:CreateLogGroup", f"{LOG}/crpbot/training"),
        may("log in to the registry", "ecr:GetAuthorizationToken", "*"),
        may("pull the image's manifest", "ecr:BatchGetImage", "{repository}"),
        may("pull the image's layers", "ecr:GetDownloadUrlForLayer", "{repository}"),
        may_not("pull another image", "ecr:BatchGetImage", f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/another"),
        may_not("push an image", "ecr:PutImage", "{repository}"),
        may_not("end an instance", "ec2:TerminateInstances", f"{EC2}instance/i-1", OURS),
        may_not("move its deadline", "ec2:CreateTags", f"{EC2}instance/i-1", OURS | mark(TAG_DEADLINE)),
        may_not("see the other instances", "ec2:DescribeInstances", "*"),
        may_not("launch", "ec2:RunInstances", f"{EC2}instance/*", {f"aws:RequestTag/{TAG_PROJECT}": "crpbot"}),
        may_not("give its role on", "iam:PassRole", "{InstanceRole}", TO_EC2),
    ],
    "SwitchRole": [
        may("look for instances", "ec2:DescribeInstances", "*"),
        may("end an instance of ours", "ec2:TerminateInstances", f"{EC2}instance/i-1", OURS),
        may("open its log stream", "logs:CreateLogStream", f"{LOG}/crpbot/dead-mans-switch:log-stream:x"),
        may("write its log", "logs:PutLogEvents", f"{LOG}/crpbot/dead-mans-switch:log-stream:x"),
        may_not("end another project's instance", "ec2:TerminateInstances", f"{EC2}instance/i-1", ANOTHER_PROJECTS),
        may_not("end an instance without tags", "ec2:TerminateInstances", f"{EC2}instance/i-1"),
        may_not("tag", "ec2:CreateTags", f"{EC2}instance/i-1", OURS | mark(TAG_DEADLINE)),
        may_not("launch", "ec2:RunInstances", f"{EC2}instance/*", {f"aws:RequestTag/{TAG_PROJECT}": "crpbot"}),
        may_not("read the lake", "s3:GetObject", "{lake}/models/v1/lstm.pt", TLS),
        may_not("write the training log", "logs:PutLogEvents", TRAINING_STREAM),
    ],
}


# --- the simulator ---


@dataclass(frozen=True)
class Simulator:
    """Asks ``infra/simulate.mjs``, with the policies of a deployment."""

    stack: Any
    names: dict[str, str]

    def policies(self, role: str) -> list[dict[str, Any]]:
        return [{"name": p["PolicyName"], "policy": p["PolicyDocument"]} for p in self.stack.properties(role)["Policies"]]

    def request(self, role: str, case: Case) -> dict[str, Any]:
        resource = case.resource.format(**self.names)
        bucket_policy = self.stack.properties("LakePolicy")["PolicyDocument"] if resource.startswith(self.names["lake"]) else None
        return {
            "request": {
                "principal": f"arn:aws:sts::{ACCOUNT}:assumed-role/{self.names[role].rpartition('/')[2]}/session",
                "action": case.action,
                "resource": {"resource": resource, "accountId": ACCOUNT},
                "contextVariables": dict(case.context),
            },
            "identityPolicies": self.policies(role),
            "serviceControlPolicies": [],
            "resourceControlPolicies": [],
            **({"resourcePolicy": bucket_policy} if bucket_policy else {}),
        }

    def ask(self, requests: list[dict[str, Any]]) -> list[str]:
        """``Allowed``, ``ExplicitlyDenied`` or ``ImplicitlyDenied``, one a request; one that cannot be judged fails the test."""
        # a public parameter's ARN has no account, and the simulator takes none without
        text = json.dumps(requests).replace(PUBLIC_PARAMETER, PUBLIC_PARAMETER.replace("::", ":public:"))
        result = subprocess.run(["node", "simulate.mjs"], cwd=INFRA, input=text, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        answers = json.loads(result.stdout)
        wrong = [
            (r["request"]["action"], r["request"]["resource"]["resource"], a["error"])
            for r, a in zip(requests, answers, strict=True)
            if "error" in a
        ]
        assert wrong == []
        return [answer["result"] for answer in answers]


@pytest.fixture(scope="module")
def simulator(stack: Any) -> Simulator:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("the IAM policies were NOT tested: their simulator needs node and npm (20 or later) on PATH; then `make setup`")
    if not (INFRA / "node_modules" / "@cloud-copilot" / "iam-simulate").is_dir():
        pytest.fail("the simulator of IAM policies is not installed: `make setup`, or `npm ci --prefix infra`")
    iam = stack.client("iam")
    roles = {role: iam.get_role(RoleName=stack.physical[role])["Role"]["Arn"] for role in CASES}
    return Simulator(
        stack,
        {
            **roles,
            "lake": f"arn:aws:s3:::{stack.physical['Lake']}",
            "repository": f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/{stack.physical['Repository']}",
            "image_parameter": PUBLIC_PARAMETER + GpuSettings().ami.removeprefix("resolve:ssm:"),
        },
    )


@pytest.fixture(scope="module")
def answers(simulator: Simulator) -> dict[tuple[str, str], str]:
    """Every case of the table, judged in one process."""
    asked = [(role, case) for role, cases in CASES.items() for case in cases]
    results = simulator.ask([simulator.request(role, case) for role, case in asked])
    return {(role, case.what): result for (role, case), result in zip(asked, results, strict=True)}


TABLE = [(role, case) for role, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(
    ("role", "case"), TABLE, ids=[f"{role} {'may' if case.allowed else 'may not'} {case.what}" for role, case in TABLE]
)
def test_the_table(answers: dict[tuple[str, str], str], role: str, case: Case) -> None:
    assert (answers[role, case.what] == "Allowed") is case.allowed


def test_without_tls_the_bucket_itself_says_no(answers: dict[tuple[str, str], str]) -> None:
    without = [(role, case.what) for role, case in TABLE if case.context == PLAIN]
    assert without
    assert {answers[one] for one in without} == {"ExplicitlyDenied"}


def test_the_table_has_every_claim_once() -> None:
    assert len({(role, case.what) for role, case in TABLE}) == len(TABLE)


# --- RunInstances, as the code asks for it ---


class _Captured(BaseException):
    """Not an Exception: nothing between here and the test may take it for an error of AWS."""


@pytest.fixture(scope="module")
def run_instances(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The request that ``ensure_instance`` makes with the deployment's settings, taken from botocore before it is sent."""
    ec2 = stack.client("ec2")
    request: dict[str, Any] = {}

    def capture(params: dict[str, Any], **_: Any) -> None:
        request.update(params)
        raise _Captured

    ec2.meta.events.register("provide-client-params.ec2.RunInstances", capture)
    with pytest.raises(_Captured):
        launch.ensure_instance(ec2, Lake(f"file://{tmp_path_factory.mktemp('lake')}"), stack.settings().gpu, "2025-05-29")
    return request


def resources_of(request: dict[str, Any], vpc: str) -> list[tuple[str, Context]]:
    """What RunInstances is authorized for, with the context keys that AWS derives from the request: every one must be allowed.

    Service Authorization Reference, "Actions, resources, and condition keys for Amazon EC2".
    """
    tags = {spec["ResourceType"]: {t["Key"]: t["Value"] for t in spec["Tags"]} for spec in request["TagSpecifications"]}

    def tagged(kind: str) -> dict[str, str | list[str]]:
        own = tags.get(kind, {})
        return {f"aws:RequestTag/{key}": value for key, value in own.items()} | ({"aws:TagKeys": list(own)} if own else {})

    instance = tagged("instance") | {"ec2:InstanceType": request["InstanceType"]}
    if profile := request.get("IamInstanceProfile", {}).get("Name"):
        instance["ec2:InstanceProfile"] = f"arn:aws:iam::{ACCOUNT}:instance-profile/{profile}"
    if tokens := request.get("MetadataOptions", {}).get("HttpTokens"):
        instance["ec2:MetadataHttpTokens"] = tokens
    network = {"ec2:Vpc": f"{EC2}vpc/{vpc}"}
    found: list[tuple[str, Context]] = [
        (f"{EC2}instance/*", instance),
        (f"arn:aws:ec2:{REGION}::image/ami-1", {}),
        (f"{EC2}subnet/{request.get('SubnetId', 'subnet-1')}", network),
        (f"{EC2}network-interface/*", network),
        *((f"{EC2}security-group/{group}", network) for group in request.get("SecurityGroupIds", ["sg-default"])),
    ]
    for mapping in request["BlockDeviceMappings"]:
        found.append((f"{EC2}volume/*", tagged("volume") | {"ec2:Encrypted": str(mapping["Ebs"].get("Encrypted", False)).lower()}))
    if request.get("InstanceMarketOptions", {}).get("MarketType") == "spot":
        found.append((f"{EC2}spot-instances-request/*", tagged("spot-instances-request")))
    return found


def without_tag(request: dict[str, Any], kind: str, key: str) -> None:
    for spec in request["TagSpecifications"]:
        if spec["ResourceType"] == kind:
            spec["Tags"] = [tag for tag in spec["Tags"] if tag["Key"] != key]


def with_tag(request: dict[str, Any], kind: str, key: str, value: str) -> None:
    without_tag(request, kind, key)
    for spec in request["TagSpecifications"]:
        if spec["ResourceType"] == kind:
            spec["Tags"].append({"Key": key, "Value": value})


LAUNCHES: dict[str, tuple[bool, Any]] = {
    "as the code asks for it": (True, lambda _: None),
    "on demand": (True, lambda r: r.pop("InstanceMarketOptions")),
    "of the other type": (True, lambda r: r.update(InstanceType="g4dn.xlarge")),
    "with another owner": (True, lambda r: with_tag(r, "instance", TAG_OWNER, "somebody")),
    "in a subnet of ours": (True, lambda r: r.update(SubnetId="subnet-2")),
    "without the project": (False, lambda r: without_tag(r, "instance", TAG_PROJECT)),
    "of another project": (False, lambda r: with_tag(r, "instance", TAG_PROJECT, "somebody-else")),
    "without a deadline": (False, lambda r: without_tag(r, "instance", TAG_DEADLINE)),
    "with a deadline that is no time": (False, lambda r: with_tag(r, "instance", TAG_DEADLINE, "never")),
    "without any tag": (False, lambda r: r.update(TagSpecifications=[])),
    "with another profile": (False, lambda r: r.update(IamInstanceProfile={"Name": "Admin"})),
    "without a profile": (False, lambda r: r.pop("IamInstanceProfile")),
    "of a dear type": (False, lambda r: r.update(InstanceType="p5.48xlarge")),
    "with IMDSv1": (False, lambda r: r.update(MetadataOptions={"HttpTokens": "optional"})),
    "with a volume in the clear": (False, lambda r: r["BlockDeviceMappings"][0]["Ebs"].update(Encrypted=False)),
    "with a volume of nobody's": (False, lambda r: without_tag(r, "volume", TAG_PROJECT)),
    "behind another security group": (False, lambda r: r.update(SecurityGroupIds=["sg-other"])),
    "behind another security group besides": (False, lambda r: r["SecurityGroupIds"].append("sg-other")),
    "behind the network's default group": (False, lambda r: r.pop("SecurityGroupIds")),
}


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_launch(simulator: Simulator, run_instances: dict[str, Any], how: str) -> None:
    allowed, change = LAUNCHES[how]
    request = deepcopy(run_instances)
    change(request)
    assert launch_is_allowed(simulator, resources_of(request, simulator.stack.vpc)) is allowed


def test_a_launch_in_another_network(simulator: Simulator, run_instances: dict[str, Any]) -> None:
    assert not launch_is_allowed(simulator, resources_of(run_instances, "vpc-other"))


def test_a_launch_in_another_region(simulator: Simulator, run_instances: dict[str, Any]) -> None:
    there = [(arn.replace(REGION, "eu-west-1"), context) for arn, context in resources_of(run_instances, simulator.stack.vpc)]
    assert not launch_is_allowed(simulator, there)


def launch_is_allowed(simulator: Simulator, resources: Iterable[tuple[str, Context]]) -> bool:
    cases = [Case("", True, "ec2:RunInstances", arn, context) for arn, context in resources]
    return set(simulator.ask([simulator.request("AirflowRole", case) for case in cases])) == {"Allowed"}


# --- who may take a role ---


@pytest.mark.parametrize(
    ("role", "principal", "allowed"),
    [
        ("InstanceRole", "ec2.amazonaws.com", True),
        ("InstanceRole", "lambda.amazonaws.com", False),
        ("InstanceRole", f"arn:aws:iam::{ACCOUNT}:user/somebody", False),
        ("SwitchRole", "lambda.amazonaws.com", True),
        ("SwitchRole", "ec2.amazonaws.com", False),
        ("AirflowRole", "ec2.amazonaws.com", True),
        ("AirflowRole", f"arn:aws:iam::{ACCOUNT}:user/somebody", False),
        ("AirflowRole", "arn:aws:iam::999999999999:root", False),
    ],
)
def test_who_may_take_a_role(simulator: Simulator, role: str, principal: str, allowed: bool) -> None:
    request = {
        "request": {
            "principal": principal,
            "action": "sts:AssumeRole",
            "resource": {"resource": simulator.names[role], "accountId": ACCOUNT},
            "contextVariables": {},
        },
        "identityPolicies": [],
        "serviceControlPolicies": [],
        "resourceControlPolicies": [],
        "resourcePolicy": simulator.stack.properties(role)["AssumeRolePolicyDocument"],
    }
    (answer,) = simulator.ask([request])
    assert (answer == "Allowed") is allowed


# --- nothing that the code needs is missing, nothing is granted that it does not need ---

OPERATIONS = {
    service: {xform_name(name): name for name in Session().get_service_model(service).operation_names}
    for service in ("ec2", "s3", "logs")
}
# IAM's name where it is not the operation's (S3: "Actions, resources, and condition keys")
ACTIONS = {
    "s3:HeadObject": {"s3:GetObject"},
    "s3:ListObjectsV2": {"s3:ListBucket"},
    "s3:PutObject": {"s3:PutObject", "s3:PutObjectTagging"},
}
# What AWS asks for behind a call: tags and role of an instance, the image's parameter, spot's own role
BEHIND_RUN_INSTANCES = {"ec2:CreateTags", "iam:PassRole", "ssm:GetParameters", "iam:CreateServiceLinkedRole"}


def calls(*places: str) -> set[str]:
    """IAM actions of the AWS calls in the code: attributes, and names of paginators, on a client called ec2, logs, s3 or client."""
    found: set[str] = set()
    for place in places:
        root = REPOSITORY / place
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                client = re.search(r"(?:^|[._])(ec2|logs|s3|client)$", ast.unparse(node.func.value))
                name = node.func.attr
                if name == "get_paginator" and isinstance(node.args[0], ast.Constant):
                    name = node.args[0].value
                # the lake's is the only client that is called nothing else
                service = "s3" if client and client[1] == "client" else client and client[1]
                if service and name in OPERATIONS[service]:
                    action = f"{service}:{OPERATIONS[service][name]}"
                    found |= ACTIONS.get(action, {action})
    return found


def granted(simulator: Simulator, role: str) -> set[str]:
    statements = [s for p in simulator.policies(role) for s in p["policy"]["Statement"]]
    assert {s["Effect"] for s in statements} == {"Allow"}
    return {a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}


def test_airflow_is_granted_what_the_code_calls_and_nothing_else(simulator: Simulator) -> None:
    needed = calls("crpbot_lib/gpu", "crpbot_lib/lake", "crpbot_lib/steps", "crpbot_lib/cli", "plugins", "dags")
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "logs:GetLogEvents", "s3:PutObject"} <= needed
    assert granted(simulator, "AirflowRole") == needed | BEHIND_RUN_INSTANCES


def test_the_switch_is_granted_what_its_code_calls_and_its_log(simulator: Simulator) -> None:
    needed = calls("infra/dead_mans_switch.py")
    assert needed == {"ec2:DescribeInstances", "ec2:TerminateInstances"}
    assert granted(simulator, "SwitchRole") == needed | {"logs:CreateLogStream", "logs:PutLogEvents"}


@pytest.mark.parametrize("role", CASES)
def test_everything_that_is_granted_is_in_the_table_as_allowed(simulator: Simulator, role: str) -> None:
    shown = {case.action for case in CASES[role] if case.allowed} | ({"ec2:RunInstances"} if role == "AirflowRole" else set())
    assert granted(simulator, role) == shown
