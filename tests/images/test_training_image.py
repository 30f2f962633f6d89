"""The training image itself, built by the real engine and run as an instance runs it, with its lake in the local cloud's S3.

Each container is started with the line of the user data, less what this machine has not: a GPU and CloudWatch. The build takes
make's variables from the environment: BASE_IMAGE, TORCH_INDEX_URL, BUILD_OPTIONS.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
import torch

from crpbot_lib import training
from crpbot_lib.config import settings
from crpbot_lib.gpu import user_data
from crpbot_lib.lake import Lake, keys
from crpbot_lib.sandbox.server import BUCKET, Sandbox, SandboxOptions
from crpbot_lib.steps.features import build_features, gate_features, plan_features
from crpbot_lib.steps.ingest import ensure_coverage
from crpbot_lib.training import check_model, read_status

REPOSITORY = Path(__file__).resolve().parents[2]
TAG = "crpbot-training:under-test"
START, END = date(2025, 5, 26), date(2025, 5, 29)
SYMBOL = "ETH-USD"
LONG = {"max_steps": None, "epochs": 6, "layers": 2, "dropout": 0.3}
ENDLESS = {"max_steps": None, "epochs": 100_000}
# the machine has neither, and the test wants the container's end and its output
NOT_HERE = {"--gpus", "--name", "--log-driver", "--log-opt"}

pytestmark = [pytest.mark.containers, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def docker() -> str:
    """A docker client with buildx whose engine answers."""
    for candidate in (shutil.which("docker"), "/usr/bin/docker"):
        if candidate and Path(candidate).is_file():
            asked = [
                subprocess.run([candidate, *words], capture_output=True, timeout=60) for words in (("buildx", "version"), ("info",))
            ]
            if not any(answer.returncode for answer in asked):
                return candidate
    pytest.skip("no Docker Engine answers on this machine (`docker info`): the training image is neither built nor run")


@pytest.fixture(scope="module")
def image(docker: str, proof: list[str]) -> Iterator[str]:
    """The image, built by ``make image-training``."""
    began = time.monotonic()
    make = ["make", "--no-print-directory", "image-training", f"DOCKER={docker}", f"TAG={TAG}"]
    built = subprocess.run(make, cwd=REPOSITORY, capture_output=True, text=True)
    if built.returncode:
        pytest.fail(f"{shlex.join(make)} failed:\n{built.stderr[-4000:]}", pytrace=False)
    size = subprocess.run([docker, "image", "inspect", "--format", "{{.Size}}", TAG], capture_output=True, text=True, check=True)
    proof.append(f"training image: built in {time.monotonic() - began:.0f} s, {int(size.stdout) / 1e6:,.0f} MB")
    yield TAG
    subprocess.run([docker, "image", "rm", TAG], capture_output=True, check=False)


def within(docker: str, image: str, script: str, *options: str) -> str:
    """What a shell script prints in a container of its own, confined as a job is."""
    limits = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    command = [docker, "run", "--rm", "--network", "none", *limits, *options, "--entrypoint", "sh", image, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- what is in it -----------------------------------------------------------------------------------------------------------


def test_it_runs_as_an_ordinary_user_without_capabilities_who_can_write_to_tmp_alone(docker: str, image: str) -> None:
    assert within(docker, image, "id -u; id -g; umask") == "10001\n10001\n0022"
    assert within(docker, image, "grep -E '^(CapEff|NoNewPrivs)' /proc/self/status").split() == [
        "CapEff:",
        "0" * 16,
        "NoNewPrivs:",
        "1",
    ]
    folders = "/ /opt/crpbot /opt/venv /home /var /etc"
    assert within(docker, image, f"for d in {folders}; do touch $d/x 2>/dev/null && echo $d; done; true") == ""
    assert within(docker, image, 'echo y > "$HOME/x" && cat /tmp/x') == "y"
    # nor by its permissions, where the root file system is not read-only
    own = [
        docker,
        "run",
        "--rm",
        "--entrypoint",
        "sh",
        image,
        "-c",
        "find / -xdev -writable -type d -not -path '/tmp*' -not -path '/proc*'",
    ]
    writable = subprocess.run(own, capture_output=True, text=True, timeout=120).stdout.split()
    assert [path for path in writable if path.startswith(("/opt", "/usr", "/etc", "/home"))] == []


def test_it_holds_no_compiler_no_installer_and_nothing_that_they_left(docker: str, image: str) -> None:
    words = "cc gcc g++ c++ clang tcc make cmake ld as nvcc pip pip3 pip3.11 uv easy_install cyclonedx-py git"
    assert within(docker, image, f"for w in {words}; do command -v $w; done; true") == ""
    modules = "pip ensurepip uv cyclonedx triton airflow celery pandas pytest"
    code = f"import importlib.util as u; print([m for m in '{modules}'.split() if u.find_spec(m)])"
    assert within(docker, image, f'python -c "{code}"') == "[]"
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        assert within(docker, image, f"test -x {python} && {python} -m pip --version 2>/dev/null; true") == ""
    paths = ("*/.cache/*", "/build*", "/var/lib/apt/lists/*Packages*", "*/torch/include", "*/torch/test")
    left = f"find / -xdev \\( -path {' -o -path '.join(map(shlex.quote, paths))} \\) -print -quit"
    assert within(docker, image, left, "--user", "0", "--cap-add", "DAC_READ_SEARCH") == ""


def test_its_bill_of_materials_names_every_package_in_its_version(docker: str, image: str) -> None:
    normal: Callable[[str], str] = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    installed = {normal(name): version for name, version in json.loads(within(docker, image, f"python -c '{code}'"))}
    bill = json.loads(within(docker, image, "cat /opt/crpbot/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "crpbot"
    assert {normal(part["name"]): part["version"] for part in bill["components"]} == installed
    assert {"torch", "polars", "boto3"} <= set(installed)
    torch = next(part for part in bill["components"] if part["name"] == "torch")
    assert torch["purl"].startswith("pkg:pypi/torch@2.13.0")


def test_its_labels_say_what_it_is_and_from_what(docker: str, image: str) -> None:
    inspected = json.loads(subprocess.run([docker, "image", "inspect", image], capture_output=True, text=True, check=True).stdout)
    labels, config = inspected[0]["Config"]["Labels"], inspected[0]["Config"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    assert labels["org.opencontainers.image.title"] == "crpbot-training"
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == (head or "unknown")
    assert labels["org.opencontainers.image.base.name"] == (os.environ.get("BASE_IMAGE") or "python:3.11-slim-bookworm")
    assert "org.opencontainers.image.created" not in labels
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["python", "-m", "crpbot_lib.training"]


# --- what it does ------------------------------------------------------------------------------------------------------------


class Away:
    """A way to the local cloud's AWS that can be cut: connections are closed while it is."""

    def __init__(self, port: int) -> None:
        self.cut = False
        self._port, self._open = port, list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            self._open += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                end.close()

    def close(self) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()


