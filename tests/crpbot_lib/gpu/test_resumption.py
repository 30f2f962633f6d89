"""A real training on an instance of the local cloud that is taken back: it stops in order, and the next instance goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from crpbot_lib import training
from crpbot_lib.config import GpuSettings
from crpbot_lib.gpu import launch
from crpbot_lib.gpu.instances import Instance
from crpbot_lib.gpu.watch import Outcome, Watcher, job_failed
from crpbot_lib.lake import Lake, keys
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions
from crpbot_lib.training.job import read_spec


@pytest.fixture(scope="module")
def cloud() -> Iterator[Sandbox]:
    """One whose instances run the training image's own entry point."""
    with pytest.MonkeyPatch.context() as patch, Sandbox(SandboxOptions(boot_seconds=0.2, shutdown_seconds=0.2)) as running:
        for name, value in running.env().items():
            patch.setenv(name, value)
        yield running


class Follower:
    """Follows one generation as the trigger does."""

    def __init__(self, ec2: Any, gpu: GpuSettings, lake: Lake, instance: Instance) -> None:
        logs = boto3.session.Session().client("logs", region_name=gpu.region)
        self.watcher = Watcher(ec2, logs, lake, gpu, instance.run, instance.generation)
        self.lines: list[str] = []
        self.progress: list[str] = []

    def round(self) -> Outcome | None:
        outcome = self.watcher.outcome()
        self.lines += self.watcher.new_lines()
        if line := self.watcher.progress():
            self.progress.append(line)
        return outcome

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Outcome | None:
        """Until the job has ended, or ``condition`` holds."""
        end = time.monotonic() + seconds
        while True:
            outcome = self.round()
            if outcome or condition():
                return outcome
            assert time.monotonic() < end, self.lines
            time.sleep(0.1)


def test_a_run_that_is_interrupted_is_trained_to_its_end_by_the_next_instance(
    ec2: Any, cloud: Sandbox, gpu: GpuSettings, features_lake: Any, tmp_path: Path, proof: list[str], until: Callable[..., None]
) -> None:
    own = features_lake.copy(tmp_path)
    lake, run = own.lake, own.run
    spec = read_spec(lake, run)
    # long enough that a notice, which is looked for every five seconds, finds it at work, and that the next instance's work is seen
    longer = spec.train.model_copy(update={"max_steps": None, "epochs": 60})
    training.write_job(lake, spec.model_copy(update={"symbols": ("ETH-USD",), "train": longer}))

    first = launch.ensure_instance(ec2, lake, gpu, run)
    follower = Follower(ec2, gpu, lake, first)
    assert follower.until(lambda: any("checkpoint at epoch 2" in line for line in follower.lines)) is None
    url = f"{cloud.control_url}/_sandbox/instances/{first.id}/interrupt"
    requests.post(url, json={"notice_seconds": 100, "rebalance": True}, timeout=10).raise_for_status()
    noticed = time.monotonic()
    outcome = follower.until(lambda: False)
    proof.append(f"spot notice to the job's last word, seen by the watcher: {time.monotonic() - noticed:.1f} s of 120 s")
    assert outcome is not None
    assert (outcome.verdict, outcome.permanent) == ("interrupted", False)
    assert "spot notice: EC2 will terminate this instance at " in outcome.message
    # its user data goes on to the last line, so it ends itself long before EC2 would
    until(lambda: next(i for i in cloud.instances() if i["id"] == first.id)["state"] == "terminated")
    assert time.monotonic() - noticed < 60

    second = launch.ensure_instance(ec2, lake, gpu, run, replace=job_failed(lake, gpu, run))
    assert (second.id != first.id, second.generation) == (True, 2)
    follower = Follower(ec2, gpu, lake, second)
    outcome = follower.until(lambda: False)
    assert outcome is not None
    assert outcome.verdict == "succeeded", follower.lines
    assert any("ETH-USD: resuming at epoch " in line and " of generation 1" in line for line in follower.lines)
    assert any("ETH-USD (1 of 1): epoch " in line and " so far (" in line for line in follower.progress), follower.progress
    metrics = lake.read_json(keys.run_symbol(run, "ETH-USD", "metrics.json"))
    assert (metrics["generation"], metrics["epochs"]) == (2, 60)
