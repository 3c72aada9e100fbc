"""Reading, computing and writing at the same time: order, overlap, errors, interrupts."""

import threading

import pytest

from pipeline.overlap import overlapped


def test_results_come_in_order_with_the_errors_of_each_step() -> None:
    def step(name: str, value: int) -> int:
        if value == {"read": 1, "compute": 3, "write": 4}[name]:
            raise ValueError(f"{name} {value}")
        return value

    found = list(
        overlapped(range(6), lambda i: step("read", i), lambda i, x: step("compute", x), lambda i, x: step("write", x))
    )
    assert [item for item, _ in found] == list(range(6))
    texts = [str(result) for _, result in found]
    assert texts == ["0", "read 1", "2", "compute 3", "write 4", "5"]
    assert [isinstance(result, ValueError) for _, result in found] == [False, True, False, True, True, False]


def test_the_next_is_read_and_the_last_written_while_one_is_computed() -> None:
    """Each step waits for what only happens beside it."""
    reading, written = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]
    main = threading.current_thread()

    def read(item: int) -> int:
        assert threading.current_thread() is not main
        reading[item].set()
        return item

    def compute(item: int, content: int) -> int:
        assert threading.current_thread() is main and content == item
        assert item == 3 or reading[item + 1].wait(5)
        assert item == 0 or written[item - 1].wait(5)
        return -item

    def write(item: int, made: int) -> str:
        assert threading.current_thread() is not main
        written[item].set()
        return f"{item} {made}"

    assert [result for _, result in overlapped(range(4), read, compute, write)] == ["0 0", "1 -1", "2 -2", "3 -3"]


def test_few_items_are_in_memory() -> None:
    alive, most = set(), []

    def read(item: int) -> int:
        alive.add(item)
        most.append(len(alive))
        return item

    for item, _ in overlapped(range(20), read, lambda i, x: x, lambda i, x: alive.discard(i)):
        assert item not in alive
    assert max(most) <= 3


def test_an_interrupt_ends_it_and_what_was_computed_is_written() -> None:
    written = []

    def compute(item: int, content: int) -> int:
        if item == 2:
            raise KeyboardInterrupt
        return item

    with pytest.raises(KeyboardInterrupt):
        list(overlapped(range(9), lambda i: i, compute, lambda i, x: written.append(i)))
    assert written == [0, 1]
    assert list(overlapped([], None, None, None)) == []
