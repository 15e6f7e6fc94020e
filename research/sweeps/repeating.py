"""Does something again and again from a thread while the caller is busy: signs of life, displays."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(act: Callable[[], bool | None], every_s: float, name: str) -> Iterator[None]:
    """Call `act` every so many seconds, the first time after them, until the block is left or `act` returns False.

    Leaving waits for a call that is under way. An error in `act` ends the repeating, not the block.
    """
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(every_s):
            if act() is False:
                return

    thread = threading.Thread(target=follow, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
