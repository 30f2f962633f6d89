"""How much of an allowed rate the limiter uses, and whether a server that counts ever has to refuse.

The local exchange holds a token bucket of the rate with a burst of one second and answers after a latency. Asked by the client of
production, first by the threads of one process, then by four processes that share one limit. ``requests`` and ``429s`` are the
server's own count over ``seconds``, begun when every process stood ready.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta

from benchmarks.common import Row, medians, show, worker
from crpbot_lib.config import Settings
from crpbot_lib.market_data import MarketData
from crpbot_lib.sandbox import processes
from crpbot_lib.sandbox.beside import CloudBeside

FIRST_PAGE = datetime(2025, 5, 5, tzinfo=UTC)
PAGES = 100
"""A page is five hours of minutes; over and over the same ones."""
SHAPES = ((1, 8), (4, 2))
"""(processes, threads of each)."""


def ask(threads: int) -> None:
    """Asks for one page after the other in each thread, until it is killed."""
    market = MarketData(Settings())

    def pages(thread: int) -> None:
        for page in itertools.count(thread * 7):
            start = FIRST_PAGE + page % PAGES * timedelta(hours=5)
            market.candles("BTC-USD", "1m", start, start + timedelta(hours=5))

    # imports and the exchange's first look at its data are not what is measured
    market.candles("BTC-USD", "1m", FIRST_PAGE, FIRST_PAGE + timedelta(hours=1))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for n in range(threads):
        threading.Thread(target=pages, args=(n,)).start()


def measure(count: int, threads: int, rate: float, latency: float, seconds: float) -> Row:
    with CloudBeside() as cloud, tempfile.TemporaryDirectory() as shared:
        cloud.start()
        env = {**cloud.env, "CRPBOT_COINBASE_REQUESTS_PER_SECOND": str(rate), "CRPBOT_RATE_LIMIT_DIR": shared}
        workers = [worker("benchmarks.limiter", f"--threads={threads}", env=env) for _ in range(count)]
        try:
            for one in workers:
                one.stdout.readline()
            cloud.tell("rate_limits", {"exchange": {"per_second": rate, "burst": rate}})
            if latency:
                cloud.tell("faults", {"exchange": {"stall": latency}})
            cloud.count_anew()
            for one in workers:
                one.stdin.write(b"go\n")
                one.stdin.flush()
            while not cloud.ask("requests")["exchange"]["requests"]:
                time.sleep(0.001)
            time.sleep(seconds)
            counted = cloud.ask("requests")["exchange"]
        finally:
            for one in workers:
                processes.end_group(one.pid, grace=0)
                one.communicate()
    return {
        "processes": count,
        "threads each": threads,
        "rate /s": rate,
        "latency ms": latency * 1000,
        "seconds": seconds,
        "requests": counted["requests"],
        "share of rate %": 100 * counted["requests"] / (rate * seconds),
        "429s": counted["limited"],
        "longest idle ms": 1000 * counted["longest_idle"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limiter", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=60.0)
    add("--rate", type=float, default=10.0, help="requests a second (Coinbase's public limit by default)")
    add("--latency", type=float, default=0.08, help="seconds until the server answers")
    add("--repeat", type=int, default=1)
    add("--json", action="store_true")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        ask(options.threads)
        return
    shapes = [[measure(*shape, options.rate, options.latency, options.seconds) for _ in range(options.repeat)] for shape in SHAPES]
    show("limiter: share of the allowed rate", [medians(runs) for runs in shapes], options.json)


if __name__ == "__main__":
    main()
