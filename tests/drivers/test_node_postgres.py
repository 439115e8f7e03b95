"""node-postgres with pg-cursor and pg-copy-streams.

Downloads them with npm, so it runs only when asked for: `pytest -m slow tests/drivers` (conftest.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.drivers.conftest import Endpoint

HERE = Path(__file__).parent / "node"


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that package.json names."""
    npm = shutil.which("npm")
    assert npm is not None, "node-postgres needs node and npm"
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "checks.js"):
        shutil.copy(HERE / name, folder)
    done = subprocess.run([npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"],
                          cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_node_postgres(endpoint: Endpoint, modules: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    done = subprocess.run(["node", "checks.js", endpoint.uri, "proxied" if endpoint.proxied else "direct"],
                          cwd=modules, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    assert f"all {sum(line.startswith('passed') for line in lines)}" in lines
