"""Work that several threads do side by side, each result of which is used in its turn."""

import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple, Self

MOST = 4
"""Threads: a disk or the memory is the limit from there on."""


Finish = Callable[[], None] | None
"""What is left to do when a turn is over."""


class _Job(NamedTuple):
    make: Callable[[], Any]
    use: Callable[[Any], Finish]
    turn: Lock  # can be taken when its turn has come
    after: Lock  # is freed when it is over


class Workers:
    """Threads that make results side by side and use them one at a time, in the order in which they were asked for.

    A thread uses what it made itself, while that is in the cache of its processor, and then finishes it beside the
    others. The first error, in that order, is raised by the next `submit` or at the end of the block, which waits for
    all; no result after it is used. One of finishing may come before it. ahead: jobs that may wait, for each thread.
    """

    def __init__(self, threads: int | None = None, ahead: int = 2) -> None:
        count = threads or min(os.cpu_count() or 1, MOST)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._turn = Lock()  # of the next job
        self._stopped = False
        self._error: BaseException | None = None
        for _ in range(count * (1 + ahead)):
            self._room.put(None)
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, make: Callable[[], Any], use: Callable[[Any], Finish] = lambda made: None) -> None:
        """Call `use` with what `make` returns, and what `use` returns. Waits while there is enough to do."""
        self._room.get()
        self._check()
        job = _Job(make, use, self._turn, Lock())
        job.after.acquire()
        self._turn = job.after
        self._jobs.put(job)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            self._room.put(None)

    def _do(self, job: _Job) -> None:
        made: Any = None
        finish: Finish = None
        error: BaseException | None = None
        try:
            made = None if self._done else job.make()
        except BaseException as caught:  # whatever it is: whoever waits must hear of it
            error = caught
        job.turn.acquire()
        try:
            if not self._done:
                if error is not None:
                    raise error
                finish = job.use(made)
        except BaseException as caught:
            self._error = caught
        finally:
            job.after.release()
        try:
            if finish is not None:
                finish()
        except BaseException as caught:
            self._error = self._error or caught

    @property
    def _done(self) -> bool:
        return self._stopped or self._error is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None
        for _thread in self._threads:
            self._jobs.put(None)
        try:
            for thread in self._threads:
                thread.join()
        except BaseException:
            self._stopped = True
            raise
        if kind is None:
            self._check()
