"""AWS clients for the command line; Airflow tasks get theirs from the Amazon provider's hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import boto3

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client


def ec2(region: str) -> EC2Client:
    """An EC2 client; endpoint and credentials as the AWS SDKs read them."""
    return boto3.session.Session().client("ec2", region_name=region)
