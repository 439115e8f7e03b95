"""The command `dfproxy`. Each subcommand reads the settings, does its work elsewhere, and answers with an exit status.

0: done, or stopped as asked. 1: it failed; one sentence says why and what to do. 2: a mistake in the call or a setting.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import proxy
from proxy import dsn, faults, logs
from proxy.process import FAILED, USAGE, run
from proxy.settings import Settings, SettingsError, load
from proxy.upstream import Upstream

app = typer.Typer(
    name="dfproxy", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Durable workflows in SQL for any PostgreSQL: a transparent proxy with the df.* functions of pg_durable.",
    epilog="Every setting can also stand in the environment (DFPROXY_LISTEN) or in dfproxy.toml: docs/operations.md.",
)

UpstreamFlag = Annotated[str | None, typer.Option(
    help="The PostgreSQL server: postgresql://USER@HOST:PORT/DATABASE. A password is safer in DFPROXY_UPSTREAM.",
    show_default=False)]
Config = Annotated[Path | None, typer.Option(
    help="Settings file; without it ./dfproxy.toml where it exists.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option(
    "--set", metavar="NAME=VALUE", help="Any other setting, as often as needed.", show_default=False)]
Databases = Annotated[str | None, typer.Option(
    help="Further databases with workflows: a,b or *.", show_default=False)]
LogLevel = Annotated[str | None, typer.Option(
    help="debug, info, warning or error.", show_default=False)]


def _version(asked: bool) -> None:
    if asked:
        print(f"dfproxy {proxy.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Show the version and exit.")] = False) -> None:
    """Options of the command as a whole."""


def _settings(flags: dict[str, Any], config: Path | None, sets: list[str] | None) -> Settings:
    """The settings in force, with logging set up; ends the command with status 2 where there is a mistake."""
    try:
        for text in sets or ():
            name, equals, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if not equals or name not in Settings.model_fields:
                raise SettingsError(f"--set {name}: want NAME=VALUE with one of {', '.join(Settings.model_fields)}")
            flags[name] = value
        settings = load(flags, config=config)
        if settings.upstream is not None:
            Upstream.parse(dsn.check(settings.upstream.get_secret_value()))
    except ValueError as e:  # SettingsError is one
        _complain(str(e))
        raise typer.Exit(USAGE) from None
    logs.configure(settings.log_level, settings.log_format)
    if (given := flags.get("upstream")) and dsn.has_password(given):
        _complain("the password in --upstream can be seen by every user of this machine; "
                  "better set DFPROXY_UPSTREAM, or upstream in dfproxy.toml", "warning")
    return settings


def _complain(text: str, kind: str = "error") -> None:
    print(f"dfproxy: {kind}: {text}", file=sys.stderr, flush=True)


def _finish(main: Callable[[], Awaitable[int]], settings: Settings) -> None:
    """Runs to the end; faults of the user's become one sentence, bugs of ours keep their traceback."""
    where = dsn.show(settings.upstream.get_secret_value()) if settings.upstream else "the embedded server"
    try:
        status = run(main)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BaseException as e:
        text = faults.explain(e, where=where)
        if text is None:
            raise
        _complain(text)
        raise typer.Exit(FAILED) from None
    raise typer.Exit(status)


@app.command()
def serve(
    *,
    upstream: UpstreamFlag = None,
    listen: Annotated[str | None, typer.Option(
        metavar="HOST:PORT", help="Where clients connect [127.0.0.1:6432]; port 0 picks a free one.",
        show_default=False)] = None,
    config: Config = None,
    no_engine: Annotated[bool, typer.Option("--no-engine", help="The proxy alone, without a worker.")] = False,
    processes: Annotated[int | None, typer.Option(
        help="Processes that share the port, each with its own worker.", show_default=False)] = None,
    data_dir: Annotated[Path | None, typer.Option(
        help="Folder of the embedded PostgreSQL, which runs where no --upstream is given.", show_default=False)] = None,
    databases: Databases = None,
    log_level: LogLevel = None,
    sets: Sets = None,
) -> None:
    """Run the proxy and a worker. Without --upstream: in front of a PostgreSQL 18 of its own."""
    from proxy.serve import serve as main

    settings = _settings({"upstream": upstream, "listen": listen, "engine": False if no_engine else None,
                          "processes": processes, "data_dir": data_dir, "databases": databases,
                          "log_level": log_level}, config, sets)
    _finish(lambda: main(settings), settings)


@app.command()
def worker(upstream: UpstreamFlag = None, config: Config = None, databases: Databases = None,
           log_level: LogLevel = None, sets: Sets = None) -> None:
    """Run the engine alone: more workers for a database, or one beside plain connections."""
    from proxy.serve import work

    settings = _settings({"upstream": upstream, "databases": databases, "log_level": log_level}, config, sets)
    _finish(lambda: work(settings), settings)


@app.command()
def init(
    *,
    upstream: UpstreamFlag = None, config: Config = None, databases: Databases = None,
    grant: Annotated[list[str] | None, typer.Option(
        metavar="ROLE", help="Let this role use df.*, as often as needed.", show_default=False)] = None,
    log_level: LogLevel = None, sets: Sets = None,
) -> None:
    """Install or upgrade the schemas df and duroxide, repair executor logins, and exit."""
    from proxy.admin import init as main

    settings = _settings({"upstream": upstream, "databases": databases, "log_level": log_level}, config, sets)
    _finish(lambda: main(settings, grant or ()), settings)


@app.command()
def uninstall(
    *,
    upstream: UpstreamFlag = None, config: Config = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while unfinished workflows exist.")] = False,
    log_level: LogLevel = None, sets: Sets = None,
) -> None:
    """Remove the schemas df and duroxide with all workflows in them."""
    from proxy.admin import uninstall as main

    settings = _settings({"upstream": upstream, "log_level": log_level}, config, sets)
    if settings.upstream is not None and not yes:
        where = dsn.show(settings.dsn)
        if not sys.stdin.isatty():
            _complain(f"this removes df.* and every workflow from {where}; give --yes to say that you mean it")
            raise typer.Exit(USAGE)
        typer.confirm(f"Remove df.* and every workflow, finished or not, from {where}?", abort=True)
    _finish(lambda: main(settings, force=force), settings)


@app.command()
def doctor(upstream: UpstreamFlag = None, config: Config = None, databases: Databases = None,
           log_level: LogLevel = None, sets: Sets = None) -> None:
    """Check a server and an installation; says what to do about each finding, and exits with 1 where there is one."""
    from proxy.doctor import doctor as main

    settings = _settings({"upstream": upstream, "databases": databases, "log_level": log_level}, config, sets)
    _finish(lambda: main(settings), settings)


@app.command()
def demo() -> None:
    """Show it all in under a minute: a server, 10,000 documents, a workflow, a crash in the middle, the count."""
    from proxy.demo import demo as main

    settings = _settings({"log_level": "error"}, None, None)
    _finish(main, settings)


def main() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    main()
