# cython: language_level=3, wraparound=False, cdivision=True
"""The compiled part of proxy/fastpath.py, which says what it is for. Linux only; without it everything goes through
proxy/session.py, which is the reference for what is decided here (proxy/_decide.pxd).

A session's two connections are served here on the event loop, and when nothing but plain requests has passed for a while,
by a thread of their own (proxy/_thread.pxd), which gives them back as soon as anything else comes.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr

from cpython.bytes cimport PyBytes_FromStringAndSize

import threading

from proxy._decide cimport HEADER, Octets, is_suspect, kind_of, length_at, skim
from proxy._thread cimport (
    BROKEN, BUFFER_SIZE, BUSY, CLOSED, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EVENTS, LOOP,
    MSG_DONTWAIT, MSG_NOSIGNAL, NOTHING, OPEN, REPLY, REQUEST, THREAD, TO_CLIENT, TO_SERVER,
    Left, Link, Relayer, close, close_relayer, epoll_create1, epoll_ctl, epoll_event, epoll_wait, follow, give, may_pass,
    open_relayer, passed, pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock, put_tail, read, recv, relay,
    ring, send, take,
)

cdef enum:
    ROUNDS = 4  #: of looking for more before the event loop has its turn: while there is much to do it saves its wait


# --- what is decided ---

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
    somebody else closes its watch and tells nobody. Those that the thread has are in another. It gets a session after
    `calm` plain requests that came after each other.
    """

    cdef int _set
    cdef dict _ends
    #: What was received last. One for all: it is empty again before anything else is received.
    cdef unsigned char* buffer
    cdef Relayer relayer
    cdef object _thread
    cdef int calm

    def __cinit__(self, int calm):
        cdef int error = open_relayer(&self.relayer)
        self.calm = calm
        self._ends = {}
        self._set = epoll_create1(EPOLL_CLOEXEC)
        self.buffer = <unsigned char*> malloc(BUFFER_SIZE)
        if error or self._set < 0:
            raise OSError(error or errno, "no descriptors for the fast path")
        if self.buffer == NULL:
            raise MemoryError
        self.watch(self.relayer.bell, True)
        self._thread = threading.Thread(target=self._relay, name="dfproxy-relay", daemon=True)
        self._thread.start()

    def __dealloc__(self):
        free(self.buffer)
        close_relayer(&self.relayer)
        if self._set >= 0:
            close(self._set)

    def fileno(self):
        """The epoll set's descriptor."""
        return self._set

    def _relay(self):
        with nogil:
            relay(&self.relayer)

    def close(self):
        """Ends the thread. To be called when nothing is lent any more."""
        ring(self.relayer.end)
        self._thread.join()

    def ready(self):
        """Serves what has become readable."""
        cdef epoll_event events[EVENTS]
        cdef int count, i, round
        cdef End end
        for round in range(ROUNDS):
            count = epoll_wait(self._set, events, EVENTS, 0)
            for i in range(count):
                if events[i].data.fd == self.relayer.bell:
                    self.collect()
                    continue
                # One that is not lent any more may be among them, or has just been given to the thread; where its
                # number was lent again, there is nothing to read yet.
                end = self._ends.get(events[i].data.fd)
                if end is None or not end.reading or end.exchange.away:
                    continue
                try:
                    end.readable()
                except Exception as e:
                    # A bug that one session found must not harm the others.
                    end.leg.failed(e)
            if count < 2:
                break

    cdef collect(self):
        """Takes back what the thread has returned."""
        cdef uint64_t rung
        cdef Link* link
        cdef Exchange exchange
        read(self.relayer.bell, &rung, sizeof(rung))
        while True:
            self.lock()
            link = self.relayer.first
            if link != NULL:
                take(&self.relayer, link)
            self.unlock()
            if link == NULL:
                return
            exchange = <Exchange> link.exchange
            try:
                exchange.returned()
                exchange.go_on()
            except Exception as e:
                exchange.client.leg.failed(e)

    cdef void lock(self):
        if pthread_mutex_trylock(&self.relayer.lock):
            with nogil:
                pthread_mutex_lock(&self.relayer.lock)

    cdef void unlock(self):
        pthread_mutex_unlock(&self.relayer.lock)

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
        if self.client:
            self.exchange.link.client = fd
        else:
            self.exchange.link.server = fd
        self.exchange.board._ends[fd] = self

    def resume(self):
        self.exchange.take_back()
        if not self.reading:
            self.exchange.board.watch(self.fd, True)
            self.reading = True

    def pause(self):
        self.exchange.take_back()
        if self.reading:
            self.reading = False
            self.exchange.board.watch(self.fd, False)

    def stop(self):
        self.pause()
        self.exchange.board._ends.pop(self.fd, None)
        self.fd = -1

    cdef readable(self):
        cdef Link* link = &self.exchange.link
        cdef int before = 0 if self.client else put_tail(link, self.exchange.board.buffer)
        cdef ssize_t size = recv(self.fd, self.exchange.board.buffer + before, BUFFER_SIZE - before, MSG_DONTWAIT)
        if size > 0:
            if self.client:
                self.exchange.request(size)
            else:
                link.tail_size = 0
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

    The thread has it only while `on_done` need not be told, which includes that nothing is remembered.
    """

    cdef readonly End client, server
    cdef Board board
    cdef bytes modes
    cdef dict statements, portals
    cdef object on_request, on_reply, on_bound, on_done
    cdef object statement  # of the request that is on its way; None: nothing was remembered of it
    cdef bint away  # given to the thread, and not taken back: the event loop's own note, which needs no lock
    cdef bint told
    cdef int calm  # plain replies after each other
    cdef Link link

    def __init__(self, Board board, bytes modes, unsigned int most, Py_ssize_t limit, dict statements not None,
                 dict portals not None, on_request, on_reply, on_bound, on_done):
        if len(modes) != 256:
            raise ValueError("a mode for each type byte")
        self.board, self.modes = board, modes
        self.statements, self.portals = statements, portals
        self.on_request, self.on_reply, self.on_bound, self.on_done = on_request, on_reply, on_bound, on_done
        self.link.client = self.link.server = -1
        self.link.owner, self.link.state, self.link.left = LOOP, CLOSED, NOTHING
        self.link.modes, self.link.most, self.link.limit = <Octets> modes, most + 4, limit
        self.link.exchange = <void*> self
        self.client, self.server = End(), End()
        self.client.exchange = self.server.exchange = self
        self.client.client = True

    def __dealloc__(self):
        free(self.link.data)  # its ends were stopped, or they would still be on the board

    def open(self, int status, bint told):
        """Nothing is on its way: the next request may go straight on."""
        self.link.state, self.link.status, self.told = OPEN, status, told

    def leave(self):
        """From now on everything is looked at in Python.

        Returns the type of the request that is on its way, or 0, what was remembered of its statement, and the last
        transaction status; None where that is the case already.
        """
        self.take_back()
        cdef bint busy = self.link.state == BUSY
        cdef object statement = self.statement
        if self.link.state == CLOSED:
            return None
        self.link.state, self.statement, self.calm = CLOSED, None, 0
        return self.link.kind if busy else 0, statement, self.link.status

    @property
    def given(self):
        """Whether the thread has it, and has not returned it either."""
        self.board.lock()
        cdef bint given = self.link.owner == THREAD
        self.board.unlock()
        return given

    @property
    def remaining(self):
        """Payload bytes to come of a message of the reply, of which a part has gone on."""
        return self.link.remaining

    def take_tail(self):
        """The bytes of a header of the reply of which the rest is to come; they have not gone on."""
        cdef bytes taken = PyBytes_FromStringAndSize(<char*> self.link.tail, self.link.tail_size)
        self.link.tail_size = 0
        return taken

    def go_on(self):
        """Does what the thread has left to do, if any: it has read something that is to be looked at in Python."""
        cdef Left left = self.link.left
        if left == REQUEST:
            self.on_request(self.take_data())
        elif left == REPLY:
            self.on_reply(self.take_data())
        elif left == BROKEN:
            self.link.left = NOTHING
            self.client.leg.abort()
            self.server.leg.abort()

    cdef bytes take_data(self):
        cdef bytes data = PyBytes_FromStringAndSize(<char*> self.link.data, self.link.size)
        free(self.link.data)
        self.link.data, self.link.size, self.link.left = NULL, 0, NOTHING
        return data

    cdef take_back(self):
        """Has the event loop serve it from now on."""
        if not self.away:
            return
        self.board.lock()
        take(&self.board.relayer, &self.link)
        self.board.unlock()
        self.returned()

    cdef returned(self):
        """The thread does not have it any more; what it had no room for is written before anything else."""
        cdef End end
        cdef Left left = self.link.left
        self.away = False
        for end in (self.client, self.server):
            if end.reading:
                self.board.watch(end.fd, True)
        if left == TO_SERVER:
            self.server.leg.send(self.take_data())
        elif left == TO_CLIENT:
            self.client.leg.send(self.take_data())

    cdef give_away(self):
        """Has the thread serve it from now on, if all that was written has gone."""
        cdef End end
        if (self.told or not self.client.reading or not self.server.reading or self.client.pending()
                or self.server.pending()):
            return
        for end in (self.client, self.server):
            self.board.watch(end.fd, False)
        self.board.lock()
        self.away = give(&self.board.relayer, &self.link)
        self.board.unlock()
        if not self.away:
            self.calm = 0
            self.returned()

    cdef request(self, Py_ssize_t size):
        cdef unsigned char* buffer = self.board.buffer
        if may_pass(&self.link, buffer, size) and self.known(size):
            passed(&self.link)
            self.server.write(size)
        else:
            self.on_request(PyBytes_FromStringAndSize(<char*> buffer, size))

    cdef bint known(self, Py_ssize_t size) except -1:
        """Whether it is known what this request is about; no, where it is about more than one statement."""
        cdef object name
        self.statement = None
        if self.link.kind == c'S' and (len(self.statements) or len(self.portals)):
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
        if self.link.state == BUSY:
            last = follow(&self.link, buffer, size, &tail)
            if last >= 0:
                status = buffer[size - 1]
                if size > tail:
                    self.client.write(size - tail)
                if last and self.link.state == BUSY:
                    self.link.state = OPEN
                    if self.told or status != self.link.status:
                        statement, self.statement = self.statement, None
                        self.link.status = status
                        self.on_done(status, statement)
                    self.calm += 1
                    if self.calm >= self.board.calm:
                        self.give_away()
                return
        self.on_reply(PyBytes_FromStringAndSize(<char*> buffer, size))
