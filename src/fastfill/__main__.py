"""`fastfill` as a process (also `python -m fastfill`): streams, Ctrl-C and the exit code. The command itself is `cli.main`.

Little is imported here, so that Ctrl-C is met while the rest loads.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def program() -> int:
    """Run the command line. Returns the exit code; a mistake of ours keeps its traceback."""
    interrupts = []

    def interrupt(*_: Any) -> None:
        interrupts.append(True)
        raise KeyboardInterrupt

    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the caller wants it ignored
    if heard:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return _run()
    except BaseException as error:
        # An import that is interrupted may end in any error.
        if not (isinstance(error, KeyboardInterrupt) or interrupts) or isinstance(error, SystemExit):
            raise
        from fastfill.terminal import complain

        complain("interrupted.")
        return INTERRUPTED
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on there is nothing to clean up
        _let_go()


def _run() -> int:
    closed = _open_streams()
    from fastfill import cli
    from fastfill.terminal import complain

    if closed:
        complain("Standard output is closed; give the result a place, such as > file.")
        return 2
    return cli.main()


class _Output(io.FileIO):
    """Standard output, whose errors have its name."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "Standard output"
            raise


def _open_streams() -> bool:
    """Whether stdout is closed. No file may get the number of a closed stream: libraries write to 1 and 2 unasked."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        return True
    raw = _Output(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=sys.stdout.encoding,
        errors="backslashreplace",  # as stderr: what the terminal's encoding lacks is written out
        line_buffering=raw.isatty(),
        write_through=getattr(sys.stdout, "write_through", False),
    )
    return False


def _let_go() -> None:
    """What could not be written, because the reader is gone or the disk is full, is not tried again at the exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(program())
