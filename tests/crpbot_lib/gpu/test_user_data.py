"""The script of an instance: the deadline first, power-off last, nothing that a stranger's name could break."""

from __future__ import annotations

import shlex
from typing import Any

from crpbot_lib.gpu import user_data
from crpbot_lib.training.__main__ import LONGEST_STOP_SECONDS

ARGUMENTS: dict[str, Any] = {
    "run": "2025-05-29-manual-1",
    "generation": 2,
    "lake": "s3://bucket/prefix",
    "image": "crpbot-training:0.1.0",
    "region": "us-east-1",
    "log_group": "/crpbot/training",
    "log_stream": "2025-05-29-manual-1/002",
    "max_lifetime_minutes": 120,
}


def commands(script: str) -> list[list[str]]:
    return [shlex.split(line) for line in script.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def test_the_deadline_comes_before_anything_that_can_hang_and_power_off_comes_last() -> None:
    lines = commands(user_data.render(**ARGUMENTS))
    assert lines[0] == ["shutdown", "-h", "+120"]
    assert lines[-1] == ["shutdown", "-h", "now"]
    assert [line[:2] for line in lines[1:-1]] == [["docker", "pull"], ["docker", "run"]]


def test_a_failing_command_does_not_keep_the_script_from_its_last_line() -> None:
    script = user_data.render(**ARGUMENTS)
    assert "set -e" not in script
    assert "exec " not in script
    assert "&&" not in script


def test_the_job_learns_its_run_and_lake_and_takes_endpoints_by_name_only() -> None:
    run = commands(user_data.render(**ARGUMENTS))[2]
    passed = [run[i + 1] for i, word in enumerate(run) if word == "-e"]
    assert "CRPBOT_RUN=2025-05-29-manual-1" in passed
    assert "CRPBOT_LAKE=s3://bucket/prefix" in passed
    assert "CRPBOT_GENERATION=2" in passed
    # the metadata service's too: without them the job of a local cloud would ask the real address for spot notices
    assert {"AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_EC2_METADATA_DISABLED"} <= set(passed)
    assert not [word for word in passed if "KEY" in word or "SECRET" in word or "TOKEN" in word]


def test_the_job_reaches_the_metadata_service_and_has_time_for_a_checkpoint_when_it_is_stopped() -> None:
    run = commands(user_data.render(**ARGUMENTS))[2]
    assert run[run.index("--network") + 1] == "host"
    assert LONGEST_STOP_SECONDS < int(run[run.index("--stop-timeout") + 1]) < 110


def test_the_job_runs_without_a_capability_and_can_write_to_its_tmp_alone() -> None:
    run = commands(user_data.render(**ARGUMENTS))[2]
    assert "--read-only" in run
    limits = ("--tmpfs", "--cap-drop", "--security-opt")
    assert [run[run.index(flag) + 1] for flag in limits] == ["/tmp", "ALL", "no-new-privileges"]
    # torch, polars and OpenMP each start a thread a core, on up to 192 of them
    assert int(run[run.index("--pids-limit") + 1]) >= 1024
    assert not {"--privileged", "--cap-add", "-v", "--volume", "--mount", "--pid", "--ipc"} & set(run)


def test_a_name_with_shell_characters_stays_one_word() -> None:
    hostile = "x; shutdown -c; $(reboot) 'quoted' && true"
    lines = commands(user_data.render(**{**ARGUMENTS, "run": hostile}))
    assert len(lines) == 4
    assert f"CRPBOT_RUN={hostile}" in lines[2]


def test_an_image_of_ecr_is_pulled_after_logging_in_and_after_the_deadline() -> None:
    image = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/crpbot-training:0.1.0"
    lines = commands(user_data.render(**{**ARGUMENTS, "image": image}))
    assert lines[0][0] == "shutdown"
    assert lines[1][:5] == ["aws", "ecr", "get-login-password", "--region", "eu-west-1"]
    assert lines[2] == ["docker", "pull", image]


def test_equal_arguments_give_equal_text() -> None:
    assert user_data.render(**ARGUMENTS) == user_data.render(**ARGUMENTS)
