"""The whole workflow on one machine: local cloud, Airflow, ``market_data`` → ``retrain`` → ``promote``, and what came of it.

Everything runs as on AWS, against the local cloud's endpoints. The training is a smoke run (no GPU here), and every line about
its models says so. Ends every process that it started, also on Ctrl-C and on failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from crpbot_lib.config import Settings, settings
from crpbot_lib.gpu import clients, instances
from crpbot_lib.lake import KeyMissingError, Lake, keys
from crpbot_lib.sandbox import processes
from crpbot_lib.sandbox.local_airflow import AirflowError, LocalAirflow, end_marked

FIRST_DAY = date(2025, 5, 26)
"""Inside the real data set's window, with its own 5m candles and enough history before it."""
DAYS = 3
DAGS = ("market_data", "retrain", "promote", "reap_gpu_instances")

Source = Literal["auto", "synthetic", "live"]


class DemoError(Exception):
    """A step of the demonstration failed; the message names it and where its log is."""


def profile(cloud: dict[str, str]) -> dict[str, str]:
    """The local profile's settings over the local cloud's endpoints: smoke runs allowed, short waits, no schedules."""
    return {
        **cloud,
        "CRPBOT_TRAINING__SMOKE": "true",
        "CRPBOT_PROMOTION__ALLOW_SMOKE": "true",
        "CRPBOT_ORCHESTRATION__SCHEDULES": "false",
        "CRPBOT_ORCHESTRATION__RETRY_DELAY_SECONDS": "2",
        "CRPBOT_GPU__POLL_SECONDS": "1",
        "CRPBOT_GPU__VISIBILITY_GRACE_SECONDS": "2",
        "CRPBOT_GPU__MAX_LIFETIME_MINUTES": "20",
    }


