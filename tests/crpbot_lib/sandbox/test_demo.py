"""The demonstration is careful with what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from crpbot_lib.sandbox.demo import Demo, DemoError


def test_a_folder_that_is_no_earlier_demonstration_is_never_emptied(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis").write_text("years")
    with pytest.raises(DemoError, match="not empty and no earlier demonstration's"):
        Demo(state=work).run()
    assert (work / "thesis").read_text() == "years"


def test_a_second_demonstration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    first = Demo(state=state)
    with first._alone(), pytest.raises(DemoError, match="another demonstration is running"):
        Demo(state=state).run()
