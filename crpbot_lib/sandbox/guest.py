"""What runs on an instance: its first process, and the stand-ins that its PATH holds instead of the real commands.

An instance is one process tree. ``boot`` (started by ``instances``) is its root: where the kernel allows it, it makes a PID
namespace of its own, so that ``kill -9 -1`` or reboot(2) in there reach nothing outside, and it drops the capabilities with which
root could harm the machine. Below it bash runs the user data with ``--restricted``: no command name with a slash, no change of
PATH, no ``exec``, no writing redirection. PATH holds only the stand-ins below, and they do nothing but tell the local cloud what
was asked. The job of ``docker run`` is the training entry point as an ordinary process.

Without the right to namespaces (a container without CAP_SYS_ADMIN) everything but one thing holds: bash's own ``kill`` then reaches
what its user may signal. The console's first line says which it was.

Imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from crpbot_lib.sandbox.processes import descendants, die_with_parent, send

STAND_INS = ("shutdown", "poweroff", "docker", "nvidia-smi", "aws", "sleep")

_ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAPBSET_DROP = 24
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_REC_PRIVATE = 0x4000 | 1 << 18
# linux/capability.h: KILL, SYS_MODULE, SYS_RAWIO, SYS_ADMIN, SYS_BOOT, SYS_TIME
_DANGEROUS_CAPABILITIES = (5, 16, 17, 21, 22, 25)
_LOG_FLUSH_SECONDS = 0.4
_HELD_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Machine:
    """What the processes of one instance need to know; ``machine.json`` in the instance's directory."""

    instance: str
    control: str
    directory: str
    bash: str
    bash_flags: list[str]
    entry_point: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """What a booted instance has in its environment."""
    profile: dict[str, str] = field(default_factory=dict)
    """What a container gets besides, as credentials come with an instance profile."""

    @property
    def path(self) -> Path:
        return Path(self.directory)

    def save(self) -> Path:
        file = self.path / "machine.json"
        file.write_text(json.dumps(asdict(self), indent=1))
        return file

    @classmethod
    def load(cls, file: str) -> Machine:
        return cls(**json.loads(Path(file).read_text()))


def command(role: str, machine_file: Path) -> list[str]:
    """The command line that runs ``main`` as ``role``. ``-I``: nothing in the environment changes what Python does."""
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from crpbot_lib.sandbox.guest import main; sys.exit(main())"
    return [sys.executable, "-I", "-c", code, role, str(machine_file)]


def install(machine: Machine) -> None:
    """Writes the instance's directory: its commands (``bin``), a container's (``container-bin``), its working directory."""
    file = machine.save()
    (machine.path / "root").mkdir()
    for folder, names in (("bin", STAND_INS), ("container-bin", ("nvidia-smi",))):
        (machine.path / folder).mkdir()
        for name in names:
            script = machine.path / folder / name
            script.write_text(f'#!/bin/sh\nexec {shlex.join(command(name, file))} "$@"\n')
            script.chmod(0o555)


def main() -> int:
    """``python -c … ROLE MACHINE_FILE [ARGUMENT…]``: the role is ``boot`` or the name of a stand-in."""
    role, file, *arguments = sys.argv[1:]
    machine = Machine.load(file)
    if role == "boot":
        _boot(machine)
    stand_ins = {
        "shutdown": _shutdown,
        "poweroff": _poweroff,
        "docker": _docker,
        "nvidia-smi": _nvidia_smi,
        "aws": _aws,
        "sleep": _sleep,
    }
    return stand_ins[role](machine, arguments)


# --- the first process -------------------------------------------------------------------------------------------------------


def _boot(machine: Machine) -> NoReturn:
    """Root of the instance's process tree: ends all of it on SIGTERM, which also comes when the local cloud dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    isolated = libc.unshare(_CLONE_NEWPID | _CLONE_NEWNS) == 0
    if not isolated:
        # no right to namespaces here: orphans of the instance become our children, so that they are still found and ended
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    boot_pid = os.getpid()
    first = 0

    def end_all(_signum: int, _frame: object) -> NoReturn:
        # until no child is left: what a killed process had just forked is in no list; it becomes ours, or ends with its namespace,
        # whose first process is all that we see of it: /proc is its own
        with contextlib.suppress(ChildProcessError):
            while True:
                send([first] if isolated and first else descendants(boot_pid), signal.SIGKILL)
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.01)
        os._exit(0)

    signal.signal(signal.SIGTERM, end_all)
    die_with_parent(signal.SIGTERM)
    first = os.fork()
    if first == 0:
        die_with_parent()
        _first_process(machine, libc, isolated)
    while os.wait()[0] != first:
        continue
    end_all(signal.SIGTERM, None)


def _first_process(machine: Machine, libc: ctypes.CDLL, isolated: bool) -> NoReturn:
    """Runs the user data, reaps what it leaves, and then idles: an instance with nothing to do still is one."""
    # handled, not ignored: a handler is reset in the children, SIG_IGN would be inherited
    signal.signal(signal.SIGTERM, lambda *_: None)
    if isolated:
        libc.mount(None, b"/", None, _MS_REC_PRIVATE, None)
        libc.mount(b"proc", b"/proc", b"proc", 0, None)
    for capability in _DANGEROUS_CAPABILITIES:
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    console = os.open(machine.path / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def say(text: str) -> None:
        os.write(console, f"{text}\n".encode())

    say(f"[boot] {machine.instance}: running its user data, {'isolated' if isolated else 'not isolated (no right to namespaces)'}")
    shell = subprocess.Popen(
        [machine.bash, "--restricted", *machine.bash_flags, str(machine.path / "user-data")],
        env={"PATH": str(machine.path / "bin"), "HOME": "/root", **machine.environment},
        cwd=machine.path / "root",
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
    )
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            signal.pause()
            continue
        if pid == shell.pid:
            say(f"[boot] {machine.instance}: the user data ended with {os.waitstatus_to_exitcode(status)}")


# --- stand-ins ---------------------------------------------------------------------------------------------------------------


def _tell(machine: Machine, what: str, message: dict[str, Any]) -> dict[str, Any]:
    """POSTs to the local cloud's control address; RuntimeError with its answer when it refuses."""
    request = urllib.request.Request(
        f"{machine.control}/_sandbox/instances/{machine.instance}/{what}",
        data=json.dumps(message).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    # no proxy of the environment stands between an instance and its cloud
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error).get("error", str(error))) from None


