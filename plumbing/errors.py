"""Errors are for people: one line that names file, line, field or option, and the remedy; then exit status 2."""

import contextlib
import errno
import sys

from tqdm import tqdm

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
        remedy = "lower --micro_batch_tokens, or try --optimizer_device cpu; then resume"
        return f"out of GPU memory while training: {remedy}"
    if isinstance(error, OSError):
        place = error.filename or "--output_dir"
        if error.errno in DISK_IS_FULL:
            return f"{place}: {error.strerror}; free some space, then repeat the command"
        if error.errno == errno.ENAMETOOLONG:
            return f"{place}: {error.strerror}; shorten it"
    return None


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: an error that the user can mend becomes one line on stderr and exit status 2. Any other
    exception is a bug and keeps its traceback."""
    try:
        yield
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        close_progress_bars()
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


def close_progress_bars():
    """End every progress bar, so that the next line on the screen does not stand behind one."""
    for bar in list(tqdm._instances):
        bar.close()
