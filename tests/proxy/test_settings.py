"""Settings: which source wins, what is refused and how it is said, and that secrets stay hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy import dsn
from proxy.logs import redact
from proxy.settings import Settings, SettingsError, load, parse_address

SECRET = "correct-horse"


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "dfproxy.toml").write_text("lease = 20\nmax_crashes = 3\nlisten = '127.0.0.1:1'\n")
    environ = {"DFPROXY_LEASE": "30", "DFPROXY_LISTEN": "127.0.0.1:2", "PATH": "/bin"}
    settings = load({"listen": "127.0.0.1:3", "upstream": None}, environ=environ, folder=tmp_path)
    assert (settings.address, settings.lease, settings.max_crashes) == (("127.0.0.1", 3), 30.0, 3)
    assert settings.upstream is None


def test_the_file_may_be_named_by_flag_or_variable(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("max_crashes = 4\n")
    (tmp_path / "b.toml").write_text("max_crashes = 5\n")
    environ = {"DFPROXY_CONFIG": str(tmp_path / "b.toml")}
    assert load({}, environ=environ).max_crashes == 5
    assert load({}, config=tmp_path / "a.toml", environ=environ).max_crashes == 4


def test_an_empty_variable_is_not_set() -> None:
    assert load({}, environ={"DFPROXY_UPSTREAM": ""}).upstream is None


def test_lists_and_booleans_as_people_write_them(tmp_path: Path) -> None:
    settings = load({}, environ={"DFPROXY_DATABASES": "a, b", "DFPROXY_ENGINE": "off"})
    assert (settings.databases, settings.engine) == (("a", "b"), False)
    (tmp_path / "dfproxy.toml").write_text('databases = ["a", "b"]\n')
    assert load({}, environ={}, folder=tmp_path).databases == ("a", "b")


@pytest.mark.parametrize(("environ", "said"), [
    ({"DFPROXY_LISTN": "x"}, "unknown setting DFPROXY_LISTN in the environment; did you mean 'listen'?"),
    ({"DFPROXY_zzzzz": "x"}, "unknown setting DFPROXY_zzzzz in the environment; there are: upstream, listen,"),
    ({"DFPROXY_WORKER_ROLE": "x"}, "the worker logs in as the user that `upstream` names"),
    ({"DFPROXY_MAX_DUROXIDE_CONNECTIONS": "5"}, "it is called `max_control_connections` here"),
    ({"DFPROXY_PROCESSES": "0"}, "DFPROXY_PROCESSES: should be greater than or equal to 1"),
    ({"DFPROXY_PROCESSES": "two"}, "DFPROXY_PROCESSES: should be a valid integer"),
    ({"DFPROXY_LISTEN": "nowhere"}, "DFPROXY_LISTEN: 'nowhere' is not HOST:PORT, as in 127.0.0.1:6432"),
    ({"DFPROXY_LOG_LEVEL": "loud"}, "DFPROXY_LOG_LEVEL: should be 'debug', 'info', 'warning' or 'error'"),
])
def test_mistakes_in_the_environment(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as e:
        load({}, environ=environ)
    assert said in str(e.value)


@pytest.mark.parametrize(("text", "said"), [
    ("listn = 1", "unknown setting 'listn' in {path}; did you mean 'listen'?"),
    ("[serve]\nlisten = 1", "unknown setting 'serve' in {path}"),
    ("lease = 'soon'", "lease in {path}: should be a valid number"),
    ("lease = ", "{path} is not TOML"),
    ("Lease = 3", "unknown setting 'Lease' in {path}; did you mean 'lease'?"),
])
def test_mistakes_in_the_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "dfproxy.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as e:
        load({}, config=path, environ={})
    assert said.format(path=path) in str(e.value)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"can't read .*No such file"):
        load({}, config=tmp_path / "gone.toml", environ={})


def test_variables_of_the_tests_are_left_alone() -> None:
    assert load({}, environ={"DFPROXY_TEST_VERSIONS": "18"}) == Settings()


def test_secrets_are_in_no_repr_and_no_message() -> None:
    environ = {"DFPROXY_UPSTREAM": f"postgresql://me:{SECRET}@h/d", "DFPROXY_SECRET": SECRET}
    settings = load({}, environ=environ)
    assert SECRET in settings.dsn
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    with pytest.raises(SettingsError) as e:
        load({"processes": 0}, environ=environ)
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("text", [
    f"can't connect to postgresql://me:{SECRET}@host/db?x=1", f"host=h password={SECRET} dbname=d",
    f"host=h password = '{SECRET} \\' x' dbname=d", f"postgresql://h/d?password={SECRET}&sslmode=require",
    f"PassWord={SECRET}", f"pa\u017f\u017fword={SECRET}",
])
def test_connection_strings_are_redacted(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(("text", "address"), [
    ("127.0.0.1:6432", ("127.0.0.1", 6432)), ("[::1]:1", ("::1", 1)), ("*:5", ("0.0.0.0", 5)),
    (":0", ("127.0.0.1", 0)), ("db.example:65535", ("db.example", 65535)),
])
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["6432", "h:", "h:65536", "::1:80", "h:-1", "h:٣"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(("uri", "user", "database", "shown"), [
    ("postgresql://me:pw@h:5433/d", "me", "d", "me@h:5433/d"),
    ("postgresql://h1:1,h2:2/d?target_session_attrs=read-write", "", "d", "h1:1,h2:2/d"),
    ("postgresql://a%40b:pw@h/d%20e", "a@b", "d e", "a@b@h/d e"),
    ("postgres:///d?host=/run/x&user=me", "me", "d", "me@/run/x/d"),
    ("postgresql://me@h", "me", "me", "me@h/me"),
])
def test_questions_about_a_uri(uri: str, user: str, database: str, shown: str) -> None:
    assert (dsn.user(uri), dsn.database(uri), dsn.show(uri)) == (user, database, shown)
    other = dsn.with_database(uri, "other one")
    assert (dsn.user(other), dsn.database(other), dsn.hosts(other)) == (user, "other one", dsn.hosts(uri))
    assert dsn.has_password(other) == dsn.has_password(uri) == (":pw@" in uri)


def test_a_dsn_that_is_no_uri_is_refused_without_showing_it() -> None:
    with pytest.raises(SettingsError) as e:
        dsn.check(f"host=h password={SECRET}")
    assert SECRET not in str(e.value)
