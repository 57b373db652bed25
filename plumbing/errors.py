"""Errors are for people: one line that names file, line, field or option, and the remedy; then exit status 2."""

import contextlib
import errno
import os
import signal
import sys

from tqdm import tqdm

from plumbing import processes, watch

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. The message names file, line, field or option, and the remedy."""


@contextlib.contextmanager
def explain(problem, remedy, errors=Exception):
    """Turn what goes wrong inside into a UserError: 'problem (reason); remedy'.

    Libraries fail in many ways, by many kinds of exception. Where a step can only fail by what the user gave, the kind
    does not matter; elsewhere pass `errors`, the kinds that are meant.
    """
    try:
        yield
    except errors as error:
        reason = str(error)[:200]
        raise UserError(f"{problem} ({reason}); {remedy}")


def one_line(error):
    """The message for an exception that the user can do something about; None for any other, which is a bug."""
    import torch  # only here: the files that raise UserErrors must stay quick to import

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "repeat the command with a lower --micro_batch_tokens, or with --optimizer_device cpu"
        return f"out of GPU memory while training: {remedy}"
    if isinstance(error, OSError):
        place = error.filename or "--output_dir"
        if error.errno == errno.EROFS:
            return f"{place}: {error.strerror}; pass an --output_dir on another disk"
        if error.errno in DISK_IS_FULL:
            return f"{place}: {error.strerror}; free some space, then repeat the command"
        if isinstance(error, (PermissionError, IsADirectoryError)):
            return f"{place}: {error.strerror}; pass a file that may be read, or a folder that may be written"
        if error.errno == errno.ENAMETOOLONG:
            return f"{place}: {error.strerror}; shorten it"
    return None


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: an error that the user can mend becomes one line on stderr and exit status 2, Ctrl-C one
    line and status 130. Any other exception is a bug and keeps its traceback."""
    with contextlib.suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)  # plumbing/start.py had another one while loading
    screen = (PatientStream(sys.stdout), PatientStream(sys.stderr))
    if not processes.is_first():  # the first one speaks for all
        screen = (open(os.devnull, "w"), open(os.devnull, "w"))
    with contextlib.redirect_stdout(screen[0]), contextlib.redirect_stderr(screen[1]):
        try:
            meet_others()
            yield
            watch.leave(0)
        except SystemExit as end:
            watch.leave(end.code)
            raise
        except KeyboardInterrupt:
            close_progress_bars()
            print("interrupted", file=sys.stderr)
            watch.leave(130)
            sys.exit(130)
        except Exception as error:
            message = one_line(error)
            if message is None:
                watch.await_news()
                raise
            watch.report(printable(message), show)
            sys.exit(2)
        finally:
            for stream in screen:
                stream.flush()


def meet_others():
    """Where torchrun has started several processes: from here on, an error of one of them ends all."""
    if processes.count() > 1:
        from plumbing import distributed  # only here: it imports torch

        distributed.connect()


def show(message):
    close_progress_bars()
    print(f"error: {message}", file=sys.stderr)


def printable(text):
    """A text as one line whose every character can be shown: a file's name must not move the cursor."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)


class PatientStream:
    """stdout or stderr that may go away, or lack a character: `python grpo.py | head -1` must not end a training run,
    nor the sign ± a table."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self):
        """From now on nothing is shown."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def close_progress_bars():
    """End every progress bar, so that the next line on the screen does not stand behind one."""
    for bar in list(tqdm._instances):
        bar.close()
