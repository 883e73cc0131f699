"""Work ahead of whoever takes the results, in threads; the image codecs free the GIL."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int = 0) -> Iterator[R]:
    """Yields function(item) for each item, computed ahead in so many threads; 0: one per core.

    An error comes in its turn; what has not begun by then is not done.
    """
    threads = threads or os.cpu_count() or 1
    waiting: collections.deque[concurrent.futures.Future[R]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, of which a thread makes `count` in advance."""
    iterator, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def ask() -> Any:
            return pool.submit(next, iterator, end)

        waiting = collections.deque(ask() for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(ask())
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
