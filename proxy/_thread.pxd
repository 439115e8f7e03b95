# cython: language_level=3, wraparound=False, cdivision=True
"""The thread that relays what is plain, without the interpreter (proxy/_fastpath.pyx, which it belongs to).

A `Link` is a session's two connections. It belongs either to the event loop or to the thread, and only its owner
touches it; who owns it is read and changed under the `Relayer`'s lock, which the thread holds while it serves one
connection, and the loop while it gives or takes. What the thread comes upon that it can't relay it returns, together with the link.

The set is edge-triggered: what was read until less came than there was room for has nothing more to read, and epoll
need not look at it again before it sleeps.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from proxy._decide cimport HEADER, Octets, is_suspect, kind_of, skim


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
    unsigned int EPOLLIN, EPOLLET, EPOLLRDHUP, EPOLLHUP, EPOLLERR
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t read(int fd, void* buffer, size_t size)
    ssize_t write(int fd, const void* buffer, size_t size)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_trylock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)


cdef enum:
    BUFFER_SIZE = 262144
    EVENTS = 64

cdef enum State:
    CLOSED  #: everything is looked at in Python
    OPEN    #: nothing is on its way, and the next request may go straight on
    BUSY    #: one request has gone straight on, and its reply is to come

cdef enum Owner:
    LOOP      #: the event loop
    THREAD
    RETURNED  #: nobody watches its descriptors until the event loop looks at what the thread has left

cdef enum Left:
    NOTHING
    REQUEST      #: bytes of the client that are to be looked at in Python
    REPLY        #: the same of the server
    TO_SERVER    #: bytes that the server had no room for
    TO_CLIENT    #: the same of the client
    BROKEN       #: a connection failed, or there was no memory

cdef struct Link:
    int client, server  # descriptors
    Owner owner
    State state
    int kind, status    # of the last request; the transaction status after the last reply
    Octets modes
    unsigned int most
    Py_ssize_t limit
    long long remaining
    unsigned char tail[HEADER]  # of the reply: part of a header that has not gone on
    int tail_size
    Left left
    unsigned char* data  # what was left, to be freed
    Py_ssize_t size
    Link* next           # that was returned
    void* exchange       # for the event loop

cdef struct Relayer:
    pthread_mutex_t lock
    int events  # epoll set
    int bell    # eventfd, readable when something was returned
    int end     # eventfd, readable when the thread is to end
    Link** links  # by descriptor: those of the thread
    int size
    Link* first  # of those returned
    Link* last
    unsigned char* buffer


# --- what is decided, whoever the owner is ---

cdef inline bint may_pass(Link* link, Octets data, Py_ssize_t size) noexcept nogil:
    """Whether a request may go straight on; then its kind is noted."""
    if link.state != OPEN or size > link.limit:
        return False
    link.kind = kind_of(data, size)
    return link.kind != 0 and not is_suspect(data, size)


cdef inline void passed(Link* link) noexcept nogil:
    """A request goes straight on."""
    link.state = BUSY
    link.remaining = 0


cdef inline int follow(Link* link, Octets data, Py_ssize_t size, int* tail) noexcept nogil:
    """What `skim` says to this part of a reply. But for the last `tail` bytes, which are kept, it may go on."""
    cdef int last = skim(data, size, link.modes, link.most, &link.remaining, tail)
    if last >= 0 and tail[0]:
        memcpy(link.tail, data + size - tail[0], tail[0])
        link.tail_size = tail[0]
    return last


cdef inline int put_tail(Link* link, unsigned char* buffer) noexcept nogil:
    """Puts what was kept before what is to be received next, and returns its size."""
    memcpy(buffer, link.tail, link.tail_size)
    return link.tail_size


# --- what the event loop does ---

cdef inline int open_relayer(Relayer* r) noexcept nogil:
    """0, or an error number."""
    cdef epoll_event event
    memset(r, 0, sizeof(Relayer))
    r.events = epoll_create1(EPOLL_CLOEXEC)
    r.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    r.end = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    r.buffer = <unsigned char*> malloc(BUFFER_SIZE)
    event.events, event.data.fd = EPOLLIN, r.end
    pthread_mutex_init(&r.lock, NULL)
    if r.events < 0 or r.bell < 0 or r.end < 0 or r.buffer == NULL or epoll_ctl(r.events, EPOLL_CTL_ADD, r.end, &event):
        return errno
    return 0


cdef inline void close_relayer(Relayer* r) noexcept nogil:
    """To be called when the thread has ended."""
    close(r.events)
    close(r.bell)
    close(r.end)
    free(r.buffer)
    free(r.links)
    pthread_mutex_destroy(&r.lock)


cdef inline void ring(int bell) noexcept nogil:
    """Makes an eventfd readable."""
    cdef uint64_t one = 1
    write(bell, &one, sizeof(one))  # can only fail where it is readable already


cdef inline bint watch_edges(Relayer* r, int fd) noexcept nogil:
    cdef epoll_event event
    event.events, event.data.fd = EPOLLIN | EPOLLRDHUP | EPOLLET, fd
    return epoll_ctl(r.events, EPOLL_CTL_ADD, fd, &event) == 0


cdef inline void leave_alone(Relayer* r, Link* link) noexcept nogil:
    """The thread has nothing to do with its descriptors any more."""
    cdef epoll_event event
    r.links[link.client] = r.links[link.server] = NULL
    epoll_ctl(r.events, EPOLL_CTL_DEL, link.client, &event)
    epoll_ctl(r.events, EPOLL_CTL_DEL, link.server, &event)


cdef inline bint give(Relayer* r, Link* link) noexcept nogil:
    """Makes the thread the owner; no, and nothing has changed, where there is no memory for it. Under the lock."""
    cdef int size = (link.client if link.client > link.server else link.server) + 64
    cdef Link** links
    if size - 64 >= r.size:
        links = <Link**> realloc(r.links, size * sizeof(Link*))
        if links == NULL:
            return False
        memset(links + r.size, 0, (size - r.size) * sizeof(Link*))
        r.links, r.size = links, size
    r.links[link.client] = r.links[link.server] = link
    if not watch_edges(r, link.client) or not watch_edges(r, link.server):
        leave_alone(r, link)
        return False
    link.owner = THREAD
    return True


cdef inline void take(Relayer* r, Link* link) noexcept nogil:
    """Makes the event loop the owner, whoever it was. Under the lock."""
    cdef Link* other = r.first
    if link.owner == THREAD:
        leave_alone(r, link)
    elif link.owner == RETURNED:
        if other == link:
            r.first = link.next
        else:
            while other.next != link:
                other = other.next
            other.next = link.next
        if r.last == link:
            r.last = other if other != link else NULL
    link.next = NULL
    link.owner = LOOP


# --- what the thread does ---

cdef inline void hand_back(Relayer* r, Link* link, Left left, Octets data, Py_ssize_t size) noexcept nogil:
    """Gives a link back to the event loop, with what is left to be done."""
    leave_alone(r, link)
    link.left, link.size, link.owner, link.next = left, size, RETURNED, NULL
    if size:
        link.data = <unsigned char*> malloc(size)
        if link.data == NULL:
            link.left, link.size = BROKEN, 0
        else:
            memcpy(link.data, data, size)
    if r.first == NULL:
        r.first = link
        ring(r.bell)
    else:
        r.last.next = link
    r.last = link


cdef inline bint sent(Relayer* r, Link* link, int fd, Left left, Py_ssize_t size) noexcept nogil:
    """Whether all of it could be written; what could not is left, also where the connection has failed."""
    cdef ssize_t count = send(fd, r.buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    if count == size:
        return True
    if count < 0:
        count = 0
    hand_back(r, link, left, r.buffer + count, size - count)
    return False


cdef inline void serve(Relayer* r, Link* link, int fd) noexcept nogil:
    """Relays what can be read from a link's descriptor. Under the lock."""
    cdef bint client = fd == link.client
    cdef int before = 0 if client else put_tail(link, r.buffer)
    cdef int last, tail = 0
    cdef ssize_t size = recv(fd, r.buffer + before, BUFFER_SIZE - before, MSG_DONTWAIT)
    if size <= 0:
        if size == 0 or errno == EINTR:
            hand_back(r, link, NOTHING, NULL, 0)
        elif errno != EAGAIN:
            hand_back(r, link, BROKEN, NULL, 0)
        return
    size += before
    if client:
        if not may_pass(link, r.buffer, size):
            hand_back(r, link, REQUEST, r.buffer, size)
            return
        passed(link)
        if not sent(r, link, link.server, TO_SERVER, size):
            return
    else:
        link.tail_size = 0
        last = follow(link, r.buffer, size, &tail) if link.state == BUSY else -1
        if last < 0:
            hand_back(r, link, REPLY, r.buffer, size)
            return
        if last:
            link.state, link.status = OPEN, r.buffer[size - 1]
        if size > tail and not sent(r, link, link.client, TO_CLIENT, size - tail):
            return
    if size == BUFFER_SIZE:
        hand_back(r, link, NOTHING, NULL, 0)  # there may be much more, and others are not to wait for it


cdef inline void relay(Relayer* r) noexcept nogil:
    """The thread: returns when `end` has been rung."""
    cdef epoll_event events[EVENTS]
    cdef int count, i, fd
    cdef Link* link
    while True:
        count = epoll_wait(r.events, events, EVENTS, -1)
        for i in range(count):
            fd = events[i].data.fd
            if fd == r.end:
                return
            pthread_mutex_lock(&r.lock)
            # One that was taken meanwhile may be among them; where its number was given again, there is nothing to
            # read, or it is read earlier than it would have been.
            link = r.links[fd] if fd < r.size else NULL
            if link != NULL:
                if events[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
                    hand_back(r, link, NOTHING, NULL, 0)
                else:
                    serve(r, link, fd)
            pthread_mutex_unlock(&r.lock)
