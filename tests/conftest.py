"""Fixtures live in `fix_*.py` modules; this file only names them."""

pytest_plugins = ["tests.fix_postgres", "tests.fix_certificates", "tests.e2e.fix_dfproxy", "tests.engine.fix_surface"]
