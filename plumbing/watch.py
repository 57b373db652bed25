"""How several processes end together: when one fails or dies, all end, and one line says which and why.

Each of them holds a connection to the first one. The kernel closes it when a process dies, however it dies, so that the
others know within a moment, even where they wait for the dead one in the middle of a computation. A thread of every
process listens. It ends the process from outside, since its main thread cannot be reached there.

The lines that go over a connection: the number of a process and the password, as a greeting; then 'failed' with a
message, 'stopped' with an exit status, or 'done'. In the other direction: 'end' with an exit status, or 'done'.
"""

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time

from plumbing import processes

SAME_ERROR = 5.0  # seconds in which the first process may find an error itself that another one tells of
ECHO = 5.0  # seconds in which it comes out that an error is only the echo of another process's death
PATIENCE = 30.0  # seconds that a failed process waits for the first one to say so

RESUME = "the same command goes on from the last checkpoint"


class Watch:
    """The connections of this process: of the first one to all others, of any other one to the first."""

    def __init__(self, store):
        """store: of torch.distributed, where the first process leaves its address."""
        self.connections = []
        self.speaking = threading.Lock()  # held by who shows the one line
        if processes.is_first():
            password = secrets.token_hex()
            listener = socket.create_server(("", 0))
            store.set("watch", f"{listener.getsockname()[1]} {password}")
            for _ in range(processes.count() - 1):
                self.welcome(listener, password)
            listener.close()
        else:
            port, password = store.get("watch").decode().split()
            connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)))
            self.connections.append(connection)
            self.tell(f"{processes.rank()} {password}")
            listen(self.hear_from_first, connection.makefile())

    def welcome(self, listener, password):
        """Take the connection of one more process; those of strangers are dropped."""
        while True:
            connection, _ = listener.accept()
            lines = connection.makefile()
            rank, _, word = next_line(lines).partition(" ")
            if word == password:
                self.connections.append(connection)
                listen(self.hear_from, lines, int(rank))
                return
            connection.close()

    def tell(self, line):
        """Send a line to those at the other ends; who is gone needs none."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{line}\n".encode())

    def hear_from(self, lines, rank):
        """In the first process: what another one says, until it leaves or dies."""
        word, _, rest = next_line(lines).partition(" ")
        if word == "done":
            return
        if word == "failed":
            time.sleep(SAME_ERROR)  # most errors are everybody's: then the main thread shows it meanwhile
            self.end_all(f"error: process {rank}: {rest}", 2)
        if word == "stopped":
            time.sleep(SAME_ERROR)
            self.end_all(f"error: process {rank} was stopped; {RESUME}", int(rest))
        self.end_all(f"error: process {rank} has died; {RESUME}", 1)

    def hear_from_first(self, lines):
        """In any other process: what the first one says, until it leaves or dies."""
        word, _, rest = next_line(lines).partition(" ")
        if word == "done":
            return
        if word == "end":
            os._exit(int(rest))
        if processes.rank() == 1:
            say(f"error: process 0 has died; {RESUME}")
        os._exit(1)

    def end_all(self, line, status):
        """The first process speaks, once, and ends itself and all others."""
        with self.speaking:
            say(line)
            self.tell(f"end {status}")
            os._exit(status)


def listen(hear, *args):
    threading.Thread(target=hear, args=args, daemon=True).start()


def next_line(lines):
    """The next line of a connection without its end; '' if the process at the other end has died."""
    try:
        return lines.readline().rstrip("\n")
    except OSError:
        return ""


def say(line):
    print(f"\n{line}", file=sys.__stderr__, flush=True)


# The main thread ------------------------------------------------------------------------------------------------------

watch = None  # of this process, where there are several


def begin(store):
    """Connect this process with the others, unless it is."""
    global watch
    if watch is None:
        watch = Watch(store)


def report(message, show):
    """Tell of an error that ends this process, by show(message). The first process shows it and ends the others; any
    other one leaves that to the first, which may have found the same."""
    if watch is None:
        show(message)
    elif processes.is_first():
        watch.speaking.acquire()  # for ever: nobody else has anything to say now
        with contextlib.suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as one of the others has ended
        show(message)
        watch.tell("end 2")
    else:
        watch.tell(f"failed {message}")
        time.sleep(PATIENCE)  # the listening thread ends this process
        show(f"process {processes.rank()}: {message}")


def await_news():
    """Before an unexpected error is shown: it may be the echo of another process's death, which then ends this one."""
    if watch is not None:
        time.sleep(ECHO if processes.is_first() else 2 * ECHO)


def leave(status):
    """The end of this process, with an exit status: 0 or None if all is done. Then the others need not end for that."""
    if watch is None:
        return
    if not status:
        watch.tell("done")
    elif processes.is_first():
        watch.tell(f"end {status}")
    else:
        watch.tell(f"stopped {status}")