def _held(machine: Machine, at: str) -> bool:
    """Whether the local cloud holds this instance's run at this point."""
    return bool(_tell(machine, "held", {"at": at})["held"])


def _power_off(machine: Machine) -> int:
    while _held(machine, "power-off"):
        time.sleep(_HELD_POLL_SECONDS)
    _tell(machine, "power", {"action": "off"})
    return 0


def _refuse(name: str, text: str, code: int) -> int:
    sys.stderr.write(f"{name}: {text}\n")
    return code


def _shutdown(machine: Machine, arguments: list[str]) -> int:
    """``shutdown [-h|-P|--poweroff|--halt] [now|+N] [wall message]`` and ``shutdown -c``. A later call replaces an earlier one."""
    flags = [a for a in arguments if a.startswith("-")]
    rest = [a for a in arguments if not a.startswith("-")]
    unknown = sorted(set(flags) - {"-h", "-P", "--poweroff", "--halt", "-c"})
    if unknown:
        return _refuse("shutdown", f"the local cloud knows -h, -P and -c, not {' '.join(unknown)}", 1)
    if "-c" in flags:
        _tell(machine, "power", {"action": "cancel"})
        return 0
    when = rest[0] if rest else "+1"
    if when in ("now", "+0"):
        return _power_off(machine)
    if not when.startswith("+") or not when[1:].isdigit():
        return _refuse("shutdown", f"failed to parse time specification: {when} (the local cloud knows `now` and `+MINUTES`)", 1)
    answer = _tell(machine, "power", {"action": "schedule", "minutes": int(when[1:])})
    sys.stdout.write(f"Shutdown scheduled for {answer['at']}, use 'shutdown -c' to cancel.\n")
    return 0


def _poweroff(machine: Machine, arguments: list[str]) -> int:
    if arguments:
        return _refuse("poweroff", f"the local cloud knows no option {' '.join(arguments)}", 1)
    return _power_off(machine)


def _nvidia_smi(_machine: Machine, _arguments: list[str]) -> int:
    """The local cloud has no GPU and says so as nvidia-smi does on a machine without a driver."""
    sys.stdout.write(
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
        "Make sure that the latest NVIDIA driver is installed and running.\n"
    )
    return 9


def _aws(_machine: Machine, arguments: list[str]) -> int:
    if arguments[:2] == ["ecr", "get-login-password"]:
        sys.stdout.write("local-cloud\n")
        return 0
    return _refuse("aws", f"the local cloud's instances know `aws ecr get-login-password` only, not: {shlex.join(arguments)}", 252)


def _sleep(_machine: Machine, arguments: list[str]) -> int:
    time.sleep(float(arguments[0]))
    return 0


@dataclass
class _Run:
    """A parsed ``docker run``."""

    image: str = ""
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    log_driver: str = "json-file"
    log_options: dict[str, str] = field(default_factory=dict)


class _UsageError(Exception):
    """The docker stand-in does not know this; it says so instead of guessing."""


# Taken, and not enforced: the job is a process of this machine. What a real docker would refuse is refused.
_CONFINEMENT = {"--tmpfs": "/tmp", "--cap-drop": "ALL", "--security-opt": "no-new-privileges"}
_WITH_VALUE = (
    *("--gpus", "--name", "--network", "--net", "--stop-timeout", "--log-driver", "--log-opt", "-e", "--env", "--pids-limit"),
    *_CONFINEMENT,
)


