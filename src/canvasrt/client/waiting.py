"""Waiting so that an interrupt (Ctrl-C) is noticed.

Python's own waits overlook a signal that comes just before they begin, and then wait for ever.
"""

from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

_LOOK_SECONDS = 0.2

T = TypeVar("T")


def wait_for(news: "SimpleQueue[T]") -> T:
    """The next item."""
    while True:
        try:
            return news.get(timeout=_LOOK_SECONDS)
        except Empty:
            pass


def wait_for_end(thread: Thread) -> None:
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
