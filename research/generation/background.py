"""Many requests at once, seen as a plain iterator."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

Client = TypeVar("Client")
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_background(
    opened: Callable[[], AbstractAsyncContextManager[Client]],
    work: Callable[[Client, Item], Awaitable[Result]],
    items: Iterable[Item],
    concurrency: int,
) -> Generator[Result, None, None]:
    """One result of ``work`` per item, in the order in which they are ready.

    opened       makes what all calls of ``work`` share, such as a pool of connections
    concurrency  most items under way; as many results may wait for the caller before new items are begun

    The coroutines run on an event loop of their own thread, which goes on while the caller works and needs no loop of
    the caller's. The first error stops new items; what is under way comes to its end and is yielded before the error
    is raised. A caller that stops iterating, or is interrupted, cancels what is under way.
    """
    ready: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
    errors: list[BaseException] = []
    room = asyncio.Semaphore(2 * concurrency)
    remaining = iter(items)

    async def worker(client: Client) -> None:
        while True:
            await room.acquire()
            if errors:
                return
            try:
                item = next(remaining)
            except StopIteration:
                return
            try:
                ready.put(await work(client, item))
            except Exception as error:
                errors.append(error)

    async def run() -> None:
        async with opened() as client:
            await asyncio.gather(*(worker(client) for _ in range(concurrency)))

    loop = asyncio.new_event_loop()
    main = loop.create_task(run())
    thread = threading.Thread(target=_drive, args=(loop, main, errors, ready), name="requests", daemon=True)
    thread.start()
    try:
        while (result := ready.get()) is not None:
            _call_on(loop, room.release)
            yield result
    finally:
        _call_on(loop, main.cancel)
        thread.join()
    if errors:
        raise errors[0]


def _drive(loop: asyncio.AbstractEventLoop, main: asyncio.Task[None], errors: list[BaseException], ready: Any) -> None:
    """The thread's life: ``main`` to its end, then None as the last thing in ``ready``."""
    try:
        loop.run_until_complete(main)
    except asyncio.CancelledError:
        pass
    except BaseException as error:  # handed to the caller's thread, which raises it
        errors.append(error)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        ready.put(None)


def _call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Run it on the loop's thread; nothing where the loop has ended meanwhile."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)