@dataclass
class Container:
    """One started container."""

    docker: str
    id: str
    lake: Lake
    run: str

    def _ask(self, *words: str, seconds: float = 120) -> str:
        done = subprocess.run([self.docker, *words], capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self) -> str:
        return self._ask("logs", self.id)

    def until(self, wanted: str, seconds: float = 240) -> None:
        """Returns when a line holds ``wanted``."""
        give_up = time.monotonic() + seconds
        while wanted not in (text := self.output()):
            assert time.monotonic() < give_up, f"no line with {wanted!r} within {seconds:.0f} s:\n{text}"
            assert self.state("Running") == "true", f"it ended before a line with {wanted!r}:\n{text}"
            time.sleep(0.3)

    def state(self, what: str) -> str:
        return self._ask("inspect", "--format", f"{{{{.State.{what}}}}}", self.id)

    def until_health(self, wanted: str, seconds: float = 240) -> None:
        """Returns when the engine calls the container ``wanted``."""
        give_up = time.monotonic() + seconds
        while (found := self.state("Health.Status")) != wanted:
            assert time.monotonic() < give_up, f"it is {found} after {seconds:.0f} s, expected {wanted}: {self.state('Health.Log')}"
            time.sleep(0.5)

    def end(self, seconds: float = 600) -> int:
        """Waits for its end; the exit status."""
        return int(self._ask("wait", self.id, seconds=seconds))

    def stop(self) -> float:
        """``docker stop``, with the time that the user data gives; seconds that it took."""
        began = time.monotonic()
        self._ask("stop", self.id)
        return time.monotonic() - began

    def kill(self) -> None:
        self._ask("kill", self.id)

    def status(self) -> dict[str, Any]:
        found = read_status(self.lake, self.run)
        assert found is not None
        return found


