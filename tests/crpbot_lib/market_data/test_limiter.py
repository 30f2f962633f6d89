"""One limit for all threads and processes of a machine, which nobody that dies or stops can keep from the others."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from crpbot_lib.market_data import limiter as module
from crpbot_lib.market_data.limiter import LONGEST_PAUSE, RateLimiter


class Time:
    """A clock that only sleeping moves."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def at() -> Time:
    return Time()


@pytest.fixture
def make(tmp_path: Path, at: Time) -> Callable[..., RateLimiter]:
    def limiter(per_second: float = 10, name: str = "exchange", time: Time = at) -> RateLimiter:
        return RateLimiter(per_second, name=name, directory=tmp_path, clock=time.clock, sleep=time.sleep)

    return limiter


def turns(limiter: RateLimiter, at: Time, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        limiter.wait()
        taken.append(at.now)
    return taken


def fits(taken: list[float], per_second: float) -> bool:
    """Whether a token bucket of that rate, with a burst of one second, would have let all of them in."""
    tokens, last = max(1.0, per_second), taken[0]
    for moment in taken:
        tokens = min(max(1.0, per_second), tokens + (moment - last) * per_second) - 1
        last = moment
        if tokens < -1e-6:
            return False
    return True


class TestTurns:
    def test_are_evenly_spaced(self, make: Callable[..., RateLimiter], at: Time) -> None:
        taken = turns(make(10), at, 20)
        assert [b - a for a, b in pairwise(taken[5:])] == pytest.approx([0.1] * 14)

    @pytest.mark.parametrize("per_second", [0.2, 1, 4.15, 10, 300])
    def test_fit_a_token_bucket_after_idling_and_with_late_callers(
        self, make: Callable[..., RateLimiter], at: Time, per_second: float
    ) -> None:
        limiter, rng, taken = make(per_second), random.Random(1), []
        for n in range(300):
            at.now += 60 if n % 50 == 0 else rng.choice([0, 0, 0, 0.3 / per_second])
            taken += turns(limiter, at, 1)
        assert fits(taken, per_second)

    @pytest.mark.parametrize("late", [0.001, 0.02])
    def test_that_are_taken_late_do_not_lower_the_rate(self, make: Callable[..., RateLimiter], at: Time, late: float) -> None:
        limiter, began = make(10), at.now
        for _ in range(200):
            limiter.wait()
            at.now += late
        assert 200 / (at.now - began) >= 0.95 * 10

    def test_are_shared_by_all_limiters_of_a_name(self, make: Callable[..., RateLimiter], at: Time) -> None:
        both = [make(10), make(10)]
        began = at.now
        for n in range(100):
            both[n % 2].wait()
        assert 100 / (at.now - began) == pytest.approx(10, rel=0.05)

    def test_of_another_name_are_others(self, make: Callable[..., RateLimiter], at: Time) -> None:
        began = at.now
        for name in ("a", "b", "c"):
            make(0.01, name).wait()
        assert at.now == began

    def test_of_different_rates_keep_the_interval_of_who_took_the_last(self, make: Callable[..., RateLimiter], at: Time) -> None:
        fast, slow = make(10), make(0.5)
        slow.wait()
        began = at.now
        fast.wait()
        assert at.now - began == pytest.approx(2)
        fast.wait()
        assert at.now - began == pytest.approx(2.1)


class TestPause:
    def test_holds_for_everybody(self, make: Callable[..., RateLimiter], at: Time) -> None:
        make().pause(119)
        began = at.now
        make().wait()
        assert at.now - began == pytest.approx(119)

    def test_that_is_shorter_does_not_end_a_longer_one(self, make: Callable[..., RateLimiter], at: Time) -> None:
        make().pause(100)
        make().pause(1)
        began = at.now
        make().wait()
        assert at.now - began == pytest.approx(100)

    def test_reaches_callers_that_wait_already(self, make: Callable[..., RateLimiter], at: Time) -> None:
        limiter = make()
        limiter.pause(10)
        sleep, at_end = at.sleep, at.now + 10

        def while_waiting(seconds: float) -> None:
            sleep(seconds)
            if at.now == at_end:
                make().pause(30)

        RateLimiter(10, name="exchange", directory=limiter._path.parent, clock=at.clock, sleep=while_waiting).wait()
        assert at.now == pytest.approx(at_end + 30)

    @pytest.mark.parametrize(("asked", "kept"), [(1e9, LONGEST_PAUSE), (-5, 0)])
    def test_has_its_bounds(self, make: Callable[..., RateLimiter], at: Time, asked: float, kept: float) -> None:
        began = at.now
        make().pause(asked)
        make().wait()
        assert at.now - began == pytest.approx(kept)


DAMAGE = [
    b"",
    b"garbage",
    b"nan",
    b"inf",
    b"-inf",
    b"1e308",
    b"\x00" * 24,
    b"\xff" * 4096,
    b"9" * 400,
    b"-17",
    b"0000000001030.000000000 trailing",
]


class TestAStateFile:
    @pytest.mark.parametrize("content", DAMAGE, ids=lambda content: repr(content[:12]))
    def test_that_is_damaged_is_put_right(self, make: Callable[..., RateLimiter], at: Time, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "exchange").write_bytes(content)
        began = at.now
        taken = turns(make(10), at, 20)
        assert at.now - began < LONGEST_PAUSE + 3
        assert fits(taken, 10)
        assert taken[-1] - taken[5] == pytest.approx(1.4)

    def test_from_before_a_reboot_is_put_right(self, make: Callable[..., RateLimiter], at: Time) -> None:
        """The clock that processes share begins anew with the machine."""
        turns(make(), at, 3)
        rebooted = Time(5.0)
        make(time=rebooted).wait()
        assert rebooted.now == 5.0

    def test_that_is_removed_is_made_again(self, make: Callable[..., RateLimiter], at: Time, tmp_path: Path) -> None:
        limiter = make()
        limiter.wait()
        (tmp_path / "exchange").unlink()
        limiter.wait()
        assert (tmp_path / "exchange").exists()

    def test_has_a_name_of_plain_characters(self, tmp_path: Path) -> None:
        RateLimiter(1e6, name="CoinGecko-../../etc:80", directory=tmp_path).wait()
        [file] = tmp_path.iterdir()
        assert file.name == "CoinGecko-.._.._etc_80"

    def test_that_is_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "aim").write_text("precious")
        (tmp_path / "exchange").symlink_to(tmp_path / "aim")
        with pytest.raises(OSError, match="exchange"):
            RateLimiter(10, name="exchange", directory=tmp_path).wait()
        assert (tmp_path / "aim").read_text() == "precious"


