"""docker-compose.airflow.yml and its environment files: complete, pinned, closed to the network, without a secret in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet
from pydantic import BaseModel

from crpbot_lib.config import Settings
from crpbot_lib.sandbox.demo import profile
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE_FILE = REPOSITORY / "docker-compose.airflow.yml"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

AIRFLOW = {"airflow-init", "api-server", "scheduler", "dag-processor", "triggerer", "worker"}
ONE_SHOT = {"airflow-init"}
NOT_SETTINGS = {"CRPBOT_CONFIG", "CRPBOT_SANDBOX_DATA"}


def env_file(name: str) -> dict[str, str | None]:
    """An environment file; None for a name without a value, which Compose passes through."""
    lines = (REPOSITORY / "images/airflow" / f"{name}.env").read_text().splitlines()
    entries = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {key: value if equals else None for key, equals, value in entries}


def settings_of(model: type[BaseModel], prefix: str = "CRPBOT_") -> Iterator[str]:
    """The environment variable of every setting: ``CRPBOT_A__B`` is field ``b`` of field ``a`` of Settings."""
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        if isinstance(field.default, BaseModel):
            yield from settings_of(type(field.default), f"{variable}__")
        else:
            yield variable


SETTINGS = set(settings_of(Settings))


def new_env(folder: Path, *cloud: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "images/airflow/new-env"
    return subprocess.run(["sh", str(script), *cloud], cwd=folder, capture_output=True, text=True, timeout=30)


class TestServices:
    def test_are_all_of_airflow_its_database_its_queue_and_the_local_cloud(self) -> None:
        assert set(SERVICES) == {*AIRFLOW, "postgres", "redis", "local-cloud"}
        assert [name for name, service in SERVICES.items() if service.get("profiles")] == ["local-cloud"]
        assert SERVICES["local-cloud"]["profiles"] == ["local"]

    def test_one_of_them_builds_the_image_that_the_others_share(self) -> None:
        assert [name for name, service in SERVICES.items() if "build" in service] == ["airflow-init"]
        own = {service["image"] for name, service in SERVICES.items() if name in {*AIRFLOW, "local-cloud"}}
        assert own == {f"crpbot-airflow:{PROJECT['version']}"}
        assert (REPOSITORY / SERVICES["airflow-init"]["build"]["dockerfile"]).is_file()

    def test_have_pinned_images(self) -> None:
        for name, service in SERVICES.items():
            tag = service["image"].rpartition(":")[2]
            assert re.match(r"\d", tag), f"{name}: {service['image']} has no version"

    @pytest.mark.parametrize("name", sorted(set(SERVICES) - ONE_SHOT))
    def test_that_stay_up_tell_their_health(self, name: str) -> None:
        check = SERVICES[name]["healthcheck"]
        assert check["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries", "start_period"} <= set(check)
        assert SERVICES[name]["restart"] == "unless-stopped"

    def test_wait_for_the_migrated_database(self) -> None:
        for name in AIRFLOW - ONE_SHOT:
            assert SERVICES[name]["depends_on"]["airflow-init"] == {"condition": "service_completed_successfully"}
        needs = SERVICES["airflow-init"]["depends_on"]
        assert {name for name, how in needs.items() if how["condition"] == "service_healthy"} == set(needs)
        assert {name for name, how in needs.items() if how.get("required", True)} == {"postgres", "redis"}

    def test_are_reached_from_this_machine_alone_and_only_the_api(self) -> None:
        published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
        assert list(published) == ["api-server"]
        assert all(port.startswith("127.0.0.1:") for port in published["api-server"])

    def test_mount_the_repository_read_only_and_what_they_mount_exists(self) -> None:
        for name, service in SERVICES.items():
            for volume in service.get("volumes", []):
                source, target = re.sub(r"\$\{[^}]*:-([^}]*)\}", r"\1", volume).split(":", 1)
                if source.startswith("./"):
                    assert target.endswith(":ro"), f"{name}: {volume}"
                    assert (REPOSITORY / source).is_dir(), f"{name}: {volume}"
                else:
                    assert source in COMPOSE["volumes"], f"{name}: {volume}"


class TestEnvironment:
    @pytest.mark.parametrize("name", sorted(AIRFLOW))
    def test_is_the_same_for_every_airflow_process(self, name: str) -> None:
        shared, own = COMPOSE["x-airflow"]["environment"], SERVICES[name]["environment"]
        assert {key: own.get(key) for key in shared} == shared

    def test_puts_tasks_on_celery_and_their_api_on_the_inner_network(self) -> None:
        environment = COMPOSE["x-airflow"]["environment"]
        assert environment["AIRFLOW__CORE__EXECUTOR"] == "CeleryExecutor"
        assert environment["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://api-server:8080/execution/"
        assert environment["AIRFLOW__CORE__LOAD_EXAMPLES"] == "false"
        assert environment["AIRFLOW__CORE__AUTH_MANAGER"].endswith(".SimpleAuthManager")

    def test_has_no_secret_of_its_own_and_no_default_for_one(self) -> None:
        for service in SERVICES.values():
            for key, value in service.get("environment", {}).items():
                if re.search("SECRET|FERNET|PASSWORD$", key):
                    assert re.fullmatch(r"\$\{[A-Z_]+(:\?[^}]*)?\}", value), f"{key} is written down"
        text = COMPOSE_FILE.read_text()
        for name in re.findall(r"\$\{([A-Z_]*(?:SECRET|FERNET|PASSWORD)[A-Z_]*)", text):
            assert f"${{{name}:?" in text, f"{name}: nothing refuses an empty value"

    def test_follows_the_chosen_cloud(self) -> None:
        for name in {*AIRFLOW, "local-cloud"}:
            assert SERVICES[name]["env_file"] == "images/airflow/${COMPOSE_PROFILES:-aws}.env"

    @pytest.mark.parametrize("cloud", ["aws", "local"])
    def test_names_only_settings_that_exist(self, cloud: str) -> None:
        assert {name for name in env_file(cloud) if name.startswith("CRPBOT_")} <= SETTINGS | NOT_SETTINGS

    def test_of_aws_holds_names_and_no_values(self) -> None:
        assert set(env_file("aws").values()) == {None}

    def test_of_aws_names_every_setting_since_what_is_not_named_reaches_no_container(self) -> None:
        assert SETTINGS - set(env_file("aws")) == set()

    def test_of_aws_names_what_the_stack_prints(self) -> None:
        outputs = set(re.findall(r"Description: (CRPBOT_\w+)", (REPOSITORY / "infra/crpbot.yaml").read_text()))
        assert "CRPBOT_GPU__LOG_GROUP" in outputs
        assert outputs - set(env_file("aws")) == set()

    def test_of_the_local_cloud_is_what_that_cloud_says_of_itself_and_what_the_demonstration_sets(self, tmp_path: Path) -> None:
        words = SERVICES["local-cloud"]["command"].split()
        said = {word.removeprefix("--"): words[at + 1] for at, word in enumerate(words) if word.startswith("--")}
        with Sandbox(SandboxOptions(state_dir=tmp_path, advertise=said["advertise"])) as cloud:
            expected = json.dumps(profile(cloud.env()))
            expected = expected.replace(cloud.aws_url, f"http://local-cloud:{said['aws-port']}")
            expected = expected.replace(cloud.control_url, f"http://local-cloud:{said['port']}")
        local = env_file("local")
        assert datetime.fromisoformat(str(local.pop("CRPBOT_RUNTIME__AS_OF"))).tzinfo is not None
        assert local == json.loads(expected)

    def test_of_the_local_cloud_makes_valid_settings_that_lead_nowhere_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in env_file("local").items():
            monkeypatch.setenv(name, str(value))
            assert "://" not in str(value) or re.match(r"http://local-cloud:|s3://", str(value)), f"{name}={value}"
        assert Settings().training.smoke


class TestNewEnv:
    def test_writes_every_secret_that_compose_asks_for(self, tmp_path: Path) -> None:
        assert new_env(tmp_path, "local").returncode == 0
        written = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
        assert set(re.findall(r"[^$]\$\{([A-Z_]+):\?", COMPOSE_FILE.read_text())) <= set(written)
        assert written["COMPOSE_PROFILES"] == "local"
        assert (REPOSITORY / written["COMPOSE_FILE"]) == COMPOSE_FILE
        Fernet(written["AIRFLOW__CORE__FERNET_KEY"])
        # it stands in a URL
        assert re.fullmatch(r"[A-Za-z0-9_-]{32}", written["POSTGRES_PASSWORD"])
        assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600

    def test_writes_others_each_time(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        assert new_env(tmp_path / "a").returncode == new_env(tmp_path / "b").returncode == 0
        first, second = (set((tmp_path / name / ".env").read_text().splitlines()) for name in "ab")
        assert first & second == {"COMPOSE_FILE=docker-compose.airflow.yml", "COMPOSE_PROFILES="}

    def test_keeps_an_existing_file(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("POSTGRES_PASSWORD=kept\n")
        result = new_env(tmp_path, "local")
        assert result.returncode != 0
        assert ".env exists" in result.stderr
        assert (tmp_path / ".env").read_text() == "POSTGRES_PASSWORD=kept\n"

    def test_refuses_a_cloud_it_does_not_know(self, tmp_path: Path) -> None:
        result = new_env(tmp_path, "gcp")
        assert result.returncode != 0
        assert "'gcp'" in result.stderr
        assert not (tmp_path / ".env").exists()


def docker_with_compose() -> str | None:
    """A docker client that has the compose plugin. A bare client may come first on PATH."""
    for candidate in (shutil.which("docker"), "/usr/bin/docker"):
        if candidate and Path(candidate).is_file():
            version = subprocess.run([candidate, "compose", "version"], capture_output=True, timeout=30)
            if version.returncode == 0:
                return candidate
    return None


DOCKER = docker_with_compose()


# The one thing here that needs a program which Python's registries do not have. It needs no engine. Everything that can be
# checked without the program is checked above.
@pytest.mark.containers
@pytest.mark.skipif(DOCKER is None, reason="no docker client with the compose plugin on this machine")
@pytest.mark.parametrize("cloud", ["aws", "local"])
def test_compose_itself_accepts_the_file(cloud: str, tmp_path: Path) -> None:
    assert new_env(tmp_path, *([cloud] if cloud == "local" else [])).returncode == 0
    assert DOCKER is not None
    result = subprocess.run(
        [DOCKER, "compose", "--file", str(COMPOSE_FILE), "--env-file", str(tmp_path / ".env"), "config", "--format", "json"],
        # a shell with real AWS settings
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AWS_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "of-the-shell"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    services = json.loads(result.stdout)["services"]
    assert set(services) == set(SERVICES) - ({"local-cloud"} if cloud == "aws" else set())
    worker = services["worker"]["environment"]
    if cloud == "aws":
        assert (worker["AWS_REGION"], worker["AWS_ACCESS_KEY_ID"]) == ("eu-west-1", "of-the-shell")
        assert "AWS_ENDPOINT_URL" not in worker
        assert "CRPBOT_LAKE" not in worker
    else:
        assert {name: worker[name] for name in env_file("local")} == env_file("local")


@pytest.mark.containers
@pytest.mark.skipif(DOCKER is None, reason="no docker client with the compose plugin on this machine")
def test_compose_refuses_to_start_without_secrets(tmp_path: Path) -> None:
    assert DOCKER is not None
    (tmp_path / "empty").touch()
    result = subprocess.run(
        [DOCKER, "compose", "--file", str(COMPOSE_FILE), "--env-file", str(tmp_path / "empty"), "config"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert "images/airflow/new-env" in result.stderr
