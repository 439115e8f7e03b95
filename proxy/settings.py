"""What a person can set, and where each value comes from: flags, then `DFPROXY_...`, then `dfproxy.toml`.

`load` is the only way in. It accepts no unknown key anywhere and turns each mistake into one sentence that names the
key as the person wrote it (`--listen`, `DFPROXY_LISTEN`, `listen in dfproxy.toml`). Values that can hold a password are
`SecretStr`, so that neither `repr` nor a log line shows them.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from engine.http.policy import HostList

PREFIX = "DFPROXY_"
CONFIG_NAME = "dfproxy.toml"
#: Variables with the prefix that are not settings: where the file is, and what the tests are told.
OTHER_VARIABLES = {PREFIX + "CONFIG"}
TEST_PREFIX = PREFIX + "TEST_"

#: Settings of pg_durable that have another name here, or no place at all, and what to do instead.
ELSEWHERE = {
    "worker_role": "the worker logs in as the user that `upstream` names",
    "database": "the database is named in `upstream`; further ones in `databases`",
    "max_management_connections": "it is called `max_control_connections` here",
    "max_duroxide_connections": "it is called `max_control_connections` here",
}


class SettingsError(ValueError):
    """A setting that can't be used; the text is for the person who set it."""


def _split(value: object) -> object:
    """`a, b` as people write lists in a variable or a flag."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


def _hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    HostList.parse(value)
    return value


Hosts = Annotated[Names, AfterValidator(_hosts)]


def _networks(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        if text != "unix":
            try:
                ipaddress.ip_network(text)
            except ValueError:
                raise ValueError(f"{text!r} is not a network, as in 10.0.0.0/8, nor an address, nor unix") from None
    return value


Networks = Annotated[Names, AfterValidator(_networks)]


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPv6]:PORT`, `*:PORT` (every address) or `:PORT` (loopback) as host and port.

    Raises ValueError with a sentence that shows the right form.
    """
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is not HOST:PORT (an IPv6 address goes in brackets: [::1]:6432)")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:6432")
    if host == "*":
        host = "0.0.0.0"
    return host or "127.0.0.1", int(port)


def _address(value: object) -> object:
    if isinstance(value, str):
        parse_address(value)
    return value


class Settings(BaseModel):
    """Every setting, with its default. Durations are seconds, sizes bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Where
    upstream: SecretStr | None = Field(None, description="libpq URI of the PostgreSQL server; none: the embedded one")
    listen: Annotated[str, BeforeValidator(_address)] = Field("127.0.0.1:6432", description="where clients connect")
    socket_dir: Path | None = Field(None, description="folder for a Unix-domain socket, besides `listen`")
    reuse_port: bool = Field(False, description="share address and port with another dfproxy: a restart without a gap")
    proxy_protocol: Networks = Field(
        (), description="networks (`unix`: the socket's clients) whose connections begin with a PROXY header")
    data_dir: Path | None = Field(None, description="folder of the embedded PostgreSQL")
    databases: Names = Field((), description="further databases with workflows, or `*` for every one")

    # The process
    engine: bool = Field(True, description="host a worker")
    processes: int = Field(1, ge=1, le=256, description="processes that share the port, each with its own worker")
    drain_timeout: float = Field(10.0, ge=0, le=3600, description="grace for clients and steps at a stop")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON")

    # Clients
    max_client_connections: int = Field(1000, ge=1, le=1_000_000, description="clients at a time, per process")
    fastpath: bool = Field(True, description="relay plain requests by compiled code, where it was built")
    startup_timeout: float = Field(30.0, gt=0, le=3600, description="for a client's start-up and authentication")

    # TLS and passwords of clients. What the server is told stands in the upstream: sslmode, sslrootcert, ...
    tls_cert: Path | None = Field(None, description="certificate (PEM, with its chain) for clients; none: no TLS")
    tls_key: Path | None = Field(None, description="the certificate's private key (PEM)")
    tls_client_ca: Path | None = Field(None, description="clients need a certificate that one of these signed (PEM)")
    tls_min_version: Literal["TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"] = Field(
        "TLSv1.2", description="oldest TLS for clients")
    tls_required: bool = Field(False, description="refuse clients without TLS")
    auth: Literal["auto", "relay", "password"] = Field(
        "auto", description="who answers the server's question for a password: auto, relay, password")

    # Who may, and as whom
    secret: SecretStr | None = Field(None, description="executor passwords derive from it; none: kept in the database")
    enable_superuser_instances: bool = Field(False, description="let superusers submit workflows")
    require_login: bool = Field(False, description="refuse workflows of roles without LOGIN")
    allow_set_role: bool = Field(False, description="run steps by plain SET ROLE where a role has no executor login")

    # The engine
    lease: float = Field(15.0, ge=1, le=3600, description="a worker silent for so long loses its workflows")
    max_instances: int = Field(1000, ge=1, le=100_000, description="workflows in memory, per process")
    max_user_connections: int = Field(10, ge=1, le=1000, description="connections for steps, per process")
    max_control_connections: int = Field(4, ge=1, le=1000, description="connections for the state, per process")
    execution_acquire_timeout: float = Field(30.0, ge=1, le=3600, description="how long a step waits for a connection")
    max_new_transaction_starts: int = Field(
        2, ge=1, le=1000, description="starts with transaction_mode => 'new' at a time")
    new_transaction_start_timeout: float = Field(
        5.0, ge=1, le=3600, description="how long such a start waits for its turn, and for an answer")
    max_result_bytes: int = Field(16 * 2**20, ge=1024, description="largest result of a step")
    max_result_rows: int = Field(100_000, ge=1, description="most rows in a step's result")
    loop_history_rounds: int = Field(10, ge=0, le=100_000, description="finished loop rounds whose history is kept")
    max_crashes: int = Field(10, ge=1, le=1000, description="lost workers after which a workflow is given up")
    retention_days: int = Field(30, ge=0, le=36500, description="how long workflows are kept that have ended")
    retention_max_instances: int = Field(
        0, ge=0, le=1_000_000_000, description="how many of those at most, the newest; 0: any number")
    reconcile_interval: float = Field(
        3600.0, ge=0, le=86400, description="between two looks for what is to be removed; 0: nothing ever is")
    list_instances_max_limit: int = Field(1000, ge=1, le=1_000_000, description="most rows of df.list_instances")

    # HTTP steps
    http_enabled: bool = Field(True, description="let workflows call out by HTTP")
    http_allow: Hosts = Field(
        (), description="hosts that may be called: names, *.suffix, *, networks; none: any public host")
    http_deny: Hosts = Field((), description="hosts that may not, whatever http_allow says")
    http_allow_plain: bool = Field(True, description="http:// beside https://")
    http_max_request_bytes: int = Field(10 * 2**20, ge=1024, description="largest body sent")
    # Above that the JSON of a body of control characters would no longer fit into one value of PostgreSQL's.
    http_max_response_bytes: int = Field(10 * 2**20, ge=1024, le=40 * 2**20,
                                         description="largest body received, also unpacked")
    http_max_timeout: float = Field(300.0, gt=0, le=86400, description="longest timeout of a call")
    http_max_parallel: int = Field(100, ge=1, le=10_000, description="calls at a time, per worker")
    http_max_parallel_per_host: int = Field(20, ge=1, le=10_000, description="of those, to one host and port")
    http_ca_file: Path | None = Field(None, description="authorities (PEM) to trust beside the system's")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both")
        if self.tls_cert is None and (self.tls_required or self.tls_client_ca is not None):
            raise ValueError("tls_required and tls_client_ca need tls_cert and tls_key")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on; port 0 picks a free one."""
        return parse_address(self.listen)

    @property
    def dsn(self) -> str:
        """The upstream in clear, for those who connect. Raises SettingsError where there is none."""
        if self.upstream is None:
            raise SettingsError(
                "no server named: give --upstream postgresql://USER@HOST/DATABASE, or set DFPROXY_UPSTREAM")
        return self.upstream.get_secret_value()


