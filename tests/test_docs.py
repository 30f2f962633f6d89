"""What the pages say exists: every setting with its default, every command with its options, every target, test and file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from crpbot_lib.cli import app
from crpbot_lib.config import DEFAULT_SYMBOLS, Settings

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
CONFIGURED = [REPOSITORY / "docker-compose.airflow.yml", REPOSITORY / "Makefile", *sorted(REPOSITORY.glob("images/airflow/*.env"))]
NOT_SETTINGS = {"CRPBOT_CONFIG", "CRPBOT_SANDBOX_DATA", "CRPBOT_RUN", "CRPBOT_GENERATION", "CRPBOT_MARKER"}


def settings_of(model: type[BaseModel], prefix: str = "CRPBOT_") -> Iterator[tuple[str, Any]]:
    """(environment variable, default) of every leaf."""
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        if isinstance(field.default, BaseModel):
            yield from settings_of(type(field.default), f"{variable}__")
        else:
            yield variable, field.default


SETTINGS = dict(settings_of(Settings))


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def code_of(text: str) -> Iterator[str]:
    """The commands of a page, one a line: indented and fenced blocks without comments, and code spans."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^(?:    .+)$", text, re.M)
    for block in re.findall(r"^```(?:sh|console)?\n(.*?)^```", text, re.M | re.S):
        blocks += block.splitlines()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*blocks, *spans]:
        # a comment after the command, and a table's escaped bar
        yield from (part.strip() for part in re.split(r"&&|;|\bdo\b", re.split(r"\s+# ", line.replace("\\|", "|"))[0]))


@pytest.mark.parametrize("variable", SETTINGS)
def test_every_setting_is_described_with_its_default(variable: str) -> None:
    default = SETTINGS[variable]
    if default is None or default in ("", ()):
        shown = "none"
    elif isinstance(default, tuple):
        shown = "see below"
    else:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert f"| `{variable}` | {shown} |" in page


def test_the_configuration_file_that_is_shown_is_valid_and_begins_with_the_default_symbols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    section = page.partition("\n## A configuration file\n")[2].partition("\n## ")[0]
    (tmp_path / "crpbot.toml").write_text("\n".join(re.findall(r"^    (.+)$", section, re.M)))
    monkeypatch.setenv("CRPBOT_CONFIG", str(tmp_path / "crpbot.toml"))
    shown = Settings().symbols
    # the table replaces the defaults, so whoever adds a symbol copies them
    assert shown[: len(DEFAULT_SYMBOLS)] == DEFAULT_SYMBOLS
    assert len(shown) > len(DEFAULT_SYMBOLS)


@pytest.mark.parametrize("path", [*PAGES, *CONFIGURED], ids=by_name)
def test_every_name_of_ours_is_a_setting(path: Path) -> None:
    named = set(re.findall(r"\bCRPBOT_[A-Z0-9_]*[A-Z0-9]", path.read_text()))
    wrong_on_purpose = {"CRPBOT_LAK"}
    assert named - set(SETTINGS) - NOT_SETTINGS - wrong_on_purpose == set()


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_every_command_exists_with_its_options(path: Path) -> None:
    for line in code_of(path.read_text()):
        words = re.sub(r"^(\w+=\S+\s+)+", "", line).split()
        if not words or Path(words[0]).name != "crpbot":
            continue
        command: Any = typer.main.get_command(app)
        for word in words[1:]:
            if word.startswith("-"):
                known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
                assert word.partition("=")[0] in known | {"--help"}, f"{line!r}: {command.name} has no option {word}"
            elif commands := getattr(command, "commands", None):
                alternatives = [commands.get(name) for name in word.split("|")]
                assert all(alternatives), f"{line!r}: {command.name} has no command {word}"
                command = alternatives[0]


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_every_make_target_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    named = {words[1] for line in code_of(path.read_text()) if len(words := line.split()) > 1 and words[0] == "make"}
    assert {name for name in named if "=" not in name} <= targets


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_every_test_that_is_named_exists(path: Path) -> None:
    tests = {name for file in (REPOSITORY / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    named = {name for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert named - tests == set()


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    linked = {target for target in re.findall(r"\]\(([^)#:]+)\)", text)}
    missing = {target for target in linked if not (path.parent / target).exists()}
    roots = r"(?:docs|dags|plugins|crpbot_lib|images|tests|requirements)"
    written = set(re.findall(rf"`({roots}/[\w./-]+)`", text)) | set(re.findall(r"\((docs/[\w./-]+\.md)\)", text))
    missing |= {name for name in written if not (REPOSITORY / name).exists()}
    assert missing == set()
