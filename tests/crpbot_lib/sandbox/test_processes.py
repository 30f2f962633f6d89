"""Processes that we start can be found and ended, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

import pytest

from crpbot_lib.sandbox import processes

IGNORES_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


def eventually(what: Callable[[], bool], seconds: float = 10) -> bool:
    give_up = time.monotonic() + seconds
    while not what() and time.monotonic() < give_up:
        time.sleep(0.02)
    return what()


def test_a_group_ends_with_all_that_it_started() -> None:
    child = processes.spawn(["bash", "-c", "sleep 60 & sleep 60 & wait"])
    assert eventually(lambda: len(processes.members(child.pid)) == 3)
    assert processes.end_group(child.pid)
    assert processes.members(child.pid) == []
    child.wait()


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    child = processes.spawn([sys.executable, "-c", IGNORES_TERM], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        started = time.monotonic()
        assert processes.end_group(child.pid, grace=0.3)
    assert time.monotonic() - started >= 0.3
    assert child.wait() == -signal.SIGKILL


def test_our_own_group_and_init_are_refused() -> None:
    for pid in (0, 1, os.getpgrp()):
        with pytest.raises(ValueError, match="will not end process group"):
            processes.end_group(pid)


def test_marked_processes_are_found_with_their_descendants_even_in_sessions_of_their_own() -> None:
    value = uuid.uuid4().hex
    child = processes.spawn(["bash", "-c", "setsid sleep 60 & setsid sleep 60 & wait"], marker=value)
    assert eventually(lambda: len(processes.processes_with_marker(processes.MARKER, value)) == 3)
    assert processes.processes_with_marker(processes.MARKER, value[:-1]) == []
    processes.send(processes.processes_with_marker(processes.MARKER, value), signal.SIGKILL)
    child.wait()
    assert eventually(lambda: processes.processes_with_marker(processes.MARKER, value) == [])


def test_descendants_are_listed_and_zombies_are_not_alive() -> None:
    child = processes.spawn(["bash", "-c", "sleep 60 & wait"])
    assert eventually(lambda: len(processes.descendants(child.pid)) == 1)
    assert child.pid in processes.descendants(os.getpid())
    processes.end_group(child.pid)
    assert not processes.alive(child.pid)  # not yet reaped
    child.wait()


def test_a_spawned_process_dies_with_the_one_that_spawned_it() -> None:
    code = (
        "import time; from crpbot_lib.sandbox.processes import spawn; print(spawn(['sleep', '60']).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    assert processes.alive(child)
    parent.kill()
    parent.wait()
    assert eventually(lambda: not processes.alive(child))
