"""psycopg 3: its C implementation and the one in Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.drivers import psycopg_checks
from tests.drivers.conftest import Endpoint


@pytest.mark.parametrize("implementation", ["binary", "python"])
def test_psycopg(endpoint: Endpoint, implementation: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.drivers.psycopg_checks", endpoint.uri], capture_output=True, text=True, timeout=100,
        check=False, cwd=Path(__file__).parents[2], env={**os.environ, "PSYCOPG_IMPL": implementation},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == implementation
    assert sum(line.startswith("passed") for line in lines) == len(psycopg_checks.CHECKS)


def test_workflow_pieces_as_parameters(endpoint: Endpoint) -> None:
    """With operators through the proxy, with functions directly."""
    text = "SELECT df.start(%s ~> %s |=> 'x', %s)" if endpoint.proxied else "SELECT df.start(df.as(df.seq(%s, %s), 'x'), %s)"
    with psycopg.connect(endpoint.uri, autocommit=True, prepare_threshold=2) as c:
        ids = {c.execute(text, (f"SELECT {n}", "SELECT 2", f"label {n}")).fetchone() for n in range(6)}
        assert len(ids) == 6
        with c.pipeline():
            cursors = [c.execute(text, (f"SELECT {n}", "SELECT 2", None)) for n in range(20)]
            assert len({cursor.fetchone() for cursor in cursors}) == 20
