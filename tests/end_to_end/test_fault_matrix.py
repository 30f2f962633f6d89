"""The short fault matrix: every phase of a run and every layer that a laptop has. `make fault-matrix` runs it whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault_matrix import cells
from tests.fault_matrix.matrix import LONGEST_LIFE, run_matrix

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(3000)]


def test_whatever_fails_and_whenever_no_instance_is_left_and_none_outlives_its_deadline(tmp_path: Path, proof: list[str]) -> None:
    said: list[str] = []
    results = run_matrix(tmp_path, cells.SHORT, said.append, at_once=4)
    assert {result.cell: result.wrong for result in results if result.wrong} == {}, "\n".join(said)
    ends = {layer for result in results for layer in result.layers}
    # deadline and switch are seconds apart: which of them is first is chance
    assert {"1", "2", "4", "5"} <= ends, "the short matrix no longer meets the layers that it is there to meet"
    proof.append(
        f"fault matrix, short: {len(results)} cells, 0 instances left, ended by layers {', '.join(sorted(ends))}; longest life "
        f"{max(result.longest_life for result in results):.0f} s of {LONGEST_LIFE:.0f} s"
    )
