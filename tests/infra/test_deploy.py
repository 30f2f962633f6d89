"""The template, deployed: every resource is asked for through its own service, in moto.

What moto passes over in silence is listed here, by name and with the reason. A resource on the list must be missing after the
deployment, so that the list shrinks when moto learns; then it is made through its own service with the properties that the template
gives it, and so botocore's models and moto's service have judged it all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from crpbot_lib.config import GpuSettings

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS")
ACCOUNT = "123456789012"
MAIL = "operator@example.com"

SKIPPED_RESOURCES = {
    "LakePolicy": "moto's CloudFormation knows no AWS::S3::BucketPolicy",
    "SwitchFails": "moto's CloudFormation knows no AWS::CloudWatch::Alarm",
    "SwitchSilent": "moto's CloudFormation knows no AWS::CloudWatch::Alarm",
    "Budget": "moto's CloudFormation knows no AWS::Budgets::Budget",
}
# The same of single properties: a bucket gets its encryption and tags, a repository no lifecycle and a
# scan setting misspelt, a security group AWS's own rule "everything out" instead of the given ones.
SKIPPED_PROPERTIES = {
    "Lake": ["VersioningConfiguration", "PublicAccessBlockConfiguration", "OwnershipControls", "LifecycleConfiguration"],
    "InstanceSecurityGroup": ["SecurityGroupEgress"],
    "Repository": ["ImageScanningConfiguration", "LifecyclePolicy"],
}


def _lake(stack: Any) -> None:
    s3, bucket = stack.client("s3"), stack.physical["Lake"]
    rules = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert [rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] for rule in rules] == ["AES256"]


def _repository(stack: Any) -> None:
    (found,) = stack.client("ecr").describe_repositories(repositoryNames=["crpbot-training"])["repositories"]
    assert found["imageTagMutability"] == "IMMUTABLE"


def _log(name: str) -> Callable[[Any], None]:
    def exists(stack: Any) -> None:
        (found,) = stack.client("logs").describe_log_groups(logGroupNamePrefix=name)["logGroups"]
        assert (found["logGroupName"], found["retentionInDays"]) == (name, 30)

    return exists


def _security_group(stack: Any) -> None:
    group = stack.physical["InstanceSecurityGroup"]
    (found,) = stack.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert found["VpcId"] == stack.vpc
    assert found["IpPermissions"] == []


def _role(logical: str, service: str) -> Callable[[Any], None]:
    def exists(stack: Any) -> None:
        iam, name = stack.client("iam"), stack.physical[logical]
        trust = iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]
        assert [statement["Principal"] for statement in trust["Statement"]] == [{"Service": service}]
        assert len(iam.list_role_policies(RoleName=name)["PolicyNames"]) == 1
        assert iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"] == []
        # IAM quotas: the inline policies of a role together, white space left out
        (policy,) = stack.properties(logical)["Policies"]
        assert len(json.dumps(policy["PolicyDocument"], separators=(",", ":"))) < 10_240

    return exists


def _profile(logical: str, role: str) -> Callable[[Any], None]:
    def exists(stack: Any) -> None:
        found = stack.client("iam").get_instance_profile(InstanceProfileName=stack.physical[logical])["InstanceProfile"]
        assert [r["RoleName"] for r in found["Roles"]] == [stack.physical[role]]

    return exists


def _switch(stack: Any) -> None:
    found = stack.client("lambda").get_function(FunctionName=stack.physical["Switch"])["Configuration"]
    assert found["Environment"]["Variables"] == {"PROJECT": "crpbot"}
    assert (found["Handler"], found["Timeout"]) == ("index.handler", 120)
    assert found["Role"].endswith(f"role/{stack.physical['SwitchRole']}")


def _clock(stack: Any) -> None:
    events, name = stack.client("events"), stack.physical["SwitchClock"]
    found = events.describe_rule(Name=name)
    assert (found["State"], found["ScheduleExpression"]) == ("ENABLED", "rate(5 minutes)")
    (target,) = events.list_targets_by_rule(Rule=name)["Targets"]
    function = stack.client("lambda").get_function(FunctionName=stack.physical["Switch"])["Configuration"]
    assert target["Arn"] == function["FunctionArn"]


def _permission(stack: Any) -> None:
    policy = json.loads(stack.client("lambda").get_policy(FunctionName=stack.physical["Switch"])["Policy"])
    (statement,) = policy["Statement"]
    rule = stack.client("events").describe_rule(Name=stack.physical["SwitchClock"])["Arn"]
    assert statement["Principal"] == {"Service": "events.amazonaws.com"}
    assert statement["Condition"] == {"ArnLike": {"AWS:SourceArn": rule}}


def _alarms(stack: Any) -> None:
    topic = stack.physical["Alarms"]
    found = stack.client("sns").list_subscriptions_by_topic(TopicArn=topic)["Subscriptions"]
    assert [(s["Protocol"], s["Endpoint"]) for s in found] == [("email", MAIL)]


MADE: dict[str, Callable[[Any], None]] = {
    "Lake": _lake,
    "Repository": _repository,
    "TrainingLog": _log("/crpbot/training"),
    "InstanceSecurityGroup": _security_group,
    "InstanceRole": _role("InstanceRole", "ec2.amazonaws.com"),
    "InstanceProfile": _profile("InstanceProfile", "InstanceRole"),
    "AirflowRole": _role("AirflowRole", "ec2.amazonaws.com"),
    "AirflowInstanceProfile": _profile("AirflowInstanceProfile", "AirflowRole"),
    "SwitchLog": _log("/crpbot/dead-mans-switch"),
    "SwitchRole": _role("SwitchRole", "lambda.amazonaws.com"),
    "Switch": _switch,
    "SwitchClock": _clock,
    "SwitchPermission": _permission,
    "Alarms": _alarms,
}


@pytest.mark.parametrize("logical", MADE)
def test_exists_and_is_as_the_template_says(stack: Any, logical: str) -> None:
    MADE[logical](stack)


def test_every_resource_is_either_asked_for_or_listed_as_skipped(template: dict[str, Any]) -> None:
    assert set(template["Resources"]) == set(MADE) | set(SKIPPED_RESOURCES)
    assert not set(MADE) & set(SKIPPED_RESOURCES)


def test_moto_made_nothing_that_is_listed_as_skipped(stack: Any) -> None:
    assert set(stack.physical) == set(MADE), "moto has learned one of SKIPPED_RESOURCES: ask for it, and shorten the list"


def _missing(call: Callable[[], Any]) -> bool:
    from botocore.exceptions import ClientError

    try:
        call()
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] == 404 or "NotFound" in error.response["Error"]["Code"]
    return False


class TestSkippedByMoto:
    """Each missing first, and accepted by its own service with the template's properties then."""

    def test_the_bucket_policy(self, stack: Any) -> None:
        s3, properties = stack.client("s3"), stack.properties("LakePolicy")
        assert properties["Bucket"] == stack.physical["Lake"]
        assert _missing(lambda: s3.get_bucket_policy(Bucket=properties["Bucket"]))
        s3.put_bucket_policy(Bucket=properties["Bucket"], Policy=json.dumps(properties["PolicyDocument"]))
        kept = json.loads(s3.get_bucket_policy(Bucket=properties["Bucket"])["Policy"])
        assert kept["Statement"][0]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}

    @pytest.mark.parametrize(
        ("logical", "metric", "missing"), [("SwitchFails", "Errors", "notBreaching"), ("SwitchSilent", "Invocations", "breaching")]
    )
    def test_an_alarm(self, stack: Any, logical: str, metric: str, missing: str) -> None:
        cloudwatch = stack.client("cloudwatch")
        assert cloudwatch.describe_alarms(AlarmNames=[logical])["MetricAlarms"] == []
        cloudwatch.put_metric_alarm(AlarmName=logical, **stack.properties(logical))
        (kept,) = cloudwatch.describe_alarms(AlarmNames=[logical])["MetricAlarms"]
        assert kept["Dimensions"] == [{"Name": "FunctionName", "Value": stack.physical["Switch"]}]
        assert (kept["Namespace"], kept["MetricName"], kept["TreatMissingData"]) == ("AWS/Lambda", metric, missing)
        assert kept["AlarmActions"] == [stack.physical["Alarms"]]

    def test_the_budget(self, stack: Any) -> None:
        budgets, properties = stack.client("budgets"), stack.properties("Budget")
        assert budgets.describe_budgets(AccountId=ACCOUNT)["Budgets"] == []
        limit = properties["Budget"]["BudgetLimit"]
        budget = {**properties["Budget"], "BudgetName": "crpbot", "BudgetLimit": {**limit, "Amount": str(limit["Amount"])}}
        told = properties["NotificationsWithSubscribers"]
        budgets.create_budget(AccountId=ACCOUNT, Budget=budget, NotificationsWithSubscribers=told)
        (kept,) = budgets.describe_budgets(AccountId=ACCOUNT)["Budgets"]
        assert kept["CostFilters"] == {"TagKeyValue": ["user:crpbot:project$crpbot"]}
        assert [s["Address"] for one in told for s in one["Subscribers"]] == [MAIL, MAIL]

    def test_the_list_of_properties_names_properties_that_the_template_has(self, stack: Any) -> None:
        for logical, names in SKIPPED_PROPERTIES.items():
            assert set(names) <= set(stack.properties(logical))

    def test_the_lakes_versions_its_wall_and_its_owner(self, stack: Any) -> None:
        s3, bucket, properties = stack.client("s3"), stack.physical["Lake"], stack.properties("Lake")
        assert "Status" not in s3.get_bucket_versioning(Bucket=bucket)
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration=properties["VersioningConfiguration"])
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
        assert _missing(lambda: s3.get_public_access_block(Bucket=bucket))
        s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=properties["PublicAccessBlockConfiguration"])
        wall = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
        assert list(wall.values()) == [True] * 4
        assert _missing(lambda: s3.get_bucket_ownership_controls(Bucket=bucket))
        s3.put_bucket_ownership_controls(Bucket=bucket, OwnershipControls=properties["OwnershipControls"])
        (rule,) = s3.get_bucket_ownership_controls(Bucket=bucket)["OwnershipControls"]["Rules"]
        assert rule == {"ObjectOwnership": "BucketOwnerEnforced"}

    def test_the_lakes_lifecycle(self, stack: Any) -> None:
        s3, bucket = stack.client("s3"), stack.physical["Lake"]
        assert _missing(lambda: s3.get_bucket_lifecycle_configuration(Bucket=bucket))
        rules = [_as_s3_says(rule) for rule in stack.properties("Lake")["LifecycleConfiguration"]["Rules"]]
        s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": rules})
        kept = {rule["ID"]: rule for rule in s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]}
        assert kept["abandoned-uploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
        assert kept["old-versions"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 30}
        assert kept["cold-training-runs"]["Transitions"] == [{"Days": 30, "StorageClass": "STANDARD_IA"}]
        assert kept["cold-training-runs"]["Filter"] == {"Prefix": "training-runs/"}
        expiring = [name for name, rule in kept.items() if "Days" in rule.get("Expiration", {})]
        assert expiring == [], "nothing of the lake is deleted unless a parameter says so"

    def test_the_repositorys_scan_and_lifecycle(self, stack: Any) -> None:
        ecr, name, properties = stack.client("ecr"), stack.physical["Repository"], stack.properties("Repository")
        assert (
            "scanOnPush" not in ecr.describe_repositories(repositoryNames=[name])["repositories"][0]["imageScanningConfiguration"]
        )
        assert properties["ImageScanningConfiguration"] == {"ScanOnPush": True}
        assert _missing(lambda: ecr.get_lifecycle_policy(repositoryName=name))
        ecr.put_lifecycle_policy(repositoryName=name, lifecyclePolicyText=properties["LifecyclePolicy"]["LifecyclePolicyText"])
        rules = json.loads(ecr.get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"])["rules"]
        assert [(rule["selection"]["tagStatus"], rule["selection"]["countNumber"]) for rule in rules] == [
            ("untagged", 7),
            ("any", 10),
        ]


def _as_s3_says(rule: dict[str, Any]) -> dict[str, Any]:
    """A lifecycle rule of CloudFormation in the words of S3's API."""
    said: dict[str, Any] = {"ID": rule["Id"], "Status": rule["Status"], "Filter": {"Prefix": rule.get("Prefix", "")}}
    for name in ("AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration"):
        if name in rule:
            said[name] = rule[name]
    if "Transitions" in rule:
        said["Transitions"] = [{"Days": t["TransitionInDays"], "StorageClass": t["StorageClass"]} for t in rule["Transitions"]]
    if "ExpirationInDays" in rule:
        said["Expiration"] = {"Days": int(rule["ExpirationInDays"])}
    elif rule.get("ExpiredObjectDeleteMarker"):
        said["Expiration"] = {"ExpiredObjectDeleteMarker": True}
    return said


def test_outputs_that_name_a_setting_have_its_value(stack: Any) -> None:
    settings = stack.settings()
    assert settings.lake == f"s3://{stack.physical['Lake']}"
    assert settings.gpu.instance_profile == stack.physical["InstanceProfile"]
    assert settings.gpu.security_group_ids == (stack.physical["InstanceSecurityGroup"],)
    assert settings.gpu.log_group == stack.physical["TrainingLog"]
    assert settings.gpu.ami == GpuSettings().ami


def test_outputs_name_every_setting_that_the_stack_decides(stack: Any) -> None:
    names = {"REGION", "PROJECT_TAG", "INSTANCE_PROFILE", "SECURITY_GROUP_IDS", "LOG_GROUP", "AMI"}
    assert set(stack.variables()) == {"CRPBOT_LAKE", *(f"CRPBOT_GPU__{name}" for name in names)}