class Cloud:
    """The local cloud with the features of three days in its lake. Makes jobs, and containers that do them."""

    def __init__(self, docker: str, image: str, sandbox: Sandbox) -> None:
        self.sandbox, self.lake = sandbox, Lake(f"s3://{BUCKET}/images")
        self._docker, self._image = docker, image
        self._numbers = itertools.count(1)
        self._started: list[str] = []
        config = settings()
        symbols = ["BTC-USD", SYMBOL]
        for symbol in symbols:
            ensure_coverage(config, self.lake, symbol, START, END)
        plan = plan_features(config, self.lake, symbols, START, END)
        for symbol in symbols:
            build_features(config, self.lake, plan, symbol)
        gate_features(config, self.lake, plan)
        self.version = plan["version"]

    def job(self, *symbols: str, smoke: bool = True, train: dict[str, Any] | None = None, **changes: Any) -> str:
        """Writes a job and returns its run."""
        run = f"run-{next(self._numbers)}"
        spec = training.job_spec(settings(), self.lake, run, self.version, symbols or [SYMBOL], smoke=smoke)
        spec = spec.model_copy(update={"train": spec.train.model_copy(update=train or {}), **changes})
        training.write_job(self.lake, spec)
        return run

    def start(self, run: str, generation: int = 1, *options: str, command: tuple[str, ...] = (), **environment: str) -> Container:
        """A container of the run, as the user data starts it; ``options`` come after that line's own."""
        script = user_data.render(
            run=run,
            generation=generation,
            lake=self.lake.root,
            image=self._image,
            region="us-east-1",
            log_group="group",
            log_stream="stream",
            max_lifetime_minutes=60,
        )
        line = next(line for line in script.replace("\\\n", " ").splitlines() if line.startswith("docker run "))
        words, kept = iter(shlex.split(line)[2:-1]), []
        for word in words:
            if word in NOT_HERE:
                next(words)
            elif word != "--rm":
                kept.append(word)
        # what the instance's role gives on AWS
        kept += ["-e", "AWS_ACCESS_KEY_ID", "-e", "AWS_SECRET_ACCESS_KEY"]
        started = subprocess.run(
            [self._docker, "run", "--detach", *kept, *options, self._image, *command],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert started.returncode == 0, started.stderr
        self._started.append(started.stdout.strip())
        return Container(self._docker, self._started[-1], self.lake, run)

    def remove_containers(self) -> None:
        if self._started:
            subprocess.run(
                [self._docker, "rm", "--force", "--volumes", *self._started], capture_output=True, check=True, timeout=120
            )
            self._started.clear()

    def model(self, run: str, symbol: str = SYMBOL) -> bytes:
        return self.lake.read(keys.run_symbol(run, symbol, "model.pt"))

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.load(io.BytesIO(self.model(run)), weights_only=True)["weights"]
        return found


@pytest.fixture(scope="module")
def shared_cloud(
    docker: str, image: str, market_data_dir: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cloud]:
    options = SandboxOptions(
        data_dir=market_data_dir, state_dir=tmp_path_factory.mktemp("cloud"), boot_seconds=0.1, shutdown_seconds=0.1
    )
    with Sandbox(options) as sandbox, pytest.MonkeyPatch.context() as patch:
        for name, value in sandbox.env().items():
            patch.setenv(name, value)
        settings.cache_clear()
        yield Cloud(docker, image, sandbox)
    settings.cache_clear()


@pytest.fixture
def cloud(shared_cloud: Cloud) -> Iterator[Cloud]:
    yield shared_cloud
    shared_cloud.remove_containers()


@pytest.fixture(scope="module")
def uninterrupted(shared_cloud: Cloud) -> dict[str, torch.Tensor]:
    """The weights of a LONG training in one container that nothing interrupted."""
    container = shared_cloud.start(shared_cloud.job(train=LONG))
    assert container.end() == 0, container.output()
    shared_cloud.remove_containers()
    return shared_cloud.weights(container.run)


def test_a_smoke_job_runs_to_its_end_and_leaves_models_metrics_and_its_status_in_s3(cloud: Cloud) -> None:
    container = cloud.start(cloud.job("BTC-USD", SYMBOL), generation=3)
    assert container.end() == 0, container.output()
    told = container.status()
    assert (told["state"], told["generation"], told["smoke"], told["gpu"]) == ("succeeded", 3, True, None)
    for symbol, count in (("BTC-USD", 73), (SYMBOL, 54)):
        metrics = check_model(cloud.lake, container.run, symbol)
        assert (metrics["steps"], metrics["input_size"]) == (30, count)
        assert metrics["sha256"] == hashlib.sha256(cloud.model(container.run, symbol)).hexdigest()
        assert f"SMOKE {symbol}: Numeric features selected: {count}" in container.output()


@pytest.mark.parametrize("ending", ["docker stop", "SIGKILL"])
def test_a_container_that_was_ended_is_gone_on_with_by_another_to_the_same_weights(
    cloud: Cloud, uninterrupted: dict[str, torch.Tensor], ending: str
) -> None:
    run = cloud.job(train=LONG)
    first = cloud.start(run, generation=1)
    first.until(f"{SYMBOL}: epoch 2/")
    if ending == "SIGKILL":
        first.kill()
        assert (first.end(), first.status()["state"]) == (137, "running")
    else:
        assert first.stop() < 60
        assert first.end() == 75, first.output()
        told = first.status()
        assert (told["state"], told["error"]) == ("interrupted", "SMOKE SIGTERM: the process was told to end")
        assert told["symbols"][SYMBOL]["checkpoint_step"] == told["symbols"][SYMBOL]["step"]
    assert not cloud.lake.exists(keys.run_symbol(run, SYMBOL, "model.pt"))

    second = cloud.start(run, generation=2)
    assert second.end() == 0, second.output()
    assert f"{SYMBOL}: resuming at epoch " in second.output()
    assert (second.status()["state"], second.status()["generation"]) == ("succeeded", 2)
    found = cloud.weights(run)
    assert found.keys() == uninterrupted.keys()
    assert [name for name, tensor in uninterrupted.items() if not torch.equal(found[name], tensor)] == []


def test_a_spot_notice_of_the_instance_ends_the_container_in_order(cloud: Cloud, proof: list[str]) -> None:
    instance = boto3.client("ec2").run_instances(
        ImageId=cloud.sandbox.options.gpu.ami,
        InstanceType="g5.xlarge",
        MinCount=1,
        MaxCount=1,
        UserData="#!/bin/bash\nsleep 900\n",
        InstanceInitiatedShutdownBehavior="terminate",
        InstanceMarketOptions={"MarketType": "spot"},
    )["Instances"][0]["InstanceId"]
    metadata = cloud.sandbox.runner.metadata_url(instance)
    container = cloud.start(cloud.job(train=ENDLESS), AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata)
    container.until(f"{SYMBOL}: epoch 1/")
    sent = time.monotonic()
    interrupt(cloud, instance)
    assert container.end(100) == 75, container.output()
    proof.append(f"spot notice to the end of the container: {time.monotonic() - sent:.1f} s of 120 s")
    told = container.status()
    assert told["state"] == "interrupted"
    assert told["error"].startswith("SMOKE spot notice: EC2 will terminate this instance at 20")
    assert told["symbols"][SYMBOL]["checkpoint_step"] == told["symbols"][SYMBOL]["step"]
    boto3.client("ec2").terminate_instances(InstanceIds=[instance])


def interrupt(cloud: Cloud, instance: str) -> None:
    url = f"{cloud.sandbox.control_url}/_sandbox/instances/{instance}/interrupt"
    requests.post(url, json={"notice_seconds": 120}, timeout=10).raise_for_status()


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("no smoke job", 65, "models are never trained locally or on a CPU"),
        ("other features", 65, "the manifest says 00: the file was truncated or changed after the gate"),
        ("no job", 65, "has no job"),
        ("an argument", 65, "unknown arguments"),
        ("no store", 1, "Could not connect to the endpoint URL"),
    ],
)
def test_what_cannot_be_trained_ends_with_the_status_that_says_whether_a_retry_helps(
    cloud: Cloud, what: str, status: int, said: str
) -> None:
    run, command, environment = "nobody", (), {}
    if what == "no smoke job":
        run = cloud.job(smoke=False)
    elif what == "other features":
        told = training.job_spec(settings(), cloud.lake, "any", cloud.version, [SYMBOL], smoke=True).features[SYMBOL]
        run = cloud.job(features={SYMBOL: told.model_copy(update={"sha256": "00"})})
    elif what == "an argument":
        command = ("--verbose",)
    elif what == "no store":
        run, environment = cloud.job(), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    container = cloud.start(run, command=command, **environment)
    assert container.end() == status, container.output()
    assert said in container.output()
    if what in ("no smoke job", "other features"):
        told_status = container.status()
        assert (told_status["state"], told_status["permanent"]) == ("failed", True)
        assert not cloud.lake.exists(keys.run_symbol(run, SYMBOL, "model.pt"))


