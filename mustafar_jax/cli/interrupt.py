"""Ctrl-C ends the command at once, whatever it waits for, unless it listens."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from rich.console import Console

STATUS = 128 + signal.SIGINT
"""The exit status of a command that was interrupted."""

PATIENCE = 0.3
"""Seconds that last words have: a reader may have stopped to read."""

_last_words: list[Callable[[], object]] = []
_listening: list[threading.Event] = []


def before_leaving(show: Callable[[], object]) -> None:
    """Call this, too, when the process is interrupted: it shows what has been found until then."""
    _last_words.append(show)


def run(main: Callable[[], int]) -> int:
    """Run the command of this process; returns its exit status, but does not return from an interrupt.

    The main thread does not hear of an interrupt. While it compiles, it would hear of it late; while it traces and
    lowers, the exception would pass through libraries that crash then; and so can jax's own shutdown.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell has background jobs ignore it
        signal.signal(signal.SIGINT, lambda *_: None)
    status = main()
    if status == STATUS:
        _leave()
    return status


def _watch(reader: int) -> None:
    """Wait for an interrupt that ends the process: Python writes the numbers of signals into the pipe."""
    while os.read(reader, 1) != bytes([signal.SIGINT]) or _heard():
        pass
    _leave()


@contextlib.contextmanager
def listening() -> Iterator[threading.Event]:
    """While it is open, the first interrupt of the process sets the event; only another one ends the process."""
    _listening.append(threading.Event())
    try:
        yield _listening[-1]
    finally:
        _listening.pop()


def _heard() -> bool:
    """Whether somebody listens to an interrupt, and had not heard one yet."""
    for event in _listening[-1:]:  # a copy: another thread may change it
        if not event.is_set():
            event.set()
            return True
    return False


def _leave() -> None:
    """End the process without any shutdown. What is on disk is as it was left."""
    speaking = threading.Thread(target=_speak, daemon=True)
    speaking.start()
    speaking.join(PATIENCE)
    os._exit(STATUS)


def _speak() -> None:
    Console(stderr=True).show_cursor()  # which progress bars hide
    for show in _last_words:
        show()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
