"""``python -m crpbot_lib.sandbox serve``: the local cloud as a process of its own, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from crpbot_lib.sandbox.coingecko import Plan
from crpbot_lib.sandbox.faults import TARGETS, RateLimit, Target
from crpbot_lib.sandbox.instances import TRAINING_ENTRY_POINT
from crpbot_lib.sandbox.server import Sandbox, SandboxOptions, default_data_dir
from crpbot_lib.sandbox.synthetic import DEFAULT_END, DEFAULT_START


def _time(text: str) -> datetime:
    if text == "now":
        return datetime.now(UTC)
    at = datetime.fromisoformat(text)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at


def _pair(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def _rate_limit(text: str) -> tuple[Target, RateLimit]:
    target, _, rate = text.partition("=")
    per_second, _, burst = rate.partition(":")
    if target not in TARGETS:
        raise argparse.ArgumentTypeError(f"a rate limit is of {' or '.join(TARGETS)}, not of {target!r}")
    return target, RateLimit(per_second=float(per_second), burst=float(burst or per_second))


def _paced(seconds: float) -> tuple[str, ...]:
    return (sys.executable, "-m", "crpbot_lib.sandbox.paced", str(seconds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m crpbot_lib.sandbox", description=__doc__)
    serve = parser.add_subparsers(dest="command", required=True).add_parser("serve", help="run until SIGTERM or Ctrl-C")
    add = serve.add_argument
    add("--state", type=Path, required=True, help="folder for sandbox.json (written when ready) and the instances' files")
    add("--data", type=Path, default=None, help="folder of real market data (default: CRPBOT_SANDBOX_DATA, ../shared/market_data)")
    add("--venue", default=None, help="folder under --data whose candles are served, as candles_1m_windows/binance_spot_2023-03")
    add("--synthetic", action="store_true", help="generate market data even where a folder of real data is at hand")
    add("--synthetic-seed", type=int, default=1)
    add("--synthetic-start", type=_time, default=DEFAULT_START, metavar="TIME", help="UTC; first generated candle")
    add("--synthetic-end", type=_time, default=DEFAULT_END, metavar="TIME|now", help="UTC; end of the generated candles")
    add("--synthetic-price", type=_pair, action="append", default=[], metavar="SYMBOL=USD", help="price at the end; repeatable")
    add("--synthetic-symbol", action="append", default=[], metavar="SYMBOL", help="generated beside the real ones; repeatable")
    add("--omit-minutes", type=float, default=0.0, metavar="SHARE", help="of the 1m candles, as minutes without a trade")
    add("--now", type=_time, default=None, metavar="TIME", help="UTC; what the markets take for the present (default: the clock)")
    add("--rate-limit", type=_rate_limit, action="append", default=[], metavar="exchange|coingecko=PER_SECOND[:BURST]")
    add("--coingecko-plan", choices=get_args(Plan), default="pro")
    add("--coingecko-messy", action="store_true", help="off-grid stamps, nulls, a backwards stamp, the now point")
    add("--spot-price", type=_pair, action="append", default=[], metavar="TYPE=USD", help="USD an hour; repeatable")
    add("--boot-seconds", type=float, default=2.0)
    add("--shutdown-seconds", type=float, default=1.5)
    add("--minute-seconds", type=float, default=60.0, help="length of a minute in an instance's `shutdown -h +N`")
    add("--step-seconds", type=float, default=0.0, help="what each training step of a run takes while it is held at `step`")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--advertise", default=None, help="host name in the addresses given to clients")
    add("--port", type=int, default=0, help="markets, Telegram and control; 0: a free one")
    add("--aws-port", type=int, default=0, help="AWS; 0: a free one")
    return parser


def _options(arguments: argparse.Namespace) -> SandboxOptions:
    return SandboxOptions(
        data_dir=None if arguments.synthetic else (arguments.data or default_data_dir()),
        venue=arguments.venue,
        synthetic_symbols=tuple(arguments.synthetic_symbol),
        omit_minutes=arguments.omit_minutes,
        now=arguments.now,
        rate_limits=dict(arguments.rate_limit),
        coingecko_plan=arguments.coingecko_plan,
        coingecko_messy=arguments.coingecko_messy,
        synthetic_seed=arguments.synthetic_seed,
        synthetic_start=arguments.synthetic_start,
        synthetic_end=arguments.synthetic_end,
        synthetic_prices=dict(arguments.synthetic_price),
        state_dir=arguments.state,
        boot_seconds=arguments.boot_seconds,
        shutdown_seconds=arguments.shutdown_seconds,
        minute_seconds=arguments.minute_seconds,
        spot_prices={**SandboxOptions().spot_prices, **dict(arguments.spot_price)},
        entry_point=_paced(arguments.step_seconds) if arguments.step_seconds else TRAINING_ENTRY_POINT,
        host=arguments.host,
        advertise=arguments.advertise,
        port=arguments.port,
        aws_port=arguments.aws_port,
    )


def main() -> int:
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    ended = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: ended.set())
    options = _options(arguments)
    arguments.state.mkdir(parents=True, exist_ok=True)
    ready = arguments.state / "sandbox.json"
    ready.unlink(missing_ok=True)
    with Sandbox(options) as cloud:
        part = ready.with_suffix(".part")
        part.write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "control_url": cloud.control_url,
                    "env": cloud.env(),
                    "data": {"kind": cloud.source.kind, "folder": str(options.data_dir) if options.data_dir else None},
                },
                indent=1,
            )
        )
        part.replace(ready)
        ended.wait()
        logging.getLogger(__name__).info("ending: %d instances", len(cloud.instances()))
    ready.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