def test_a_full_tmp_does_not_keep_the_job_from_its_end(cloud: Cloud) -> None:
    fill = "head -c 1000000 /dev/zero > /tmp/fill; df /tmp | tail -n 1; exec python -m crpbot_lib.training"
    options = ("--tmpfs", "/tmp:size=64k", "--entrypoint", "sh")
    container = cloud.start(cloud.job(), 1, *options, command=("-c", fill))
    assert container.end() == 0, container.output()
    assert " 100% /tmp" in container.output()
    assert container.status()["state"] == "succeeded"


def test_a_store_that_is_away_makes_the_container_unhealthy_and_does_not_end_the_training(cloud: Cloud, proof: list[str]) -> None:
    way = Away(int(cloud.sandbox.aws_url.rpartition(":")[2]))
    try:
        # the image's own check, asked more often
        container = cloud.start(cloud.job(train=ENDLESS), 1, "--health-interval", "3s", AWS_ENDPOINT_URL=way.url)
        container.until("checkpoint at epoch 1,")
        container.until_health("healthy")

        way.cut, began = True, time.monotonic()
        container.until("heartbeat not written, the next one will be tried")
        container.until("no checkpoint at epoch ")
        container.until_health("unhealthy")

        way.cut, written = False, container.output().count(" bytes in ")
        proof.append(f"store away for {time.monotonic() - began:.0f} s in mid-training: survived")
        give_up = time.monotonic() + 240
        while container.output().count(" bytes in ") == written:
            assert time.monotonic() < give_up, container.output()
            time.sleep(0.5)
        container.until_health("healthy")
        container.stop()
        assert container.end() == 75, container.output()
        assert container.status()["state"] == "interrupted"
    finally:
        way.close()
