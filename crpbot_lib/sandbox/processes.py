"""Starting processes that cannot outlive us, and ending them by pid. Linux only: it reads /proc and uses prctl(2).

Imports the standard library alone, since every stand-in of an instance loads it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

MARKER = "CRPBOT_MARKER"
"""Environment variable by which ``processes_with_marker`` finds what was started under one name."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Has the kernel send ``signum`` to this process when the *thread* that forked it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    marker: str | None = None,
) -> subprocess.Popen[bytes]:
    """Starts ``argv`` in a session of its own; the kernel kills it (it alone, not its children) when the calling thread ends.

    So call it from a thread that lives as long as the child should: the main thread, or one that waits for the child.
    ``env`` None inherits; ``marker`` becomes ``CRPBOT_MARKER`` and is inherited by all that the child starts.
    """
    parent = os.getpid()

    def child() -> None:
        die_with_parent()
        if os.getppid() != parent:  # the parent died before the line above took effect
            os._exit(1)

    environment = dict(os.environ if env is None else env)
    if marker is not None:
        environment[MARKER] = marker
    return subprocess.Popen(
        list(argv),
        env=environment,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=child,
    )


class _Row(NamedTuple):
    parent: int
    group: int
    state: str


def _table() -> dict[int, _Row]:
    """All living processes; zombies are dead and left out."""
    rows: dict[int, _Row] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            # proc(5): "pid (command) state ppid pgrp …", and the command may itself hold parentheses
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended since the listing
        if fields[0] not in ("Z", "X"):
            rows[int(name)] = _Row(int(fields[1]), int(fields[2]), fields[0])
    return rows


def alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    return pid in _table()


def descendants(pid: int) -> list[int]:
    """The living processes below ``pid``, parents before children; ``pid`` itself is not among them."""
    table = _table()
    children: dict[int, list[int]] = {}
    for child, row in table.items():
        children.setdefault(row.parent, []).append(child)
    found: list[int] = []
    level = [pid]
    while level:
        level = [c for p in level for c in sorted(children.get(p, []))]
        found += level
    return found


def freeze(pid: int) -> None:
    """SIGSTOPs every process below ``pid``; returns when each of them stands still, those forked meanwhile too."""
    while True:
        # the table before the list: what was forked in between is in the list alone, and counts as running
        table = _table()
        running = [below for below in descendants(pid) if below not in table or table[below].state != "T"]
        if not running:
            return
        send(running, signal.SIGSTOP)
        time.sleep(0.005)


def members(group: int) -> list[int]:
    """The living processes of process group ``group``."""
    return sorted(pid for pid, row in _table().items() if row.group == group)


def processes_with_marker(name: str, value: str) -> list[int]:
    """Pids of the living processes whose environment, as it was when they started, holds ``name=value``.

    For leftovers of our own: only what we marked is found, so that nothing else is ever ended. Processes that we may not read are
    not ours and are left out.
    """
    wanted = f"{name}={value}".encode()
    found = []
    for pid in _table():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environ.split(b"\0"):
            found.append(pid)
    return sorted(found)


def send(pids: Iterable[int], signum: int) -> None:
    """Sends ``signum`` to each pid; one that has ended already is no error."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def end_group(pid: int, grace: float = 2.0) -> bool:
    """Ends the process group that ``pid`` leads: SIGTERM, at most ``grace`` seconds, SIGKILL. True when none of it is left.

    The caller still reaps its own child (``Popen.wait``).
    """
    if pid <= 1 or pid == os.getpgrp():
        raise ValueError(f"will not end process group {pid}: it is not the group of a child (this process is in {os.getpgrp()})")
    for signum, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(pid, signum)
        except ProcessLookupError:
            return True
        give_up = time.monotonic() + patience
        while time.monotonic() < give_up:
            if not members(pid):
                return True
            time.sleep(0.02)
    return not members(pid)