@contextlib.contextmanager
def local_cloud(state: Path, marker: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """The local cloud as a process of its own; yields what it says of itself (``env``, ``control_url``, data source)."""
    state.mkdir(parents=True, exist_ok=True)
    ready = state / "sandbox.json"
    ready.unlink(missing_ok=True)
    with (state / "sandbox.log").open("wb") as out:
        child = processes.spawn(
            [sys.executable, "-m", "crpbot_lib.sandbox", "serve", "--state", str(state), *arguments],
            env={k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AIRFLOW"))}
            | {"AWS_EC2_METADATA_DISABLED": "true"},
            stdout=out,
            stderr=out,
            marker=marker,
        )
    try:
        until = time.monotonic() + 60
        while not ready.exists():
            if child.poll() is not None or time.monotonic() > until:
                raise DemoError(f"the local cloud did not start: {(state / 'sandbox.log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield json.loads(ready.read_text())
    finally:
        # it ends its instances' processes itself, and they die with it if it cannot
        processes.end_group(child.pid, grace=15)
        child.wait(timeout=30)


@dataclass
class Demo:
    """One demonstration under the directory ``state``; ``run`` returns the exit code."""

    state: Path
    source: Source = "auto"
    days: int = DAYS
    keep: bool = False
    port: int = 0
    console: Console = field(default_factory=lambda: Console(highlight=False, width=None if sys.stdout.isatty() else 132))
    _began: float = field(default_factory=time.monotonic, init=False)

    def say(self, text: str) -> None:
        """One line of progress, with the minutes and seconds since the start."""
        seconds = int(time.monotonic() - self._began)
        self.console.out(f"[{seconds // 60:02d}:{seconds % 60:02d}] {text}", highlight=False)

    def run(self) -> int:
        """Runs it all; 0 only if every step succeeded and no instance is alive."""
        with self._alone():
            return self._run()

    def _run(self) -> int:
        self._clean_up_earlier()
        days = self._days()
        arguments = ["--synthetic"] if self.source in ("synthetic", "live") else []
        if self.source == "live":
            arguments += ["--synthetic-start", f"{days[0] - timedelta(days=2)}", "--synthetic-end", "now"]
        marker = f"demo-{uuid.uuid4().hex}"
        (self.state / "marker").write_text(marker)
        with local_cloud(self.state / "cloud", marker, *arguments) as cloud:
            env = profile(cloud["env"])
            if self.source == "live":
                env["CRPBOT_COINBASE_URL"] = settings().coinbase_url
                self.say(f"candles: LIVE from {settings().coinbase_url}; CoinGecko fundamentals: SYNTHETIC, from the local cloud")
            else:
                data = cloud["data"]
                self.say(f"data: {data['kind']}" + (f", from {data['folder']}" if data["folder"] else ""))
            env["CRPBOT_RUNTIME__AS_OF"] = self._as_of(days).isoformat()
            # this process reads the lake and asks EC2 itself, for the summary; the caller's AWS settings must not lead it astray
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                del os.environ[name]
            os.environ.update(env)
            settings.cache_clear()
            self.say(f"local cloud is up (AWS at {env['AWS_ENDPOINT_URL']}); starting Airflow")
            with LocalAirflow(self.state / "airflow", env, self.port, marker) as airflow:
                return self._workflow(airflow, days, settings())

    def _workflow(self, airflow: LocalAirflow, days: list[date], current: Settings) -> int:
        self.say(f"Airflow is up at {airflow.url}")
        errors = airflow.import_errors()
        if errors:
            raise DemoError(f"DAG import errors: {errors}")
        for dag in DAGS:
            airflow.unpause(dag)
        failure = ""
        run = ""
        try:
            runs = {airflow.trigger("market_data", partition_key=day.isoformat()): day.isoformat() for day in days}
            for dag_run, day in runs.items():
                self._follow(airflow, "market_data", dag_run, day)
            conf = {"start": days[0].isoformat(), "end": (days[-1] + timedelta(days=1)).isoformat()}
            dag_run = airflow.trigger("retrain", conf=conf)
            try:
                self._follow(airflow, "retrain", dag_run, f"{conf['start']} to {days[-1]}", watch="train")
            finally:
                # of a failed run there is something to show, too
                with contextlib.suppress(AirflowError):
                    run = airflow.xcom("retrain", dag_run, "plan")["run"]
            promotion = self._promotion(airflow)
            self._follow(airflow, "promote", promotion, "of the new models", watch="dry_run")
        except DemoError as error:
            failure = str(error)
        alive = instances.find(clients.ec2(current.gpu.region), current.gpu.project_tag, states=instances.ALIVE)
        if run:
            self._summary(current, run, days)
        if alive:
            failure += f" ALIVE: {', '.join(f'{i.id} ({i.state})' for i in alive)}"
        for one in airflow.died:
            self.say(f"started anew: {one}")
        if failure:
            self.console.out(f"FAILED: {failure.strip()}", highlight=False)
        else:
            self.console.print("Every step succeeded, and no instance is alive.")
        if self.keep:
            self.console.print(f"Airflow: {airflow.url}   user: admin   password: {airflow.password}   (Ctrl-C ends everything)")
            while True:
                airflow.keep_up()
                time.sleep(2)
        else:
            self.console.print("`make up` does the same and keeps Airflow's UI up.")
        return 1 if failure else 0

    def _promotion(self, airflow: LocalAirflow) -> str:
        """The promote run that the publication of the models triggered."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            runs = airflow.runs("promote")
            if runs:
                return str(runs[0]["dag_run_id"])
            time.sleep(1)
        raise DemoError("the publication of the models triggered no promote run within 60 s")

    def _follow(self, airflow: LocalAirflow, dag: str, run: str, what: str, watch: str = "") -> None:
        """Shows a run's progress, and the log of the task ``watch`` as it grows, until the run ends."""
        shown: dict[str, int] = {"lines": 0}
        before = ""

        def progress(tasks: list[dict[str, Any]]) -> None:
            nonlocal before
            done = sum(t["state"] in ("success", "skipped") for t in tasks)
            running = sorted({t["task_id"] for t in tasks if t["state"] in ("running", "deferred", "queued", "up_for_retry")})
            now = f"{dag} {what}: {done}/{len(tasks)} tasks" + (f"; {', '.join(running)}" if running else "")
            if now != before:
                self.say(now)
                before = now
            if watch:
                self._show_log(airflow, dag, run, watch, tasks, shown)

        state = airflow.wait(dag, run, timeout=900, progress=progress)
        if state != "success":
            raise DemoError(f"{dag} {what} ended as {state}: {_why(airflow, dag, run)}")

    def _show_log(
        self, airflow: LocalAirflow, dag: str, run: str, task: str, tasks: list[dict[str, Any]], shown: dict[str, int]
    ) -> None:
        mine = [t for t in tasks if t["task_id"] == task and t["state"] in ("running", "deferred", "success", "failed")]
        if not mine or shown.get("done"):
            return
        lines = [line for line in airflow.task_log(dag, run, task, mine[0]["try_number"] or 1).splitlines() if _is_job_line(line)]
        for line in lines[shown["lines"] :]:
            self.say(f"  {task} | {line}")
        shown["lines"] = len(lines)
        shown["done"] = int(mine[0]["state"] in ("success", "failed"))

    def _days(self) -> list[date]:
        if self.source == "live":
            last = datetime.now(UTC).date() - timedelta(days=1)
            return [last - timedelta(days=n) for n in reversed(range(self.days))]
        return [FIRST_DAY + timedelta(days=n) for n in range(self.days)]

    def _as_of(self, days: list[date]) -> datetime:
        """The dry run decides as of this time: just after the training data, or a few minutes ago with live candles."""
        if self.source == "live":
            return datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=15)
        return datetime.combine(days[-1] + timedelta(days=1), datetime.min.time(), UTC) + timedelta(hours=12)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One demonstration at a time in one directory: beginning anew ends what an earlier one left there."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        with self.state.with_name(f"{self.state.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoError(f"another demonstration is running in {self.state}; end it, or take another --state") from None
            yield

    def left_running(self) -> list[int]:
        """The pids that carry this demonstration's marker."""
        marker = self.state / "marker"
        value = marker.read_text().strip() if marker.exists() else ""
        return processes.processes_with_marker(processes.MARKER, value) if value else []

    def _clean_up_earlier(self) -> None:
        """Ends what a demonstration that was itself killed left behind, found by its marker, and begins in a clean directory."""
        marker = self.state / "marker"
        if marker.exists():
            if value := marker.read_text().strip():
                end_marked(value)
        elif self.state.exists() and (not self.state.is_dir() or any(self.state.iterdir())):
            raise DemoError(
                f"{self.state} is not empty and no earlier demonstration's: name another --state, which will be emptied"
            )
        if self.state.exists():
            shutil.rmtree(self.state)
        self.state.mkdir(parents=True)
        marker.touch()

    def _summary(self, current: Settings, run: str, days: list[date]) -> None:
        lake = Lake(current.lake)
        parts: tuple[tuple[str, Callable[[], None]], ...] = (
            ("data and features", lambda: self._data_table(lake, run, days)),
            ("training", lambda: self._training_table(lake, run)),
            ("instances", lambda: self._instance_table(lake, run, current)),
            ("models", lambda: self._promotion_lines(lake, current)),
        )
        for what, show in parts:
            try:
                show()
            except KeyMissingError as error:
                self.console.out(f"{what}: the run did not get that far ({error})", highlight=False)

    def _data_table(self, lake: Lake, run: str, days: list[date]) -> None:
        job = lake.read_json(keys.training_run(run, "job.json"))
        manifest = lake.read_json(keys.features_manifest(job["feature_version"]))
        reports = [lake.read_json(keys.quality(day)) for day in days]
        table = Table("symbol", "candles 1m", "missing", "gaps", "feature rows", "features", title="Data and features")
        for symbol, built in manifest["symbols"].items():
            parts = [r["symbols"][symbol] for r in reports]
            table.add_row(
                symbol,
                *(f"{sum(p['candles']['1m'][k] for p in parts):,}" for k in ("rows", "missing")),
                str(sum(len(p["candles"]["1m"]["gaps"]) for p in parts)),
                f"{built['rows']:,}",
                str(built["features"]),
            )
        self.console.print(table)

    def _training_table(self, lake: Lake, run: str) -> None:
        job = lake.read_json(keys.training_run(run, "job.json"))
        mark = "SMOKE " if job["smoke"] else ""
        table = Table(
            "model",
            "train windows",
            "test windows",
            "accuracy",
            "95 % interval",
            "commoner side",
            "log loss",
            "seconds",
            title=f"{mark}training",
        )
        for symbol in job["symbols"]:
            m = lake.read_json(keys.run_symbol(run, symbol, "metrics.json"))
            table.add_row(
                f"{mark}{symbol}",
                f"{m['train_windows']:,}",
                f"{m['test_windows']:,}",
                f"{m['accuracy']:.3f}",
                "none" if m["accuracy_low"] is None else f"{m['accuracy_low']:.3f}-{m['accuracy_high']:.3f}",
                f"{m['majority_accuracy']:.3f}",
                f"{m['log_loss']:.4f}",
                f"{m['seconds']:.1f}",
            )
        self.console.print(table)

    def _instance_table(self, lake: Lake, run: str, current: Settings) -> None:
        bill = lake.read_json(keys.training_run(run, "cost.json"))
        now = {i.id: i.state for i in instances.find(clients.ec2(current.gpu.region), current.gpu.project_tag, run, lake=lake)}
        table = Table(
            "instance",
            "type",
            "market",
            "USD/h",
            "lifetime",
            "USD",
            "on demand",
            "final state",
            title="GPU instances (local cloud)",
        )
        for row in bill["instances"]:
            table.add_row(
                row["id"],
                row["type"],
                row["market"],
                f"{row['usd_per_hour']:.4f}",
                f"{row['seconds']:.0f} s",
                f"{row['usd']:.4f}",
                f"{row['on_demand_usd']:.4f}",
                now.get(row["id"], "gone"),
            )
        self.console.print(table)

    def _promotion_lines(self, lake: Lake, current: Settings) -> None:
        prefix = current.training.prefix
        stored = [k for k in lake.keys(f"{prefix}/") if k.endswith(".pt")]
        copies = self.state / "models"
        for key in lake.keys(f"{prefix}/"):
            path = copies / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lake.read(key))
        for key in stored:
            self.console.out(f"model: {lake.url(key)}", highlight=False)
        if stored:
            self.console.out(f"copies: {copies}", highlight=False)
        try:
            pointer = lake.read_json(keys.promoted(prefix))
        except KeyMissingError:
            self.console.print("promoted: nothing; the promote run's failed task says why")
            return
        for symbol, version in pointer["symbols"].items():
            smoke = "SMOKE " if lake.read_json(keys.model(prefix, version, "manifest.json"))["smoke"] else ""
            self.console.out(f"promoted: {symbol} → {smoke}{version}", highlight=False)


def _is_job_line(line: str) -> bool:
    """Lines of the job and of the runtime, not Airflow's own chatter."""
    return not line.startswith(("::", "Log message source", "Done.")) and any(
        mark in line for mark in ("SMOKE", "epoch", " @ ", "GPU", "features selected")
    )


def _why(airflow: LocalAirflow, dag: str, run: str) -> str:
    """The failed tasks of a run with the last lines of their logs."""
    failed = [t for t in airflow.tasks(dag, run) if t["state"] == "failed" and t["task_id"] != "verdict"]
    parts = []
    for t in failed:
        with contextlib.suppress(AirflowError):
            lines = airflow.task_log(dag, run, t["task_id"], t["try_number"] or 1, t["map_index"]).splitlines()
            errors = [line for line in lines if "Error" in line or "Exception" in line]
            parts.append(f"{t['task_id']}: {(errors or lines or ['no log'])[-1]}")
    return "; ".join(parts) or "no task failed"


def demonstrate(demo: Demo) -> int:
    """Runs ``demo`` and returns its exit code; 130 after Ctrl-C (0 where it was only being kept up)."""

    def interrupt(signum: int, frame: object) -> None:  # noqa: ARG001
        # once: a second Ctrl-C must not stop the ending of what was started
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        demo.say("interrupted; ending everything that was started")
        raise KeyboardInterrupt

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt)
    try:
        return demo.run()
    except KeyboardInterrupt:
        left = demo.left_running()
        demo.say(f"STILL RUNNING: {left}; end them by pid" if left else "everything that was started has been ended")
        return 130
    except (DemoError, AirflowError) as error:
        demo.console.out(f"FAILED: {error}", highlight=False)
        return 1
