"""The local cloud as one object: two HTTP servers (AWS; markets, Telegram and control) and the instances behind them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from moto.moto_server.werkzeug_app import MotoRequestHandler
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, ThreadedWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from crpbot_lib.config import GpuSettings
from crpbot_lib.sandbox import coingecko, exchange, synthetic
from crpbot_lib.sandbox.aws import Aws
from crpbot_lib.sandbox.data import COINS, FolderSource, MixedSource, Source
from crpbot_lib.sandbox.ec2_faults import Ec2Fault
from crpbot_lib.sandbox.ec2_metadata import MetadataService
from crpbot_lib.sandbox.faults import Fault, Faults, RateLimit, Target, Traffic
from crpbot_lib.sandbox.holds import Hold, Holds, Point, Release
from crpbot_lib.sandbox.instances import TRAINING_ENTRY_POINT, Instance, Interruption, Runner, Timing

log = logging.getLogger(__name__)

BUCKET = "crpbot-local"
TELEGRAM_TOKEN = "local-cloud-dummy-token"
TELEGRAM_CHAT = "1"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "local-cloud", "AWS_SECRET_ACCESS_KEY": "local-cloud-dummy-secret"}
"""Any are taken."""
_SSM_PREFIX = "resolve:ssm:"

# moto's backends are globals of the process, so a process holds one local cloud at a time
_one_per_process = threading.Lock()


class SandboxOptions(BaseModel):
    """How a local cloud differs from the default one. Seconds are real ones; prices in USD an hour."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path | None = None
    """Folder of real market data; None: generated data."""
    venue: str | None = None
    """Folder under ``data_dir`` whose candles are served, and no other venue's; None: the default of ``data.FolderSource``."""
    synthetic_symbols: tuple[str, ...] = ()
    """Symbols served from the generator beside the real ones, over the real ones' span."""
    omit_minutes: float = Field(default=0, ge=0, lt=1)
    """Share of the 1m candles that are left out, as minutes without a trade."""
    now: AwareDatetime | None = None
    """What the markets take for the present; None: the clock, and nothing of the data is held back."""
    rate_limits: dict[Target, RateLimit] = Field(default_factory=dict)
    """Token buckets of the markets; POST /_sandbox/rate_limits replaces them."""
    coingecko_plan: coingecko.Plan = "pro"
    """Which key CoinGecko's stand-in takes, and how far back its history reaches."""
    coingecko_messy: bool = False
    """Off-grid stamps, nulls, a stamp that goes backwards and the "now" point in CoinGecko's answers."""
    synthetic_seed: int = 1
    synthetic_start: datetime = synthetic.DEFAULT_START
    synthetic_end: datetime = synthetic.DEFAULT_END
    """The generated candles' window, [start, end)."""
    synthetic_prices: dict[str, float] = Field(default_factory=dict)
    """USD at the window's end by symbol, to generate beside another source's candles."""
    state_dir: Path | None = None
    """Where instances keep their files and consoles; None: a temporary folder, removed at the end."""
    boot_seconds: float = Field(default=2.0, ge=0)
    shutdown_seconds: float = Field(default=1.5, ge=0)
    minute_seconds: float = Field(default=60.0, gt=0)
    """Length of a minute in an instance's ``shutdown -h +N``."""
    spot_prices: dict[str, float] = Field(default_factory=lambda: {"g5.xlarge": 0.30, "g4dn.xlarge": 0.16})
    region: str = "us-east-1"
    entry_point: tuple[str, ...] = TRAINING_ENTRY_POINT
    """What ``docker run`` on an instance starts."""
    gpu: GpuSettings = GpuSettings()
    """Names the log group, the instance profile and the image parameter that exist from the start."""
    host: str = "127.0.0.1"
    """Address to listen on; something else only inside a container's own network."""
    advertise: str | None = None
    """Host name in the addresses given to clients; None: ``host``."""
    port: int = 0
    aws_port: int = 0


_Usd = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Visibility(BaseModel):
    model_config = ConfigDict(extra="forbid")

    seconds: float = Field(ge=0)


class _Freeze(BaseModel):
    model_config = ConfigDict(extra="forbid")

    processes: bool = True


class _Held(BaseModel):
    model_config = ConfigDict(extra="forbid")

    at: Point


