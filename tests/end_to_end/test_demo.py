"""The demonstration ends what it started, also when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crpbot_lib.sandbox import processes

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(300)]


def test_ctrl_c_in_the_middle_ends_every_process(tmp_path: Path) -> None:
    state = tmp_path / "demo"
    command = [Path(sys.executable).with_name("crpbot"), "demo", "--state", state, "--days", "1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    output = tmp_path / "output"
    with output.open("wb") as out:
        demo = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while not re.search(r"market_data .* tasks", output.read_text()):
            assert demo.poll() is None, output.read_text()
            assert time.monotonic() < until, output.read_text()
            time.sleep(0.5)
        marker = (state / "marker").read_text()
        # Airflow's four components, the local cloud and the tasks that run
        assert len(processes.processes_with_marker(processes.MARKER, marker)) > 5
        demo.send_signal(signal.SIGINT)
        assert demo.wait(timeout=120) == 130, output.read_text()
    finally:
        if demo.poll() is None:
            processes.end_group(demo.pid, grace=30)
            demo.wait(timeout=60)
    assert processes.processes_with_marker(processes.MARKER, marker) == []
    assert "everything that was started has been ended" in output.read_text()
