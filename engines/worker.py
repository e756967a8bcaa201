"""A thread that works off a queue, or the caller's own thread where no other is wanted."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")


class Worker(Generic[ItemT]):
    """Handles items in order. `inline`: `put` itself does it. Else a thread, blocked while there is none."""

    def __init__(self, name: str, handle: Callable[[ItemT], None], *, inline: bool = False) -> None:
        self._handle = handle
        self._inline = inline
        self._items: queue.Queue[ItemT | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        if not inline:
            self._thread.start()

    def put(self, item: ItemT) -> None:
        if self._inline:
            self._handle(item)
        else:
            self._items.put(item)

    def drain(self) -> None:
        """Wait until everything that was put has been handled."""
        self._items.join()

    def close(self, timeout_s: float = 5.0) -> None:
        """Handle what is queued, then end the thread. May be called twice."""
        if not self._inline and self._thread.is_alive():
            self._items.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            item = self._items.get()
            try:
                if item is None:
                    return
                self._handle(item)
            except Exception:
                logger.exception("%s: an item was not handled", self._thread.name)
            finally:
                self._items.task_done()
