"""An HTTP call as a step of a workflow: may the submitter, what exactly is asked, that it began, what came of it.

At least once: the `started` checkpoint is written before the call, the result after it. A worker that is lost in
between is followed by one that calls again, with the same `Idempotency-Key`. Writing `started` also proves the lease,
so that a worker which was replaced makes no call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog
from msgspec.structs import replace

from dsl.graph import GraphError, Node, NodeType
from dsl.substitute import SubstitutionError
from engine.http.client import THREAD_SIZE, HttpClient
from engine.http.errors import BLOCKED, INVALID, HttpError
from engine.http.masking import Mask
from engine.http.request import Call
from engine.http.secrets import Opener
from engine.http.template import Filled, fill, mentioned, size
from engine.http.url import redact
from engine.http.variables import is_sealed
from engine.identity import Identities, IdentityError
from engine.model import Inputs, StepError
from engine.runner import Committed, Failed, Job, Outcome, back_off
from engine.settings import EngineSettings
from engine.store import Store, is_infrastructure

log = structlog.get_logger("dfproxy.engine")

#: By OID: names that need quoting are no trouble, and a renamed role keeps what it has.
PRIVILEGE = """
SELECT r.rolname AS name, quote_ident(r.rolname) AS quoted,
       has_function_privilege(r.oid, $2, 'EXECUTE') AS may
  FROM pg_catalog.pg_roles r WHERE r.oid = $1
"""
_SIGNATURES = {
    NodeType.HTTP: ("df.http", "text,text,text,jsonb,integer", "HTTP requests"),
    NodeType.HTTP_MULTIPART: ("df.http_multipart", "text,text,jsonb,jsonb,integer", "multipart HTTP requests"),
}


def idempotency_key(job: Job) -> str:
    """The same for every attempt of a step, different for each round of a loop."""
    execution, _ = job.step.key
    return f"{job.instance_id}-{job.step.node.id}-{execution.strip('/').replace('/', '.') or '1'}"


def _template_url(node: Node) -> str:
    try:
        return redact(node.http["url"])
    except GraphError:
        return ""


class HttpRunner:
    """Runs the HTTP steps of one worker."""

    def __init__(self, settings: EngineSettings, store: Store, identities: Identities, client: HttpClient) -> None:
        self._settings = settings
        self._store = store
        self._identities = identities
        self._client = client
        self._opener = Opener(store.fetch, settings.secret)

    async def run(self, job: Job) -> Outcome:
        """Runs a step to an outcome. Raises only LeaseLostError (from `record_started`), CancelledError, and bugs."""
        started = self._store.clock.now()
        attempt = 0
        while True:
            try:
                return await self._attempt(job)
            except HttpError as e:
                return Failed(started, e.step_error)
            except IdentityError as e:
                return Failed(started, StepError(str(e), e.sqlstate, None, e.hint))
            except (SubstitutionError, GraphError) as e:
                return Failed(started, StepError(str(e), INVALID))
            except Exception as e:
                if not is_infrastructure(e):
                    raise
                attempt += 1
                log.warning("step will be tried again", instance=job.instance_id, node=job.step.node.id,
                            attempt=attempt, reason=str(e) or type(e).__name__)
                await asyncio.sleep(back_off(self._settings, attempt))

    async def _attempt(self, job: Job) -> Outcome:
        # What the client raises is an HttpError; faults of the database are seen by `run`, before any call is made.
        node = replace(job.step.node, type=job.step.kind, query=job.step.text)
        submitter = await self._check_privilege(job, node)
        inputs, secrets = await self._open(node, job.step.inputs, submitter)
        mask = Mask(secrets.values())
        with mask:
            filled = await self._fill(node, inputs, secrets)
        try:
            call = await self._client.prepare(
                filled.config, multipart=node.type is NodeType.HTTP_MULTIPART, idempotency_key=idempotency_key(job),
                hidden=filled.hidden, shown=filled.shown, mask=mask)
        except HttpError as e:
            shown = redact(filled.config["url"], filled.hidden) if filled.shown is None else filled.shown
            self._say_refusal(job, submitter, e, shown)
            raise
        async with self._client.slot(call) as waited:
            if waited:
                await self._check_privilege(job, node)  # that may have been long
            return await self._call(job, call, submitter)

    async def _fill(self, node: Node, inputs: Inputs | None, secrets: Mapping[str, str]) -> Filled:
        if inputs is None:
            return fill(node, None)
        results = sum(len(result.text) for result in inputs.results.values())
        if max(results, size(node.http)) > THREAD_SIZE:
            return await asyncio.to_thread(fill, node, inputs, secrets)
        return fill(node, inputs, secrets)

    async def _call(self, job: Job, call: Call, submitter: str) -> Outcome:
        started = self._store.clock.now()
        await job.record_started(started)
        log.info("HTTP call", instance=job.instance_id, node=job.step.node.id, role=submitter,
                 method=call.request.method, url=call.shown)
        try:
            text = await self._client.perform(call)
        except HttpError as e:
            self._say_refusal(job, submitter, e, call.shown)
            return Failed(started, e.step_error)
        return Committed(started, text, None, meta={"at_least_once": True})

    async def _check_privilege(self, job: Job, node: Node) -> str:
        """The submitter's name. Raises HttpError where it may not call the function now (SURFACE 8.5, gate 0)."""
        function, arguments, what = _SIGNATURES[node.type]
        rows = await self._store.fetch(PRIVILEGE, job.submitted_by, f"{function}({arguments})")
        if not rows:
            raise IdentityError(f"Instance {job.instance_id}: submitted_by role no longer exists in pg_roles", "42704")
        name: str = rows[0]["name"]
        if not rows[0]["may"]:
            quoted = rows[0]["quoted"]
            error = HttpError(
                f"Blocked: role '{name}' does not have EXECUTE privilege on {function}(). Grant EXECUTE ON FUNCTION "
                f"{function}({arguments}) TO {quoted} to allow {what}.", BLOCKED)
            self._say_refusal(job, name, error, _template_url(node))
            raise error
        return name

    async def _open(self, node: Node, inputs: Inputs | None, submitter: str) -> tuple[Inputs | None, dict[str, str]]:
        """The inputs without secret variables; and those of them opened that the config mentions."""
        if inputs is None:
            return None, {}
        sealed = {n: v for n, v in inputs.variables.items() if is_sealed(v)}
        if not sealed:
            return inputs, {}
        variables = {n: v for n, v in inputs.variables.items() if n not in sealed}
        secrets = {name: await self._opener.open(sealed[name], owner=submitter, name=name)
                   for name in sorted(mentioned(node.http) & sealed.keys())}
        return replace(inputs, variables=variables), secrets

    def _say_refusal(self, job: Job, submitter: str, error: HttpError, url: str) -> None:
        if error.sqlstate == BLOCKED:
            log.warning("HTTP call refused", instance=job.instance_id, node=job.step.node.id, role=submitter, url=url,
                        reason=str(error))