def _nearest(name: str) -> str:
    """What to say after `unknown setting X`."""
    if name in ELSEWHERE:
        return f": {ELSEWHERE[name]}"
    near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(Settings.model_fields)}"


def _from_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file. Raises SettingsError where it can't be read, or has an unknown key."""
    try:
        with path.open("rb") as f:
            values = tomllib.load(f)
    except OSError as e:
        raise SettingsError(f"can't read {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingsError(f"{path} is not TOML: {e}") from e
    for name in values:
        if name not in Settings.model_fields:
            raise SettingsError(f"unknown setting {name!r} in {path}{_nearest(name)}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings among the variables; empty ones count as not set. Raises SettingsError for an unknown one."""
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or variable.startswith(TEST_PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in Settings.model_fields or not variable.isupper():
            raise SettingsError(f"unknown setting {variable} in the environment{_nearest(name)}")
        if value:
            values[name] = value
    return values


def _config_file(config: Path | None, environ: Mapping[str, str], folder: Path) -> Path | None:
    if config is not None:
        return config
    if named := environ.get(PREFIX + "CONFIG"):
        return Path(named)
    here = folder / CONFIG_NAME
    return here if here.exists() else None


def load(flags: Mapping[str, Any], *, config: Path | None = None, environ: Mapping[str, str] | None = None,
         folder: Path | None = None) -> Settings:
    """The settings in force: `flags` (None: not given) over the environment over the file.

    The file is `config`, or DFPROXY_CONFIG, or dfproxy.toml in `folder` (the working directory) where it exists.
    Raises SettingsError, whose text names the key as it was written and never shows a secret's value.
    """
    environ = os.environ if environ is None else environ
    path = _config_file(config, environ, folder or Path.cwd())
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    layers: list[tuple[Mapping[str, Any], Any]] = [
        (_from_file(path) if path else {}, lambda n: f"{n} in {path}"),
        (_from_environment(environ), lambda n: PREFIX + n.upper()),
        ({k: v for k, v in flags.items() if v is not None}, lambda n: "--" + n.replace("_", "-")),
    ]
    for layer, written in layers:
        for name, value in layer.items():
            values[name], sources[name] = value, written(name)
    try:
        return Settings(**values)
    except ValidationError as e:
        raise SettingsError("; ".join(_say(err, sources) for err in e.errors(include_input=False))) from None


def _say(error: Any, sources: Mapping[str, str]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "settings"
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{sources.get(name, name)}: {text}"