def default_data_dir() -> Path | None:
    """``CRPBOT_SANDBOX_DATA``, else ``../shared/market_data`` beside the repository if it is there, else None (generated data).

    An empty ``CRPBOT_SANDBOX_DATA`` asks for generated data.
    """
    configured = os.environ.get("CRPBOT_SANDBOX_DATA")
    if configured is not None:
        return Path(configured) if configured else None
    beside = Path(__file__).resolve().parents[3] / "shared" / "market_data"
    return beside if beside.is_dir() else None


def _source(options: SandboxOptions) -> Source:
    """The market data that the options ask for, each with a line in the log that says what it is."""
    generate = partial(
        synthetic.SyntheticSource,
        options.synthetic_seed,
        prices=options.synthetic_prices,
        omitted=options.omit_minutes,
    )
    if options.data_dir is None:
        if options.venue is not None:
            raise ValueError(f"a venue ({options.venue}) is a folder of real data: give data_dir as well")
        log.warning("market data: SYNTHETIC, a random walk with seed %d", options.synthetic_seed)
        symbols = dict.fromkeys((*COINS.values(), *options.synthetic_symbols))
        return generate(options.synthetic_start, options.synthetic_end, symbols=tuple(symbols))
    real = FolderSource(options.data_dir, options.venue, omitted=options.omit_minutes, seed=options.synthetic_seed)
    log.info("market data: real, %s from %s; hourly CoinGecko points are derived", real.venue, options.data_dir)
    if not options.synthetic_symbols:
        return real
    start, end = real.bounds()
    log.warning("market data: %s SYNTHETIC, beside it", ", ".join(options.synthetic_symbols))
    generated = generate(start, end, symbols=options.synthetic_symbols)
    return MixedSource(real, generated, generated.names)


class _QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        log.log(logging.ERROR if type == "error" else logging.DEBUG, message, *args)


