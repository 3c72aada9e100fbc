"""Reading, computing and writing at the same time, item by item in order."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Any],
    compute: Callable[[Item, Any], Any],
    write: Callable[[Item, Any], Any],
) -> Iterator[tuple[Item, Any]]:
    """Every item, in order, with what `write` returned for it, or the exception that one of the three raised.

    `compute` gets what `read` returned, `write` what `compute` returned. `compute` runs in the caller's thread while a
    second thread reads the next item and a third writes the one before: three items are in memory at most. What
    interrupts the caller first lets the other two finish theirs.
    """
    before: list[tuple[Item, Future | Exception]] = []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for item, content in _read_ahead(items, read, reader):
            try:
                result = writer.submit(write, item, compute(item, content.result()))
            except Exception as error:
                result = error
            yield from map(_settled, before)
            before = [(item, result)]
        yield from map(_settled, before)


def _read_ahead(
    items: Iterable[Item], read: Callable[[Item], Any], reader: ThreadPoolExecutor
) -> Iterator[tuple[Item, Future]]:
    """Every item with the outcome of `read`, which has the next in hand by then."""
    before: list[tuple[Item, Future]] = []
    for item in items:
        this = (item, reader.submit(read, item))
        yield from before
        before = [this]
    yield from before


def _settled(pair: tuple[Item, Future | Exception]) -> tuple[Item, Any]:
    """An item and what became of it, once that is known."""
    item, result = pair
    return item, result if isinstance(result, Exception) else (result.exception() or result.result())
