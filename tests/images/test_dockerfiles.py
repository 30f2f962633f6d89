"""The Dockerfiles: pinned, without root, built from what the locks say, and each with what belongs in it and no more."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from crpbot_lib.config import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted(REPOSITORY.glob("images/*/Dockerfile"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions in order, as (name, arguments), with continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def argument(dockerfile: Path, name: str) -> str:
    """The default of a build argument."""
    values = [text.partition("=")[2] for kind, text in instructions(dockerfile) if kind == "ARG" and text.startswith(f"{name}=")]
    assert len(values) == 1, f"{dockerfile}: ARG {name} stands {len(values)} times, expected once"
    return values[0]


def test_there_are_two_images() -> None:
    assert [path.parent.name for path in DOCKERFILES] == ["airflow", "training"]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.parent.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


class TestEveryImage:
    def test_takes_the_base_of_every_stage_from_one_build_argument_with_a_pinned_default(self, dockerfile: Path) -> None:
        steps = instructions(dockerfile)
        assert steps[0][1].startswith("BASE_IMAGE=")
        assert {text.split()[0] for kind, text in steps if kind == "FROM"} == {"${BASE_IMAGE}"}
        name, _, tag = argument(dockerfile, "BASE_IMAGE").rpartition(":")
        assert name
        assert tag != "latest"
        assert re.search(r"\d+\.\d+", tag)

    def test_needs_no_frontend_from_a_registry(self, dockerfile: Path) -> None:
        assert "syntax=" not in dockerfile.read_text().replace(" ", "").lower()

    def test_runs_as_an_ordinary_user(self, dockerfile: Path) -> None:
        users = [text for kind, text in instructions(dockerfile) if kind == "USER"]
        assert users
        # a number: the orchestrator that refuses root cannot look a name up
        assert int(users[-1].partition(":")[0]) > 0

    def test_installs_only_what_the_lock_hashes_and_torch_at_its_pinned_version(self, dockerfile: Path) -> None:
        lock = f"requirements/{dockerfile.parent.name}.lock"
        installs = [text for kind, text in instructions(dockerfile) if kind == "RUN" and "pip install" in text]
        assert (REPOSITORY / lock).is_file()
        assert any("--require-hashes" in text and lock.rpartition("/")[2] in text for text in installs)
        others = [text for text in installs if "--require-hashes" not in text and "--no-deps" not in text]
        assert len(others) == 1
        assert others[0].endswith('"torch==${TORCH_VERSION}"')

    @pytest.mark.parametrize(
        ("given", "index"),
        [
            ({}, ""),
            ({"PIP_INDEX_URL": "https://mirror"}, "https://mirror"),
            ({"PIP_INDEX_URL": "https://mirror", "TORCH_INDEX_URL": "https://cpu"}, "https://cpu"),
        ],
    )
    def test_takes_torch_from_its_own_index_or_pips_also_where_neither_is_set(
        self, dockerfile: Path, given: dict[str, str], index: str
    ) -> None:
        step = next(text for kind, text in instructions(dockerfile) if kind == "RUN" and "torch==" in text)
        # a published base may set this shell, and an unset name then ends the build
        shell = ["bash", "-o", "errexit", "-o", "nounset", "-o", "pipefail", "-c"]
        environment = {"PATH": os.environ["PATH"], "TORCH_INDEX_URL": "", "TORCH_VERSION": "1", **given}
        script = f'pip() {{ echo "$PIP_INDEX_URL|$*"; }}; {step}'
        told = subprocess.run([*shell, script], env=environment, capture_output=True, text=True, timeout=30)
        assert (told.returncode, told.stdout, told.stderr) == (0, f"{index}|install torch==1\n", "")

    def test_leaves_no_package_lists_behind(self, dockerfile: Path) -> None:
        for kind, text in instructions(dockerfile):
            if kind == "RUN" and "apt-get install" in text:
                assert "--no-install-recommends" in text
                assert "rm -rf /var/lib/apt/lists" in text

    def test_works_in_absolute_folders_and_says_what_it_is(self, dockerfile: Path) -> None:
        steps = instructions(dockerfile)
        assert all(text.startswith("/") for kind, text in steps if kind == "WORKDIR")
        labels = " ".join(text for kind, text in steps if kind == "LABEL")
        for label in ("title", "version", "revision", "licenses"):
            assert f"org.opencontainers.image.{label}=" in labels
        assert argument(dockerfile, "VERSION") == PROJECT["version"]

    def test_copies_only_what_the_build_context_holds(self, dockerfile: Path) -> None:
        allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for kind, text in instructions(dockerfile):
            if kind in ("COPY", "ADD"):
                assert kind == "COPY"
                if text.startswith("--from="):
                    continue
                for source in [word for word in text.split() if not word.startswith("--")][:-1]:
                    assert source.split("/")[0] in allowed
                    assert (REPOSITORY / source).exists()


def test_both_images_carry_the_torch_that_the_tests_run_with() -> None:
    makefile = re.search(r"^TORCH_VERSION := (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert makefile
    assert {argument(path, "TORCH_VERSION") for path in DOCKERFILES} == {makefile[1]}


def test_the_airflow_base_is_the_version_of_the_project() -> None:
    airflow = next(r for r in PROJECT["optional-dependencies"]["airflow"] if r.startswith("apache-airflow=="))
    version, python = airflow.partition("==")[2], PROJECT["requires-python"].partition(",")[0].removeprefix(">=")
    assert argument(REPOSITORY / "images/airflow/Dockerfile", "BASE_IMAGE") == f"apache/airflow:{version}-python{python}"
    assert argument(REPOSITORY / "images/training/Dockerfile", "BASE_IMAGE").startswith(f"python:{python}-slim-")


class TestTheTrainingImage:
    dockerfile = REPOSITORY / "images/training/Dockerfile"

    def test_holds_no_airflow(self) -> None:
        packages = re.findall(r"^([a-z0-9-]+)==", (REPOSITORY / "requirements/training.lock").read_text(), re.MULTILINE)
        assert "polars" in packages
        assert [name for name in packages if "airflow" in name or name == "celery"] == []
        copied = " ".join(text for kind, text in instructions(self.dockerfile) if kind == "COPY")
        assert "dags" not in copied
        assert "plugins" not in copied

    def test_leaves_what_builds_it_in_the_stage_that_builds_it(self) -> None:
        steps = instructions(self.dockerfile)
        last = max(at for at, (kind, _) in enumerate(steps) if kind == "FROM")
        assert [text for kind, text in steps[last:] if "pip install" in text or "apt-get" in text] == []
        copied = [text for kind, text in steps[last:] if kind == "COPY"]
        assert copied == [f"--from=build {folder} {folder}" for folder in ("/opt/venv", "/opt/crpbot")]

    def test_tells_its_health_by_its_own_heartbeat(self) -> None:
        checks = [text for kind, text in instructions(self.dockerfile) if kind == "HEALTHCHECK"]
        assert len(checks) == 1
        assert checks[0].endswith('CMD ["python", "-m", "crpbot_lib.training", "--health"]')

    def test_starts_the_training_job(self) -> None:
        assert ("ENTRYPOINT", '["python", "-m", "crpbot_lib.training"]') in instructions(self.dockerfile)

    def test_is_the_image_that_a_launch_runs_by_default(self) -> None:
        assert Settings().gpu.training_image == f"crpbot-training:{PROJECT['version']}"


@pytest.mark.parametrize("name", ["training", "airflow"])
def test_make_builds_it_with_the_base_the_wheel_and_the_name_that_are_asked_for(name: str) -> None:
    asked = ["BASE_IMAGE=base:1", "TORCH_INDEX_URL=https://index/cpu", "TAG=registry/name:1", "BUILD_OPTIONS=--pull"]
    words = planned(name, *asked)
    assert words[:2] == ["docker", "build"]
    assert words[words.index("--file") + 1] == f"images/{name}/Dockerfile"
    assert words[words.index("--tag") + 1] == "registry/name:1"
    built = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
    assert {"BASE_IMAGE=base:1", "TORCH_INDEX_URL=https://index/cpu", f"VERSION={PROJECT['version']}"} <= set(built)
    assert words[-2:] == ["--pull", "."]
    assert planned(name)[planned(name).index("--tag") + 1] == f"crpbot-{name}:{PROJECT['version']}"
    assert not [word for word in planned(name) if word.startswith(("BASE_IMAGE", "TORCH_INDEX_URL"))]


def planned(name: str, *variables: str) -> list[str]:
    """What ``make image-NAME`` would run, in an environment that asks for nothing."""
    make = ["make", "--dry-run", "--no-print-directory", f"image-{name}", *variables]
    told = subprocess.run(
        make, cwd=REPOSITORY, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True, timeout=30
    )
    return shlex.split(told.stdout.replace("\\\n", " "))


def test_the_build_context_holds_nothing_but_what_is_named() -> None:
    rules = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert "!.env" not in rules
    assert "!.git" not in rules