def _parse_run(arguments: list[str]) -> _Run:
    run = _Run()
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        flag, _, attached = rest.pop(0).partition("=")
        if flag in ("--rm", "--read-only") and not attached:
            continue
        if flag not in _WITH_VALUE:
            raise _UsageError(f"unknown flag: {flag} (the local cloud's docker stand-in knows what the training's user data uses)")
        if not attached and not rest:
            raise _UsageError(f"flag needs an argument: {flag}")
        value = attached or rest.pop(0)
        if flag in ("-e", "--env"):
            name, given, text = value.partition("=")
            if given:
                run.environment[name] = text
            elif name in os.environ:
                run.environment[name] = os.environ[name]
        elif flag == "--log-driver":
            run.log_driver = value
        elif flag == "--log-opt":
            name, _, text = value.partition("=")
            run.log_options[name] = text
        elif flag in ("--network", "--net") and value != "host":
            raise _UsageError(f"network {value} not found (the local cloud knows `host`)")
        elif flag in ("--pids-limit", "--stop-timeout") and not value.isdecimal():
            raise _UsageError(f'invalid argument "{value}" for "{flag}" flag')
        elif value != _CONFINEMENT.get(flag, value):
            raise _UsageError(f"{flag} {value} (the local cloud knows `{_CONFINEMENT[flag]}`)")
    if not rest:
        raise _UsageError('"docker run" requires at least 1 argument: the image')
    run.image, run.arguments = rest[0], rest[1:]
    if run.log_driver not in ("json-file", "none", "awslogs"):
        raise _UsageError(f"unknown log driver {run.log_driver}")
    unknown = set(run.log_options) - {"mode", "max-buffer-size", "awslogs-region", "awslogs-group", "awslogs-stream"}
    if unknown:
        raise _UsageError(f"unknown log opt {', '.join(sorted(unknown))} for {run.log_driver} log driver")
    if run.log_driver == "awslogs" and not run.log_options.get("awslogs-group"):
        raise _UsageError("must specify a value for log opt 'awslogs-group'")
    return run


def _docker(machine: Machine, arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if verb == "login":
        if not sys.stdin.isatty():
            sys.stdin.read()
        sys.stdout.write("Login Succeeded\n")
        return 0
    if verb == "pull" and len(rest) == 1 and not rest[0].startswith("-"):
        if _held(machine, "pull"):
            sys.stdout.write(f"{rest[0]}: pulling, and the registry says nothing\n")
            sys.stdout.flush()
            while _held(machine, "pull"):
                time.sleep(_HELD_POLL_SECONDS)
        sys.stdout.write(f"Status: the local cloud runs {rest[0]} as a process; nothing to download\n")
        return 0
    if verb == "run":
        try:
            return _run_container(machine, _parse_run(rest))
        except (_UsageError, RuntimeError) as error:
            # docker itself exits 125 when it is docker that failed, not the container
            return _refuse("docker", str(error), 125)
    return _refuse("docker", f"the local cloud's stand-in does not know: docker {shlex.join(arguments)}", 125)


class _LogShipper:
    """Sends output lines to CloudWatch Logs in batches, a few times a second, as docker's awslogs driver does."""

    def __init__(self, machine: Machine, group: str, stream: str) -> None:
        self._machine, self._target = machine, {"group": group, "stream": stream}
        self._lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        try:
            self._send([])
        except RuntimeError as error:
            raise RuntimeError(f"Error response from daemon: failed to initialize logging driver: {error}") from None
        self._thread = threading.Thread(target=self._ship, daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        with self._lock:
            self._lines.append({"timestamp": int(time.time() * 1000), "message": line})

    def close(self) -> None:
        """Sends what is left."""
        self._done.set()
        self._thread.join(timeout=15)

    def _send(self, events: list[dict[str, Any]]) -> None:
        _tell(self._machine, "logs", {**self._target, "events": events})

    def _ship(self) -> None:
        last = False
        while not last:
            last = self._done.wait(_LOG_FLUSH_SECONDS)
            with self._lock:
                lines, self._lines = self._lines, []
            # CloudWatch Logs refuses an empty message
            events = [line for line in lines if line["message"]]
            if not events:
                continue
            try:
                self._send(events)
            except (RuntimeError, OSError) as error:
                sys.stderr.write(f"docker: {len(events)} log lines were lost: {error}\n")


def _run_container(machine: Machine, run: _Run) -> int:
    options = run.log_options
    shipper = None
    if run.log_driver == "awslogs":
        stream = options.get("awslogs-stream") or f"{machine.instance}-{os.getpid()}"
        shipper = _LogShipper(machine, options["awslogs-group"], stream)
    environment = {
        "PATH": str(machine.path / "container-bin"),
        "HOME": str(machine.path / "root"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(_ROOT),
        "PYTHONUNBUFFERED": "1",
        **machine.profile,
        **run.environment,
    }
    job = subprocess.Popen(
        [*machine.entry_point, *run.arguments],
        env=environment,
        cwd=machine.path / "root",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,
    )
    # docker run passes signals on to its container and waits for it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: job.send_signal(received))
    assert job.stdout is not None
    for raw in job.stdout:
        line = raw.decode(errors="replace").rstrip("\n")
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if shipper:
            shipper.add(line)
    code = job.wait()
    if shipper:
        shipper.close()
    return code if code >= 0 else 128 - code
