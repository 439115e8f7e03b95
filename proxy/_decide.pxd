# cython: language_level=3, wraparound=False, cdivision=True
"""What the compiled fast path decides about bytes, on any thread and without the interpreter (proxy/_fastpath.pyx).

Nothing here parses more than message headers. Every index is checked against the bytes that were received.
"""

ctypedef const unsigned char* Octets

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char* a, const char* b, size_t n)

cdef enum:
    HEADER = 5


cdef inline unsigned int length_at(Octets p) noexcept nogil:
    """The length word of the header at `p`."""
    return (<unsigned int> p[1] << 24) | (<unsigned int> p[2] << 16) | (<unsigned int> p[3] << 8) | p[4]


cdef inline int kind_of(Octets p, Py_ssize_t size) noexcept nogil:
    """As proxy.wire.plain.plain_request: Q, S (of a batch), or 0."""
    cdef Py_ssize_t at = 0
    cdef unsigned int length
    cdef unsigned char type_
    if size < HEADER:
        return 0
    if p[0] == c'Q':
        return c'Q' if length_at(p) == <size_t> (size - 1) else 0
    while size - at >= HEADER:
        type_, length = p[at], length_at(p + at)
        if length < 4 or length > <size_t> (size - at - 1):
            return 0
        at += 1 + <Py_ssize_t> length
        if type_ == c'S':
            return c'S' if at == size else 0
        if not (type_ == c'P' or type_ == c'B' or type_ == c'D' or type_ == c'E' or type_ == c'C' or type_ == c'H'):
            return 0
    return 0


cdef inline bint is_name(unsigned char c) noexcept nogil:
    """Whether a byte may stand in an SQL name."""
    return (c'a' <= (c | 0x20) <= c'z' and c < 0x80) or c'0' <= c <= c'9' or c == c'_' or c == c'$' or c >= 0x80


cdef inline bint is_suspect(Octets p, Py_ssize_t size) noexcept nogil:
    """Whether dsl.compiler.mentions_dsl may say yes to a text in these messages. No is final.

    A text's first byte has a header or a zero byte before it. The header of a Query could look like a name's end.
    """
    cdef Py_ssize_t i
    cdef unsigned char c, before, after
    for i in range(HEADER, size):
        c = p[i]
        if c == c'>':
            before = p[i - 1]
            if before == c'~' or before == c'?' or before == c'!' or before == c'@':
                return True
            if before == c'=' and p[i - 2] == c'|':
                return True
        elif c == c'f' or c == c'F':
            if i > HEADER and (p[i - 1] | 0x20) == c'd' and i + 1 < size:
                after = p[i + 1]
                if (after == c'.' or after == c'"' or after == c' ' or 9 <= after <= 13) and (
                        i - 1 == HEADER or not is_name(p[i - 2])):
                    return True
        elif c == c'_':
            if i + 8 <= size and i >= HEADER + 2 and strncasecmp(<const char*> p + i - 2, b"pg_durable", 10) == 0:
                return True
    return False


cdef inline int skim(Octets p, Py_ssize_t size, Octets modes, unsigned int most, long long* remaining,
                     int* tail) noexcept nogil:
    """As proxy.wire.frames.FrameSplitter.skim with ReadyForQuery as the last message: 0, Z, or -1.

    But for a header of which only a part is there: those bytes, whose number is `tail`, are not taken.
    """
    cdef long long at = remaining[0]
    cdef unsigned int length
    while size - at >= HEADER:
        length = length_at(p + at)
        if length < 4 or length > most:
            return -1
        if modes[p[at]]:
            if p[at] != c'Z' or at + 1 + length != size:
                return -1
            remaining[0] = tail[0] = 0
            return c'Z'
        at += 1 + <long long> length
    tail[0] = <int> (size - at) if at < size else 0
    remaining[0] = at - size if at > size else 0
    return 0
