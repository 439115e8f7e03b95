"""Names of the PostgreSQL protocol: message types with their direction, versions, request and authentication codes.

A message type is the byte that starts a message; the same byte may mean one thing from the client and another from the
server (`D` is Describe and DataRow), hence two enumerations. "Message Formats" in the protocol chapter of PostgreSQL's
documentation lists them all.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final


class Direction(Enum):
    """Who sends a message: the client (frontend), the server (backend), or either."""

    FRONTEND = "F"
    BACKEND = "B"
    BOTH = "F & B"


class Frontend(IntEnum):
    """Message types that a client sends."""

    BIND = ord("B")
    CLOSE = ord("C")
    COPY_DATA = ord("d")
    COPY_DONE = ord("c")
    COPY_FAIL = ord("f")
    DESCRIBE = ord("D")
    EXECUTE = ord("E")
    FLUSH = ord("H")
    FUNCTION_CALL = ord("F")
    PARSE = ord("P")
    #: PasswordMessage, SASLInitialResponse, SASLResponse and GSSResponse share one type; the context tells which it is.
    PASSWORD = ord("p")
    QUERY = ord("Q")
    SYNC = ord("S")
    TERMINATE = ord("X")

    @property
    def direction(self) -> Direction:
        return _direction(self, Direction.FRONTEND)


class Backend(IntEnum):
    """Message types that a server sends."""

    AUTHENTICATION = ord("R")
    BACKEND_KEY_DATA = ord("K")
    BIND_COMPLETE = ord("2")
    CLOSE_COMPLETE = ord("3")
    COMMAND_COMPLETE = ord("C")
    COPY_DATA = ord("d")
    COPY_DONE = ord("c")
    COPY_IN_RESPONSE = ord("G")
    COPY_OUT_RESPONSE = ord("H")
    COPY_BOTH_RESPONSE = ord("W")
    DATA_ROW = ord("D")
    EMPTY_QUERY_RESPONSE = ord("I")
    ERROR_RESPONSE = ord("E")
    FUNCTION_CALL_RESPONSE = ord("V")
    NEGOTIATE_PROTOCOL_VERSION = ord("v")
    NO_DATA = ord("n")
    NOTICE_RESPONSE = ord("N")
    NOTIFICATION_RESPONSE = ord("A")
    PARAMETER_DESCRIPTION = ord("t")
    PARAMETER_STATUS = ord("S")
    PARSE_COMPLETE = ord("1")
    PORTAL_SUSPENDED = ord("s")
    READY_FOR_QUERY = ord("Z")
    ROW_DESCRIPTION = ord("T")

    @property
    def direction(self) -> Direction:
        return _direction(self, Direction.BACKEND)


def _direction(message: Frontend | Backend, otherwise: Direction) -> Direction:
    return Direction.BOTH if message.name in ("COPY_DATA", "COPY_DONE") else otherwise


class Authentication(IntEnum):
    """The code that starts the payload of an Authentication message."""

    OK = 0
    KERBEROS_V5 = 2
    CLEARTEXT_PASSWORD = 3
    MD5_PASSWORD = 5
    GSS = 7
    GSS_CONTINUE = 8
    SSPI = 9
    SASL = 10
    SASL_CONTINUE = 11
    SASL_FINAL = 12


class TransactionStatus(IntEnum):
    """The payload of ReadyForQuery."""

    IDLE = ord("I")
    IN_TRANSACTION = ord("T")
    FAILED = ord("E")


def protocol(major: int, minor: int) -> int:
    """A protocol version as the startup packet carries it."""
    return major << 16 | minor


PROTOCOL_3_0: Final = protocol(3, 0)
PROTOCOL_3_2: Final = protocol(3, 2)

# Requests that take the version's place in the first packet of a connection.
CANCEL_REQUEST: Final = protocol(1234, 5678)
SSL_REQUEST: Final = protocol(1234, 5679)
GSSENC_REQUEST: Final = protocol(1234, 5680)
#: The major "version" of all such requests.
REQUEST_MAJOR: Final = 1234

#: First byte of a TLS handshake record: a client that starts TLS without asking (sslnegotiation=direct).
TLS_HANDSHAKE: Final = 0x16

# One-byte answers to SSLRequest and GSSENCRequest.
ANSWER_SSL: Final = b"S"
ANSWER_GSS: Final = b"G"
ANSWER_NO: Final = b"N"

# SASL mechanisms that PostgreSQL knows.
SCRAM_SHA_256: Final = "SCRAM-SHA-256"
SCRAM_SHA_256_PLUS: Final = "SCRAM-SHA-256-PLUS"

#: Largest startup packet a server accepts (MAX_STARTUP_PACKET_LENGTH), in bytes with the length word.
MAX_STARTUP_PACKET: Final = 10_000
#: Largest message a server accepts before authentication (PG_MAX_AUTH_TOKEN_LENGTH), payload bytes.
MAX_AUTH_MESSAGE: Final = 65_535
#: Largest message that PostgreSQL builds or accepts (MaxAllocSize), payload bytes.
MAX_MESSAGE: Final = 0x3FFFFFFF
