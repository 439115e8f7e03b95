"""Variables of an instance, of which some may be sealed (engine/http/secrets.py opens them)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsl.substitute import SubstitutionError

#: What a sealed value begins with. A client may write such a text by hand; it opens only for whom it was sealed.
SEAL = "dfproxy-sealed:1:"


class SealError(SubstitutionError):
    """A sealed value can't be opened, or was used where it may not be; the text is the error of the node."""


def is_sealed(value: str) -> bool:
    """Whether a variable's value is a sealed one."""
    return value.startswith(SEAL)


class PlainVariables(Mapping[str, str]):
    """Variables for everything but HTTP requests: to use a secret one is an error."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __getitem__(self, name: str) -> str:
        value = self._variables[name]
        if is_sealed(value):
            raise SealError(f"variable '{name}' is secret: it can be used in the url, headers, body and parts of "
                            "df.http and df.http_multipart, not in SQL")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)
