"""Secret variables: sealed by the server that stores them, opened by the worker that builds a request.

`df.setvar(name, value, secret => true)` seals the value in SQL (engine/schema/0010_secrets.sql) before anything is
stored: RSA-OAEP with SHA-256 under a public key, bound to the owner and the name by OAEP's label. The private key lies
in the same database, but encrypted (AES-256-GCM) under a key that derives from dfproxy's secret. What that protects
against, and what not: docs/decisions/0004-secret-variables.md.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import asyncpg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from engine.http.variables import SEAL, SealError

_BITS = 3072
_NONCE = 12
#: Serialises those who make a key. An arbitrary number of our own.
_LOCK = 0x6466_7072_6F78_7910

_NEWEST = "SELECT id, private FROM duroxide.secret_keys ORDER BY created_at DESC"


def _cipher(secret: str) -> AESGCM:
    derive = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"dfproxy: key of secret variables")
    return AESGCM(derive.derive(secret.encode()))


def _new_key(secret: str, key_id: str) -> tuple[str, bytes]:
    """The modulus in hex, and the private key as it is stored."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=_BITS)
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8,
                            serialization.NoEncryption())
    nonce = os.urandom(_NONCE)
    return f"{key.public_key().public_numbers().n:x}", nonce + _cipher(secret).encrypt(nonce, der, key_id.encode())


def _open_key(secret: str, key_id: str, stored: bytes) -> rsa.RSAPrivateKey | None:
    """None: it was stored under another secret."""
    try:
        der = _cipher(secret).decrypt(stored[:_NONCE], stored[_NONCE:], key_id.encode())
    except InvalidTag:
        return None
    key = serialization.load_der_private_key(der, password=None)
    return key if isinstance(key, rsa.RSAPrivateKey) else None


async def ensure_key(connection: asyncpg.Connection[Any], secret: str | None) -> None:
    """Makes sure that values can be sealed so that who has `secret` (None: the database's own) can open them.

    Raises what asyncpg raises.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_catalog.pg_advisory_xact_lock($1)", _LOCK)
        secret = secret or await connection.fetchval("SELECT value FROM duroxide.secret")
        newest = await connection.fetchrow(_NEWEST + " LIMIT 1")
        if newest is not None and _open_key(secret, newest["id"], newest["private"]) is not None:
            return
        key_id = os.urandom(4).hex()
        modulus, private = await asyncio.to_thread(_new_key, secret, key_id)
        await connection.execute("INSERT INTO duroxide.secret_keys (id, modulus, private) VALUES ($1, $2, $3)",
                                 key_id, modulus, private)


class Opener:
    """Opens sealed values. `fetch` asks the database as the service role."""

    def __init__(self, fetch: Any, secret: str | None) -> None:
        self._fetch = fetch
        self._secret = secret
        self._keys: dict[str, rsa.RSAPrivateKey] = {}

    async def open(self, value: str, *, owner: str, name: str) -> str:
        """The plain value of the variable `name` of role `owner`. Raises SealError, and what `fetch` raises."""
        key_id, _, rest = value.removeprefix(SEAL).partition(":")
        seal_id, *blocks = rest.split(":")
        key = await self._key(key_id)
        if key is None or not blocks:
            raise SealError(f"secret variable '{name}' was sealed for another installation or secret of dfproxy; "
                            "set it again")
        try:
            return await asyncio.to_thread(_open, key, seal_id, blocks, owner, name)
        except ValueError:
            raise SealError(f"secret variable '{name}' can't be opened; set it again") from None

    async def _key(self, key_id: str) -> rsa.RSAPrivateKey | None:
        if key_id not in self._keys:
            if self._secret is None:
                self._secret = (await self._fetch("SELECT value FROM duroxide.secret"))[0]["value"]
            for row in await self._fetch("SELECT id, private FROM duroxide.secret_keys WHERE id = $1", key_id):
                key = await asyncio.to_thread(_open_key, self._secret, row["id"], row["private"])
                if key is not None:
                    self._keys[key_id] = key
        return self._keys.get(key_id)


def _open(key: rsa.RSAPrivateKey, seal_id: str, blocks: list[str], owner: str, name: str) -> str:
    """Raises ValueError."""
    plain = b""
    for n, block in enumerate(blocks):
        # As duroxide.seal has it: owner and name last, each behind its length.
        label = "".join(f"{len(part.encode())}:{part}," for part in (seal_id, f"{n + 1}/{len(blocks)}", owner, name))
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label.encode())
        plain += key.decrypt(bytes.fromhex(block), oaep)
    return plain.decode("utf-8")