class _MarketHandler(_QuietHandler):
    """HTTP/1.1 with connections that stay open, which werkzeug's own handler does not have; answers are sent in one piece."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _MarketServer

    def run_wsgi(self) -> None:
        environ = self.make_environ()
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True  # how much of it the application leaves unread is not known
        else:
            # read whole, so that the next request begins where this one ends
            environ["wsgi.input"] = io.BytesIO(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        response = self.server.answer(environ)
        headers, body = response.get_wsgi_headers(environ), b"" if self.command == "HEAD" else response.get_data()
        if headers.get("Content-Length") != str(len(body)):
            self.close_connection = True  # a cut answer, or one to HEAD
        lines = [f"HTTP/1.1 {response.status}", *(f"{name}: {value}" for name, value in headers)]
        if self.close_connection:
            lines.append("Connection: close")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)


class _MarketServer(ThreadedWSGIServer):
    """Closes the connections that are still open when it ends: no client goes on talking to a stopped cloud."""

    def __init__(self, host: str, port: int, answer: Callable[[dict[str, Any]], Response]) -> None:
        self.answer = answer
        self._open: set[Any] = set()
        super().__init__(host, port, _no_application, _MarketHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _no_application(*_: Any) -> Iterable[bytes]:
    raise AssertionError("unreachable: the handler asks the server's answer()")


class _QuietMotoHandler(_QuietHandler, MotoRequestHandler):
    def connection_dropped(self, error: BaseException, environ: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self.close_connection = True  # also where a rule has cut it: no further request is waited for


class Sandbox:
    """One local cloud: ``with Sandbox(SandboxOptions(...)) as cloud: … cloud.env() …``.

    When the block ends, so do the servers and every process of every instance. One at a time in a process.
    """

    def __init__(self, options: SandboxOptions | None = None) -> None:
        self.options = options or SandboxOptions()
        self.faults = Faults()
        self.holds = Holds()
        self.traffic = Traffic(self.options.rate_limits)
        self.telegram: list[dict[str, Any]] = []
        """Messages sent to the Telegram stand-in, oldest first."""
        self.source: Source
        self.exchange: exchange.Exchange
        self.coingecko: coingecko.CoinGecko
        self.aws: Aws
        self.runner: Runner
        self._metadata = MetadataService()
        self._servers: list[BaseWSGIServer] = []
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._temporary: Path | None = None
        self._running = False

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Sandbox:
        """Starts everything and returns when it answers. RuntimeError when this process has one running already.

        An object is started once; for another cloud make another object.
        """
        if self._stopping.is_set():
            raise RuntimeError("this local cloud has been stopped: make a new Sandbox")
        if not _one_per_process.acquire(blocking=False):
            raise RuntimeError("a local cloud runs in this process already (moto keeps its state in globals): stop it first")
        self._running = True
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        options = self.options
        self.source = _source(options)
        self.exchange = exchange.Exchange(self.source, options.now)
        self.coingecko = coingecko.CoinGecko(self.source, options.coingecko_plan, now=options.now, messy=options.coingecko_messy)
        if options.state_dir is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="crpbot-local-cloud-"))
        state = self._temporary or options.state_dir
        assert state is not None
        gpu = options.gpu
        self.aws = Aws(
            region=options.region,
            spot_prices=options.spot_prices,
            bucket=BUCKET,
            log_groups=[gpu.log_group],
            instance_profiles=[gpu.instance_profile],
            image_parameters=[gpu.ami.removeprefix(_SSM_PREFIX)] if gpu.ami.startswith(_SSM_PREFIX) else [],
            stopping=self._stopping,
            holds=self.holds,
        )
        self.runner = Runner(
            state.resolve() / "instances",
            Timing(options.boot_seconds, options.shutdown_seconds, options.minute_seconds),
            changed=self.aws.show_state,
            entry_point=options.entry_point,
            holds=self.holds,
        )
        self.aws.runner = self.runner
        aws_server = make_server(options.host, options.aws_port, self.aws, threaded=True, request_handler=_QuietMotoHandler)
        self._servers.append(aws_server)
        server = _MarketServer(options.host, options.port, self._answer)
        self._servers.append(server)
        self._port, self._aws_port = server.server_port, aws_server.server_port
        # instances run beside the servers, whatever name these have for the outside
        inside = "127.0.0.1" if options.host == "0.0.0.0" else options.host
        self.runner.control = f"http://{inside}:{self._port}"
        self.runner.environment = {
            "AWS_REGION": options.region,
            "AWS_DEFAULT_REGION": options.region,
            "AWS_ENDPOINT_URL": f"http://{inside}:{self._aws_port}",
        }
        self.runner.profile = dict(_CREDENTIALS)
        if marker := os.environ.get("CRPBOT_MARKER"):
            self.runner.environment["CRPBOT_MARKER"] = self.runner.profile["CRPBOT_MARKER"] = marker
        for one in self._servers:
            thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
            thread.start()
            self._threads.append(thread)
        log.info("local cloud: AWS at %s, markets and control at %s", self.aws_url, self.control_url)

    def stop(self) -> None:
        """Ends every instance with its processes, then the servers. Does nothing when it does not run."""
        if not self._running:
            return
        self._running = False
        self._stopping.set()
        self.holds.close()
        try:
            if hasattr(self, "runner"):
                self.runner.close()
        finally:
            for thread, server in zip(self._threads, self._servers, strict=False):
                server.shutdown()
                thread.join()
            for server in self._servers:
                server.server_close()
            if self._temporary is not None:
                shutil.rmtree(self._temporary)
            _one_per_process.release()

    # --- for clients ---

    def _address(self, port: int) -> str:
        return f"http://{self.options.advertise or self.options.host}:{port}"

    @property
    def control_url(self) -> str:
        return self._address(self._port)

    @property
    def aws_url(self) -> str:
        return self._address(self._aws_port)

    def env(self) -> dict[str, str]:
        """Environment variables with which any process uses this cloud instead of the outside."""
        plan = self.options.coingecko_plan
        return {
            "AWS_ENDPOINT_URL": self.aws_url,
            **_CREDENTIALS,
            "AWS_REGION": self.options.region,
            "AWS_DEFAULT_REGION": self.options.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            # nothing of the caller's own AWS configuration, and no proxy, may lead a client past the local cloud
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "NO_PROXY": (
                no_proxy := ",".join(dict.fromkeys(("127.0.0.1", "localhost", self.options.advertise or self.options.host)))
            ),
            "no_proxy": no_proxy,
            "CRPBOT_LAKE": f"s3://{BUCKET}",
            "CRPBOT_COINBASE_URL": self.control_url,
            "CRPBOT_COINGECKO_URL": f"{self.control_url}/api/v3",
            **({} if plan == "pro" else {"CRPBOT_COINGECKO_PLAN": plan}),
            **({"CRPBOT_COINGECKO_API_KEY": key} if (key := coingecko.KEYS[plan]) else {}),
            "CRPBOT_TELEGRAM__URL": self.control_url,
            "CRPBOT_TELEGRAM__TOKEN": TELEGRAM_TOKEN,
            "CRPBOT_TELEGRAM__CHAT_ID": TELEGRAM_CHAT,
            **({} if self.source.kind == "real" else {"CRPBOT_TRAINING__SYNTHETIC": "true"}),
        }

    def instances(self) -> list[dict[str, Any]]:
        """Every instance ever launched here, oldest first, in JSON; ``pids`` are its living processes."""
        return [self._record(instance) for instance in self.runner.all()]

    def _record(self, instance: Instance) -> dict[str, Any]:
        launch = instance.launch
        return {
            "id": launch.id,
            "type": launch.type,
            "image_id": launch.image_id,
            "lifecycle": launch.lifecycle,
            "spot_price": launch.spot_price,
            "shutdown_behavior": launch.shutdown_behavior,
            "tags": self.aws.tags(launch.id),
            "state": instance.state,
            "history": [{"state": state, "at": at.isoformat()} for state, at in list(instance.history)],
            "reason": instance.reason,
            "ended_by": instance.end.by if instance.end else "",
            "state_reason": instance.state_reason[0],
            "pids": instance.pids(),
        }

    def about(self) -> dict[str, Any]:
        """What this cloud is, in JSON."""
        return {
            "what": "crpbot's local cloud: stand-ins for Coinbase, CoinGecko, Telegram and AWS",
            "data": self.source.describe(),
            "aws": {"url": self.aws_url, "region": self.options.region, **self.aws.describe()},
            "faults": self.faults.describe(),
            "requests": self.traffic.describe(),
            "pid": os.getpid(),
        }

    # --- HTTP: markets, Telegram, control ---

    _ROUTES = Map(
        [
            Rule("/api/v3/brokerage/market/products/<product>/candles", endpoint="exchange_candles", methods=["GET"]),
            Rule("/api/v3/brokerage/market/products/<product>", endpoint="exchange_product", methods=["GET"]),
            Rule("/api/v3/coins/<coin>/market_chart/range", endpoint="coingecko_range", methods=["GET"]),
            Rule("/api/v3/coins/<coin>", endpoint="coingecko_coin", methods=["GET"]),
            Rule("/bot<token>/sendMessage", endpoint="telegram_send", methods=["POST"]),
            Rule("/_sandbox/about", endpoint="about", methods=["GET"]),
            Rule("/_sandbox/telegram", endpoint="telegram_list", methods=["GET"]),
            Rule("/_sandbox/capacity", endpoint="capacity", methods=["POST"]),
            Rule("/_sandbox/ec2/faults", endpoint="ec2_faults", methods=["GET", "POST"]),
            Rule("/_sandbox/ec2/visibility", endpoint="ec2_visibility", methods=["POST"]),
            Rule("/_sandbox/ec2/spot_prices", endpoint="ec2_spot_prices", methods=["POST"]),
            Rule("/_sandbox/faults", endpoint="faults", methods=["GET", "POST"]),
            Rule("/_sandbox/rate_limits", endpoint="rate_limits", methods=["GET", "POST"]),
            Rule("/_sandbox/requests", endpoint="requests", methods=["GET", "DELETE"]),
            Rule("/_sandbox/holds", endpoint="holds", methods=["GET", "POST"]),
            Rule("/_sandbox/holds/release", endpoint="release", methods=["POST"]),
            Rule("/_sandbox/instances", endpoint="instances", methods=["GET"]),
            Rule("/_sandbox/instances/<instance>/console", endpoint="console", methods=["GET"]),
            Rule("/_sandbox/instances/<instance>/power", endpoint="power", methods=["POST"]),
            Rule("/_sandbox/instances/<instance>/logs", endpoint="logs", methods=["POST"]),
            Rule("/_sandbox/instances/<instance>/held", endpoint="held", methods=["POST"]),
            Rule("/_sandbox/instances/<instance>/interrupt", endpoint="interrupt", methods=["POST"]),
            Rule("/_sandbox/instances/<instance>/freeze", endpoint="freeze", methods=["POST"]),
            Rule("/_sandbox/metadata/<instance>/latest/<path:path>", endpoint="metadata", methods=["GET", "PUT"]),
        ]
    )

    def _answer(self, environ: dict[str, Any]) -> Response:
        request = Request(environ)
        try:
            endpoint, arguments = self._ROUTES.bind_to_environ(environ).match()
            return cast(Response, getattr(self, f"_on_{endpoint}")(request, **arguments))
        except HTTPException as error:
            return _json({"error": error.description}, error.code or 500)
        except (KeyError, ValueError) as error:  # ValidationError is a ValueError
            return _json({"error": _message(error)}, 400)
        except Exception:
            log.exception("%s %s", request.method, request.path)
            return _json({"error": "the local cloud failed, its log says why"}, 500)

    def _on_exchange_candles(self, request: Request, product: str) -> Response:
        return self._market("exchange", exchange, lambda: self.exchange.candles(product, request), exchange.NO_CANDLES)

    def _on_exchange_product(self, _request: Request, product: str) -> Response:
        return self._market("exchange", exchange, lambda: self.exchange.product(product), {})

    def _on_coingecko_range(self, request: Request, coin: str) -> Response:
        return self._coingecko(request, lambda: self.coingecko.market_chart_range(coin, request), coingecko.NO_POINTS)

    def _on_coingecko_coin(self, request: Request, coin: str) -> Response:
        return self._coingecko(request, lambda: self.coingecko.coin(coin), {})

    def _coingecko(self, request: Request, answer: Callable[[], Response], empty: Any) -> Response:
        refusal = coingecko.refuse_key(request, self.coingecko.plan)
        return self._market("coingecko", coingecko, (lambda: refusal) if refusal else answer, empty)

    def _market(self, target: Target, api: Any, answer: Callable[[], Response], empty: Any) -> Response:
        """The stand-in's answer, or what the rate limit or a fault makes of it. ``empty`` is its answer without any rows."""
        if not self.traffic.admit(target):
            return cast(Response, api.rate_limited())
        fault = self.faults.draw(target)
        if fault is None:
            return answer()
        if fault.html or fault.status is not None:
            return self._failure(fault, api)
        if fault.empty:
            return _json(empty)
        if fault.error_body:
            return _json(api.ERROR_BODY if fault.error_body is True else fault.error_body)
        if fault.stall is not None:
            self._stopping.wait(fault.stall)
        response = answer()
        if fault.truncate:
            whole = response.get_data()
            response.set_data(whole[: len(whole) // 2])
            response.headers["Content-Length"] = str(len(whole))
            response.automatically_set_content_length = False
        return response

    @staticmethod
    def _failure(fault: Fault, api: Any) -> Response:
        if fault.html:
            status = fault.status or 502
            page = f"<html>\n<head><title>{status}</title></head>\n<body><h1>{status}</h1><hr>cloudflare</body>\n</html>\n"
            response = Response(page, status, content_type="text/html; charset=UTF-8")
        elif fault.status == 429:
            response = api.rate_limited()
        else:
            response = Response("upstream connect error\n", fault.status, content_type="text/plain")
        if fault.retry_after is not None:
            response.headers["retry-after"] = f"{fault.retry_after:g}"
        return response

    def _on_telegram_send(self, request: Request, token: str) -> Response:
        """As the Bot API: JSON or form, 401 for a wrong token, 400 for a message without text or chat."""
        if token != TELEGRAM_TOKEN:
            return _json({"ok": False, "error_code": 401, "description": "Unauthorized"}, 401)
        body = request.get_json() if request.is_json else request.form.to_dict()
        for name, what in (("chat_id", "chat not found"), ("text", "message text is empty")):
            if not body.get(name):
                return _json({"ok": False, "error_code": 400, "description": f"Bad Request: {what}"}, 400)
        message = {
            "message_id": len(self.telegram) + 1,
            "date": int(datetime.now(UTC).timestamp()),
            "chat": {"id": body["chat_id"]},
            "text": body["text"],
        }
        self.telegram.append(message)
        return _json({"ok": True, "result": message})

    def _on_telegram_list(self, _request: Request) -> Response:
        return _json(self.telegram)

    def _on_about(self, _request: Request) -> Response:
        return _json(self.about())

    def _on_capacity(self, request: Request) -> Response:
        """{"unavailable": [type…], "unavailable_spot": [type…]}: replaces what was said before."""
        body = request.get_json()
        unknown = sorted(set(body) - {"unavailable", "unavailable_spot"})
        if unknown:
            raise ValueError(f"capacity knows unavailable and unavailable_spot, not {', '.join(unknown)}")
        faults = self.aws.faults
        faults.set_capacity(body.get("unavailable", []), body.get("unavailable_spot", []))
        return _json({"unavailable": sorted(faults.unavailable), "unavailable_spot": sorted(faults.unavailable_spot)})

    def _on_ec2_faults(self, request: Request) -> Response:
        """[rule…]: replaces the rules; nothing changes on an error."""
        if request.method == "POST":
            self.aws.faults.set(TypeAdapter(list[Ec2Fault]).validate_python(request.get_json()))
        return _json(self.aws.faults.describe())

    def _on_ec2_visibility(self, request: Request) -> Response:
        """{"seconds": s}: how long a launched instance is invisible, those launched already included."""
        self.aws.invisible_seconds = _Visibility.model_validate(request.get_json()).seconds
        return _json({"seconds": self.aws.invisible_seconds})

    def _on_ec2_spot_prices(self, request: Request) -> Response:
        """{type: {zone: USD an hour}}: in force from now on; what is not named stays as it is."""
        prices = TypeAdapter(dict[str, dict[str, _Usd]]).validate_python(request.get_json())
        self.aws.set_spot_prices(prices)
        return _json(self.aws.describe()["spot_prices"])

    def _on_faults(self, request: Request) -> Response:
        """{"exchange": fault | [fault…] | null, "coingecko": …}: what is not named stays as it is; nothing changes on an error."""
        if request.method == "POST":
            faults = TypeAdapter(dict[Target, Fault | list[Fault] | None]).validate_python(request.get_json())
            for target, fault in faults.items():
                self.faults.set(target, fault)
        return _json(self.faults.describe())

    def _on_rate_limits(self, request: Request) -> Response:
        """{"exchange": {"per_second": 10, "burst": 10} | null, "coingecko": …}: what is not named stays as it is."""
        if request.method == "POST":
            limits = TypeAdapter(dict[Target, RateLimit | None]).validate_python(request.get_json())
            for target, limit in limits.items():
                self.traffic.limit(target, limit)
        return _json({target: said["limit"] for target, said in self.traffic.describe().items()})

    def _on_requests(self, request: Request) -> Response:
        """What was asked of the markets; DELETE begins counting anew."""
        said = self.traffic.describe()
        if request.method == "DELETE":
            self.traffic.restart()
        return _json(said)

    def _on_instances(self, _request: Request) -> Response:
        return _json(self.instances())

    def _on_console(self, _request: Request, instance: str) -> Response:
        return Response(self._instance(instance).console, content_type="text/plain; charset=utf-8")

    def _on_power(self, request: Request, instance: str) -> Response:
        """What an instance's shutdown and poweroff say."""
        found, body = self._instance(instance), request.get_json()
        if body["action"] == "schedule":
            return _json({"at": found.schedule_power_off(int(body["minutes"])).isoformat(timespec="seconds")})
        if body["action"] == "cancel":
            found.cancel_power_off()
        elif body["action"] == "off":
            found.power_off()
        else:
            raise ValueError(f"unknown power action {body['action']!r}")
        return _json({})

    def _on_logs(self, request: Request, instance: str) -> Response:
        """What an instance's docker ships."""
        self._instance(instance)
        body = request.get_json()
        self.aws.put_log_events(body["group"], body["stream"], body["events"])
        return _json({})

    def _on_holds(self, request: Request) -> Response:
        """{"run": name or "*", "at": point, "skip": n}: holds the run there."""
        if request.method == "POST":
            self.holds.set(Hold.model_validate(request.get_json()))
        return _json(self.holds.describe())

    def _on_release(self, request: Request) -> Response:
        """{"run": name or "*", "at": point, "error": code, "times": n}: lets it go on."""
        self.holds.release(Release.model_validate(request.get_json()))
        return _json(self.holds.describe())

    def _on_held(self, request: Request, instance: str) -> Response:
        """What an instance's docker, shutdown and training ask."""
        at = _Held.model_validate(request.get_json()).at
        return _json({"held": self.holds.holding(self._instance(instance).launch.run, at)})

    def _on_interrupt(self, request: Request, instance: str) -> Response:
        """EC2 takes a spot instance back, after a notice."""
        found = self._instance(instance)
        found.interrupt(Interruption.model_validate(request.get_json()))
        times = {"ends_at": found.ends_at, "rebalance_at": found.rebalance_at}
        return _json({name: at and at.isoformat() for name, at in times.items()})

    def _on_freeze(self, request: Request, instance: str) -> Response:
        """The instance hangs from now on; {"processes": false}: its power-off alone."""
        found = self._instance(instance)
        found.freeze(processes=_Freeze.model_validate(request.get_json()).processes)
        return _json({"frozen": found.pids()[1:] if found.frozen else []})

    def _on_metadata(self, request: Request, instance: str, path: str) -> Response:
        return self._metadata.answer(self._instance(instance), request, path)

    def _instance(self, instance: str) -> Instance:
        try:
            return self.runner.get(instance)
        except KeyError as error:
            raise NotFound(str(error.args[0])) from None


def _json(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, content_type="application/json; charset=utf-8")


def _message(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
    return f"missing {error}" if isinstance(error, KeyError) else str(error)
