# cython: language_level=3, wraparound=False, cdivision=True
"""The compiled part of proxy/fastpath.py, which says what it is for. Linux only; without it everything goes through
proxy/session.py, which is the reference for what is decided here.

Nothing here parses more than message headers. Every index is checked against the bytes that were received.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy

from cpython.bytes cimport PyBytes_FromStringAndSize


cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    ssize_t send(int fd, const void* buffer, size_t size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int most, int timeout)
    unsigned int EPOLLIN
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char* a, const char* b, size_t n)

ctypedef const unsigned char* Octets

cdef enum:
    BUFFER_SIZE = 262144
    EVENTS = 64
    ROUNDS = 4  #: of looking for more before the event loop has its turn: while there is much to do it saves its wait
    HEADER = 5

cdef enum State:
    CLOSED  #: everything is looked at in Python
    OPEN    #: nothing is on its way, and the next request may go straight on
    BUSY    #: one request has gone straight on, and its reply is to come


# --- what is decided ---

cdef inline unsigned int length_at(Octets p) noexcept nogil:
    """The length word of the header at `p`."""
    return (<unsigned int> p[1] << 24) | (<unsigned int> p[2] << 16) | (<unsigned int> p[3] << 8) | p[4]


cdef int kind_of(Octets p, Py_ssize_t size) noexcept nogil:
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


cdef object bound_alone(Octets p, Py_ssize_t size):
    """As proxy.wire.plain.bound_alone, for what `kind_of` has said S to."""
    cdef Py_ssize_t at = 1 + <Py_ssize_t> length_at(p), name_size
    cdef const void* last
    cdef unsigned int length
    if p[0] != c'B' or at < HEADER + 2 or p[HEADER] != 0:
        return None
    last = memchr(p + HEADER + 1, 0, at - HEADER - 1)
    if last == NULL:
        return None
    name_size = <Octets> last - (p + HEADER + 1)
    while p[at] != c'S':
        length = length_at(p + at)
        if p[at] == c'P' or p[at] == c'B' or p[at] == c'C':
            return None
        # An Execute begins with its portal's name, a Describe with what it is about.
        if p[at] == c'E' and (length < 5 or p[at + HEADER] != 0):
            return None
        if p[at] == c'D' and (length < 6 or p[at + HEADER] != c'P' or p[at + HEADER + 1] != 0):
            return None
        at += 1 + <Py_ssize_t> length
    return PyBytes_FromStringAndSize(<char*> p + HEADER + 1, name_size)


cdef inline bint is_name(unsigned char c) noexcept nogil:
    """Whether a byte may stand in an SQL name."""
    return (c'a' <= (c | 0x20) <= c'z' and c < 0x80) or c'0' <= c <= c'9' or c == c'_' or c == c'$' or c >= 0x80


cdef bint is_suspect(Octets p, Py_ssize_t size) noexcept nogil:
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


cdef int skim(Octets p, Py_ssize_t size, Octets modes, unsigned int most, long long* remaining,
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


def plain_request(bytes data):
    """What `kind_of` and `is_suspect` say, for the tests: the type, and whether it needs a closer look."""
    cdef Octets p = data
    return kind_of(p, len(data)), is_suspect(p, len(data))


def bound(bytes data):
    """What `bound_alone` says, for the tests; of what is no batch, nothing is asked."""
    assert kind_of(<Octets> data, len(data)) == c'S'
    return bound_alone(<Octets> data, len(data))


def skimmed(bytes data, bytes modes, unsigned int most, long long remaining):
    """What `skim` says, for the tests: its result, what remains, and how many bytes are not taken."""
    assert len(modes) == 256
    cdef int tail = 0
    cdef int last = skim(<Octets> data, len(data), <Octets> modes, most, &remaining, &tail)
    return last, remaining, tail


# --- what is done ---

cdef class Board:
    """The descriptors that all sessions of an event loop have lent; `ready` is to be called when `fileno` is readable.

    They are in an epoll set of their own: an event loop that finds an error on a descriptor which it watches for
    somebody else closes its watch and tells nobody.
    """

    cdef int _set
    cdef dict _ends
    #: What was received last. One for all: it is empty again before anything else is received.
    cdef unsigned char* buffer

    def __cinit__(self):
        self._ends = {}
        self._set = -1
        self.buffer = <unsigned char*> malloc(BUFFER_SIZE)
        if self.buffer == NULL:
            raise MemoryError
        self._set = epoll_create1(EPOLL_CLOEXEC)
        if self._set < 0:
            raise OSError(errno, "no epoll set")

    def __dealloc__(self):
        self.close()
        free(self.buffer)

    def fileno(self):
        """The epoll set's descriptor."""
        return self._set

    def close(self):
        """To be called when nothing is lent any more."""
        if self._set >= 0:
            close(self._set)
            self._set = -1

    def ready(self):
        """Serves what has become readable."""
        cdef epoll_event events[EVENTS]
        cdef int count, i, round
        cdef End end
        for round in range(ROUNDS):
            count = epoll_wait(self._set, events, EVENTS, 0)
            for i in range(count):
                # One that is not lent any more may be among them; where its number was lent again, there is nothing to
                # read yet.
                end = self._ends.get(events[i].data.fd)
                if end is None or not end.reading:
                    continue
                try:
                    end.readable()
                except Exception as e:
                    # A bug that one session found must not harm the others.
                    end.leg.failed(e)
            if count < 2:
                break

    cdef watch(self, int fd, bint on):
        cdef epoll_event event
        event.events = EPOLLIN
        event.data.fd = fd
        if epoll_ctl(self._set, EPOLL_CTL_ADD if on else EPOLL_CTL_DEL, fd, &event) < 0:
            raise OSError(errno, "the epoll set refuses a descriptor")


