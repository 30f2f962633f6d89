"""Dependencies point one way: dags → plugins → crpbot_lib, and nothing in production knows the sandbox."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def imports(folder: str) -> Iterator[tuple[Path, str]]:
    """(file, imported module) of every import statement below ``folder``, those inside functions included."""
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_library_imports_no_airflow() -> None:
    offending = [(p.name, m) for p, m in imports("crpbot_lib") if m.split(".")[0] in ("airflow", "crpbot_airflow")]
    assert offending == []


def test_nothing_in_production_imports_the_sandbox() -> None:
    allowed = (REPOSITORY / "crpbot_lib" / "sandbox", REPOSITORY / "crpbot_lib" / "cli" / "sandbox.py")
    offending = [
        (path.name, module)
        for folder in ("dags", "plugins", "crpbot_lib")
        for path, module in imports(folder)
        if module.startswith("crpbot_lib.sandbox") and not path.is_relative_to(allowed[0]) and path != allowed[1]
    ]
    assert offending == []


def test_dags_use_the_sdk_only_and_no_io_library() -> None:
    modules = {m.split(".")[0] for _, m in imports("dags")}
    assert modules <= {"__future__", "airflow", "crpbot_airflow", "crpbot_lib", "datetime", "typing", "hashlib", "re"}
    assert {m for _, m in imports("dags") if m.startswith("airflow")} <= {
        m for _, m in imports("dags") if m.startswith("airflow.sdk")
    }


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("features", ("boto3", "requests", "torch")),
        ("market_data", ("boto3", "torch", "crpbot_lib.lake")),
        ("lake", ("torch", "requests", "crpbot_lib.features", "crpbot_lib.market_data")),
        ("training", ("crpbot_lib.gpu", "crpbot_lib.registry", "crpbot_lib.runtime", "crpbot_lib.market_data")),
        ("gpu", ("torch", "crpbot_lib.training", "crpbot_lib.features", "crpbot_lib.market_data")),
        ("config.py", ("crpbot_lib",)),
    ],
)
def test_a_module_knows_nothing_of(module: str, forbidden: tuple[str, ...]) -> None:
    found = imports(f"crpbot_lib/{module}") if not module.endswith(".py") else _of_file(module)
    offending = [(p.name, m) for p, m in found if any(m == f or m.startswith(f"{f}.") for f in forbidden)]
    assert offending == []


def _of_file(name: str) -> Iterator[tuple[Path, str]]:
    return ((path, module) for path, module in imports("crpbot_lib") if path == REPOSITORY / "crpbot_lib" / name)


def test_importing_the_commands_loads_neither_airflow_nor_torch() -> None:
    script = "import crpbot_lib.cli, sys; print(sorted({'airflow', 'torch', 'moto'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]", answer.stderr
