"""What every test has: dummy credentials, loopback only, the real market data where it is at hand."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# before anything imports boto3 or Airflow
for _name in [name for name in os.environ if name.startswith(("AWS_", "CRPBOT_", "AIRFLOW"))]:
    if _name not in ("AWS_CA_BUNDLE", "CRPBOT_SANDBOX_DATA"):
        del os.environ[_name]
os.environ.update(
    AWS_EC2_METADATA_DISABLED="true",
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
)


@pytest.fixture(scope="session")
def market_data_dir() -> Path | None:
    """The folder of real market data (see docs/sandbox.md), or None: then tests use generated data and say so."""
    configured = os.environ.get("CRPBOT_SANDBOX_DATA")
    path = Path(configured) if configured else REPOSITORY.parent / "shared" / "market_data"
    return path if path.is_dir() else None


class OutsideConnectionError(AssertionError):
    """A test tried to leave this machine."""


AIRFLOW = "tests/end_to_end/"
PROOF = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def proof(request: pytest.FixtureRequest) -> list[str]:
    """Lines that pytest prints when all is done: what a suite of faults injected, and what it compared."""
    return request.config.stash.setdefault(PROOF, [])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In workers of pytest-xdist the longest come first, so that none of them is left for the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is one worker's, since its fixtures are processes; so are all that start an Airflow, which keeps two cores busy."""
    from xdist.scheduler import LoadFileScheduling
    from xdist.workermanage import NodeManager

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return AIRFLOW if file.startswith(AIRFLOW) else file

    NodeManager.EXIT_TIMEOUT = 60  # seconds that workers have on Ctrl-C to end what their fixtures started; else 10
    config.option.loadscopereorder = False  # the order is that of the collection
    return Scheduling(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its lines to the process that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["proof"] = session.config.stash.get(PROOF, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    # a worker that died has no output, and its test has failed
    node.config.stash.setdefault(PROOF, []).extend(getattr(node, "workeroutput", {}).get("proof", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := terminalreporter.config.stash.get(PROOF, []):
        terminalreporter.section("proof")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that leaves this machine fails the test that tried it."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def check(address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("localhost", "::1") and not str(host).startswith("127."):
            raise OutsideConnectionError(f"a test tried to connect to {address}; tests may use loopback only")

    def guarded_connect(self: socket.socket, address: object) -> None:
        check(address)
        connect(self, address)  # type: ignore[arg-type]

    def guarded_connect_ex(self: socket.socket, address: object) -> int:
        check(address)
        return connect_ex(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)


@pytest.fixture(scope="session", autouse=True)
def models_of_aws_are_read_once() -> Iterator[None]:
    """botocore parses a service's model anew for each session, which is half of the work of the tests that talk to AWS."""
    from botocore.loaders import JSONFileLoader

    read = functools.cache(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda _, path: read(path))
        yield


@pytest.fixture(scope="session", autouse=True)
def limits_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rate limits are shared through files: a pause of another run of the tests, or of this machine's own fetches, is not ours."""
    os.environ["CRPBOT_RATE_LIMIT_DIR"] = str(tmp_path_factory.mktemp("rate-limits"))


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    """Settings are read once a process; each test reads its own."""
    from crpbot_lib.config import settings

    settings.cache_clear()
    yield
    settings.cache_clear()