cdef class End:
    """One leg's descriptor, while it is lent: what proxy.relay.Reader says."""

    cdef object leg, pending
    cdef Exchange exchange
    cdef int fd
    cdef bint reading, client

    def start(self, leg, transport, int fd):
        self.leg = leg
        self.pending = transport.get_write_buffer_size
        self.fd = fd
        self.exchange.board._ends[fd] = self

    def resume(self):
        if not self.reading:
            self.exchange.board.watch(self.fd, True)
            self.reading = True

    def pause(self):
        if self.reading:
            self.reading = False
            self.exchange.board.watch(self.fd, False)

    def stop(self):
        self.pause()
        self.exchange.board._ends.pop(self.fd, None)
        self.fd = -1

    cdef readable(self):
        cdef int before = 0 if self.client else self.exchange.put_tail()
        cdef ssize_t size = recv(self.fd, self.exchange.board.buffer + before, BUFFER_SIZE - before, MSG_DONTWAIT)
        if size > 0:
            if self.client:
                self.exchange.request(size)
            else:
                self.exchange.tail_size = 0
                self.exchange.reply(before + size)
        elif size == 0:
            self.leg.recall()  # the transport finds the end of the stream itself
        elif errno != EAGAIN and errno != EINTR:
            self.leg.abort()

    cdef write(self, Py_ssize_t size):
        """Writes what was received by the other end, after what the transport has still to write."""
        cdef ssize_t sent = 0
        cdef unsigned char* buffer = self.exchange.board.buffer
        if self.fd >= 0 and self.pending() == 0:
            sent = send(self.fd, buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent == size:
                return
            if sent < 0:
                sent = 0  # no room, or an error that the transport finds, too
        self.leg.send(PyBytes_FromStringAndSize(<char*> buffer + sent, size - sent))


cdef class Exchange:
    """A session's two ends, and where its conversation stands.

    `modes` are those of the FrameSplitter for replies to plain requests, `most` the longest message, `limit` the
    longest request that is looked at here (bytes). `on_request` and `on_reply` get what is to be looked at in Python;
    `on_done` the transaction status at the end of a plain reply, where it has changed or `open` was told to say it, and
    what was remembered of the statement. `statements` and `portals` are what the session remembers, by name: a batch
    about one of them alone goes straight on, too, and `on_bound` gets what the unnamed portal is from then on.
    """

    cdef readonly End client, server
    cdef Board board
    cdef bytes modes
    cdef unsigned int most
    cdef Py_ssize_t limit
    cdef dict statements, portals
    cdef object on_request, on_reply, on_bound, on_done
    cdef object statement  # of the request that is on its way; None: nothing was remembered of it
    cdef State state
    cdef int kind, status
    cdef bint told
    cdef long long _remaining
    cdef unsigned char tail_bytes[HEADER]
    cdef int tail_size

    def __init__(self, Board board, bytes modes, unsigned int most, Py_ssize_t limit, dict statements not None,
                 dict portals not None, on_request, on_reply, on_bound, on_done):
        if len(modes) != 256:
            raise ValueError("a mode for each type byte")
        self.board, self.modes, self.most, self.limit = board, modes, most + 4, limit
        self.statements, self.portals = statements, portals
        self.on_request, self.on_reply, self.on_bound, self.on_done = on_request, on_reply, on_bound, on_done
        self.state = CLOSED
        self.client, self.server = End(), End()
        self.client.exchange = self.server.exchange = self
        self.client.client = True

    def open(self, int status, bint told):
        """Nothing is on its way: the next request may go straight on."""
        self.state, self.status, self.told = OPEN, status, told

    def leave(self):
        """From now on everything is looked at in Python.

        Returns the type of the request that is on its way, or 0, and what was remembered of its statement.
        """
        cdef bint busy = self.state == BUSY
        cdef object statement = self.statement
        self.state, self.statement = CLOSED, None
        return self.kind if busy else 0, statement

    @property
    def remaining(self):
        """Payload bytes to come of a message of the reply, of which a part has gone on."""
        return self._remaining

    def take_tail(self):
        """The bytes of a header of the reply of which the rest is to come; they have not gone on."""
        cdef bytes taken = PyBytes_FromStringAndSize(<char*> self.tail_bytes, self.tail_size)
        self.tail_size = 0
        return taken

    cdef int put_tail(self) noexcept:
        """Puts those bytes before what is to be received next, and returns their number."""
        memcpy(self.board.buffer, self.tail_bytes, self.tail_size)
        return self.tail_size

    cdef request(self, Py_ssize_t size):
        cdef unsigned char* buffer = self.board.buffer
        if self.state == OPEN and size <= self.limit:
            self.kind = kind_of(buffer, size)
            if self.kind and not is_suspect(buffer, size) and self.known(size):
                self.state = BUSY
                self._remaining = 0
                self.server.write(size)
                return
        self.on_request(PyBytes_FromStringAndSize(<char*> buffer, size))

    cdef bint known(self, Py_ssize_t size) except -1:
        """Whether it is known what this request is about; no, where it is about more than one statement."""
        cdef object name
        self.statement = None
        if self.kind == c'S' and (len(self.statements) or len(self.portals)):
            name = bound_alone(self.board.buffer, size)
            if name is None:
                return False
            self.statement = self.statements.get(name)
            if self.statement is not self.portals.get(b""):
                self.on_bound(self.statement)
        return True

    cdef reply(self, Py_ssize_t size):
        cdef int last, status, tail = 0
        cdef object statement
        cdef unsigned char* buffer = self.board.buffer
        if self.state == BUSY:
            last = skim(buffer, size, <Octets> self.modes, self.most, &self._remaining, &tail)
            if last >= 0:
                status = buffer[size - 1]
                if tail:
                    memcpy(self.tail_bytes, buffer + size - tail, tail)
                    self.tail_size = tail
                if size > tail:
                    self.client.write(size - tail)
                if last and self.state == BUSY:
                    self.state = OPEN
                    if self.told or status != self.status:
                        statement, self.statement = self.statement, None
                        self.status = status
                        self.on_done(status, statement)
                return
        self.on_reply(PyBytes_FromStringAndSize(<char*> buffer, size))
