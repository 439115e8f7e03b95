"""The wire protocol, the relay, the server and the command line."""

from importlib.metadata import version

__version__ = version("dfproxy")