class TestTheDefaultDirectory:
    @pytest.fixture(autouse=True)
    def temporary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))

    def test_is_private(self, tmp_path: Path) -> None:
        RateLimiter(1e6, name="exchange").wait()
        [own] = tmp_path.iterdir()
        assert own.stat().st_mode & 0o777 == 0o700

    def test_that_others_may_write_is_refused(self, tmp_path: Path) -> None:
        RateLimiter(1e6, name="exchange")
        [own] = tmp_path.iterdir()
        own.chmod(0o777)
        with pytest.raises(ValueError, match=r"not a directory that only this user writes: .* CRPBOT_RATE_LIMIT_DIR"):
            RateLimiter(1e6, name="exchange")

    def test_that_is_a_link_of_somebody_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / f"crpbot-rate-limits-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="not a directory that only this user writes"):
            RateLimiter(1e6, name="exchange")


def test_who_holds_the_lock_and_does_not_move_stops_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.05)
    limiter = RateLimiter(1000, name="exchange", directory=tmp_path)
    limiter.wait()
    with (tmp_path / "exchange").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        limiter.wait()


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot hold the rate limits .*: set CRPBOT_RATE_LIMIT_DIR"):
        RateLimiter(10, name="exchange", directory=tmp_path / "file" / "limits")


@pytest.mark.parametrize("per_second", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, per_second: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        RateLimiter(per_second, name="exchange", directory=tmp_path)


class TestProcesses:
    """Real ones, on the real clock; what they took is judged by the times that they wrote down."""

    @pytest.fixture
    def taker(self, tmp_path: Path) -> Iterator[Callable[[], int]]:
        started: list[int] = []
        inherited = RateLimiter(200, name="exchange", directory=tmp_path)

        def start() -> int:
            if (pid := os.fork()) == 0:
                log = os.open(tmp_path / "taken", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                while True:
                    inherited.wait()
                    os.write(log, f"{time.monotonic():.6f}\n".encode())
            started.append(pid)
            return pid

        yield start
        for pid in started:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue

    def test_that_are_killed_at_random_moments_leave_the_limit_as_it_is(self, taker: Callable[[], int], tmp_path: Path) -> None:
        rng = random.Random(3)
        began = time.monotonic()
        alive = [taker() for _ in range(4)]
        for _ in range(30):
            time.sleep(rng.uniform(0.01, 0.05))
            victim = alive.pop(rng.randrange(4))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            alive.append(taker())
        seconds = time.monotonic() - began
        taken = sorted(float(line) for line in (tmp_path / "taken").read_text().split())
        assert len(taken) <= 200 * (seconds + 1)
        assert fits(taken, 200)
        assert max(b - a for a, b in pairwise(taken)) < 5
