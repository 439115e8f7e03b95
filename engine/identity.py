"""Who a step runs as (DESIGN "Who a step runs as"): from the submitter's OID to a login, a role and session settings.

Three modes. `service`: the submitter is the service role itself. `executor`: the step's session logs in as `dfx_<oid>`,
a role that can become the submitter and nothing else. `set_role`: the service role's own login and SET ROLE, only if
the settings allow it, since a step can undo it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass, field

import asyncpg
import structlog
from scramp import ScramMechanism

from engine.settings import EngineSettings
from engine.store import Store

log = structlog.get_logger("dfproxy.engine")

#: How long what the catalog said about a role is believed, in seconds.
CACHE = 5.0


class IdentityError(Exception):
    """A submitter that no step may run as. The text is for the instance's output; `hint` says what to do."""

    def __init__(self, message: str, sqlstate: str = "42501", hint: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.hint = hint


@dataclass(frozen=True)
class Identity:
    """How to become a submitter. Hashable: sessions are pooled by it.

    `role_sql`: the submitter as a quoted identifier for SET ROLE, None where the login is the submitter. `login` None:
    the service role as the DSN has it. `parameters`: the submitter's own defaults, which another login would not get.
    """

    oid: int
    name: str
    mode: str
    login: str | None
    password: str | None = field(repr=False)
    role_sql: str | None
    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def user(self) -> str:
        """For messages."""
        return self.name


#: Role defaults as pg_db_role_setting has them, those of the database last. Only what an ordinary session may set.
ROLE = """
SELECT r.rolname, quote_ident(r.rolname) AS role_sql, r.rolsuper, r.rolcanlogin,
       r.rolname = current_user AS is_service,
       x.rolname AS executor, e.password_set,
       (SELECT jsonb_agg(jsonb_build_array(split_part(c.item, '=', 1), substr(c.item, strpos(c.item, '=') + 1))
                         ORDER BY s.setdatabase)
          FROM pg_catalog.pg_db_role_setting s CROSS JOIN LATERAL unnest(s.setconfig) AS c(item)
         WHERE s.setrole = r.oid
           AND s.setdatabase IN (0, (SELECT d.oid FROM pg_catalog.pg_database d
                                      WHERE d.datname = COALESCE($2, current_database())))
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_settings g
                            WHERE g.name = split_part(c.item, '=', 1) AND g.context <> 'user')
       )::text AS settings
  FROM pg_catalog.pg_roles r
  LEFT JOIN duroxide.executors e ON e.role = r.oid
  LEFT JOIN pg_catalog.pg_roles x ON x.oid = e.executor
 WHERE r.oid = $1
"""

#: Settings that would undo what makes a step's session a step's session.
_NEVER = frozenset({"role", "session_authorization"})

SUMMARY = """
SELECT current_user AS service, (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS is_super,
       (SELECT count(*) FROM duroxide.executors e JOIN pg_catalog.pg_roles x ON x.oid = e.executor) AS executors
"""


class Identities:
    """Resolves submitters, and keeps the executors' passwords in step with the secret."""

    def __init__(self, settings: EngineSettings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._secret = settings.secret
        self._cache: dict[tuple[int, str | None], tuple[float, Identity]] = {}
        self._looking: dict[tuple[int, str | None], asyncio.Lock] = {}
        self._password_lock = asyncio.Lock()

    async def resolve(self, oid: int, instance_id: str, database: str | None = None) -> Identity:
        """The identity of a submitter. Raises IdentityError, and what the store's connections raise."""
        key = (oid, database)
        known = self._cache.get(key)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        # One look for all who ask at the same time: a thousand instances of one role may begin at once.
        async with self._looking.setdefault(key, asyncio.Lock()):
            known = self._cache.get(key)
            if known is not None and known[0] > time.monotonic():
                return known[1]
            identity = await self._look_up(oid, instance_id, database)
            if len(self._cache) > 10_000:
                self._cache.clear()
                self._looking.clear()
            self._cache[key] = (time.monotonic() + CACHE, identity)
            return identity

    def known(self, oid: int, database: str | None = None) -> Identity | None:
        """What `resolve` would give without looking; None: it would look."""
        known = self._cache.get((oid, database))
        return known[1] if known is not None and known[0] > time.monotonic() else None

    def forget(self, oid: int) -> None:
        """Makes the next `resolve` ask the catalog (the role was renamed, its executor changed)."""
        for key in [k for k in self._cache if k[0] == oid]:
            del self._cache[key]

    async def _look_up(self, oid: int, instance_id: str, database: str | None) -> Identity:
        rows = await self._store.fetch(ROLE, oid, database)
        if not rows:
            raise IdentityError(f"Instance {instance_id}: submitted_by role no longer exists in pg_roles", "42704")
        row = rows[0]
        name = row["rolname"]
        if row["rolsuper"] and not self._settings.enable_superuser_instances:
            raise IdentityError(
                f"pg_durable blocked instance {instance_id}: submitted_by role \"{name}\" is a superuser, "
                "but pg_durable.enable_superuser_instances is off",
                hint="Submit as an ordinary role, or set enable_superuser_instances in dfproxy's settings.")
        if self._settings.require_login and not row["rolcanlogin"]:
            raise IdentityError(f"Instance {instance_id}: role \"{name}\" does not have LOGIN privilege, "
                                "which the setting require_login asks for")
        settings = {k: v for k, v in json.loads(row["settings"] or "[]") if k not in _NEVER}
        parameters = tuple(sorted(settings.items()))
        if row["is_service"]:
            return Identity(oid, name, "service", None, None, None)
        if row["executor"] is not None:
            executor = row["executor"]
            identity = Identity(oid, name, "executor", executor, await self._password(executor), row["role_sql"],
                                parameters)
            if not row["password_set"]:
                await self._try_set_password(identity)
            return identity
        if self._settings.allow_set_role:
            return Identity(oid, name, "set_role", None, None, row["role_sql"], parameters)
        raise IdentityError(
            f"Instance {instance_id}: role \"{name}\" has no executor login to run steps with; "
            f"an administrator can make one: SELECT df.grant_usage('{name.replace(chr(39), chr(39) * 2)}')",
            "28000", "df.grant_usage creates the login; allow_set_role in dfproxy's settings does without.")

    # -- passwords of executors --------------------------------------------------------------------------------

    async def _password(self, executor: str) -> str:
        if self._secret is None:
            rows = await self._store.fetch("SELECT value FROM duroxide.secret")
            if not rows:
                raise IdentityError("duroxide.secret is empty: executor passwords can't be derived", "55000")
            self._secret = rows[0]["value"]
        return derive_password(self._secret, executor)

    async def _try_set_password(self, identity: Identity) -> None:
        """Sets a password where there seems to be none; where that is refused, a login may work without."""
        try:
            await self.set_password(identity)
        except IdentityError as e:
            log.warning("executor password not set", role=identity.name, executor=identity.login, reason=str(e))

    async def set_password(self, identity: Identity) -> None:
        """Gives an executor the password that derives from the secret, as a SCRAM verifier. Raises IdentityError."""
        if identity.login is None or identity.password is None:
            raise IdentityError("only executors have derived passwords", "55000")
        async with self._password_lock:
            verifier = await asyncio.to_thread(scram_verifier, identity.password)
            try:
                rows = await self._store.fetch("SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)",
                                               identity.login, verifier)
                await self._store.execute(rows[0][0])
                await self._store.execute("UPDATE duroxide.executors SET password_set = true WHERE role = $1::oid",
                                          identity.oid)
            except asyncpg.InsufficientPrivilegeError as e:
                raise IdentityError(
                    f"the service role may not set the password of \"{identity.login}\", the executor login of "
                    f"role \"{identity.name}\": {e.args[0] if e.args else e}",
                    hint="It needs CREATEROLE, and the executor WITH ADMIN OPTION: `dfproxy doctor` says which GRANT "
                         "is missing.") from e

    # -- for start-up ------------------------------------------------------------------------------------------

    async def report(self) -> str:
        """One line for people: how steps get their rights here."""
        row = (await self._store.fetch(SUMMARY))[0]
        parts = [f"steps of {row['service']} run as itself"]
        parts.append(f"{row['executors']} other role(s) through executor logins")
        if self._settings.allow_set_role:
            parts.append("any other role by SET ROLE (no sandbox: a step can undo it)")
        if row["is_super"]:
            parts.append("WARNING: the service role is a superuser")
        return "; ".join(parts)


def derive_password(secret: str, executor: str) -> str:
    """The password of an executor login: HMAC-SHA256 of its name, in hex."""
    return hmac.new(secret.encode(), executor.encode(), hashlib.sha256).hexdigest()


def scram_verifier(password: str) -> str:
    """What pg_authid stores for a password, so that the password itself need not travel."""
    salt, stored_key, server_key, iterations = ScramMechanism("SCRAM-SHA-256").make_auth_info(password, 4096)

    def b64(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    return f"SCRAM-SHA-256${iterations}:{b64(salt)}${b64(stored_key)}:{b64(server_key)}"
