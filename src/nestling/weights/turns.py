"""Work that several threads do side by side, part of which is done one at a time and in order."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from threading import Lock, Thread
from typing import NoReturn

MOST = 4
"""Threads: a disk or the memory is the limit from there on."""

Rest = Callable[[], None]
"""What is left to do when a turn is over, beside the others."""
Turn = Callable[[], Rest | None]
"""What is done in its turn."""
Job = Callable[[], Turn]
"""What is done before it, beside the others."""


def in_turns(jobs: Iterable[Job], threads: int | None = None) -> None:
    """Do jobs by several threads, each by one of them, so that what it works on stays in the cache of its processor.

    A thread asks for its next job when it is free, so `jobs` is never far ahead of the work; no two ask at once. The
    first error in the order of the jobs, of `jobs` itself too, is raised when every thread has stopped, and no turn
    after it is taken; an error after a turn may come before it. A signal stops the work in the same way.
    """
    line = _Line(jobs)
    workers = [Thread(target=line.work, daemon=True) for _ in range(threads or min(os.cpu_count() or 1, MOST))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException:  # of a signal
        line.stopped = True
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        raise
    if line.error is not None:
        raise line.error


class _Line:
    """Jobs in a line, each with the lock of its turn, which the one before it frees."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.error: BaseException | None = None
        self.stopped = False
        self._jobs = iter(jobs)
        self._asking = Lock()
        self._turn = Lock()  # of the next job

    def work(self) -> None:
        """Do one job after the other until there is none, or nothing more is to be done."""
        while (taken := self._take()) is not None:
            self._do(*taken)

    def _take(self) -> tuple[Job, Lock, Lock] | None:
        """The next job, its turn, and the turn after it."""
        with self._asking:
            if self._over:
                return None
            try:
                job = next(self._jobs, None)
            except BaseException as error:  # whatever it is: whoever waits must hear of it
                job = partial(_raise, error)
            if job is None:
                return None
            turn, self._turn = self._turn, Lock()
            self._turn.acquire()
            return job, turn, self._turn

    def _do(self, job: Job, turn: Lock, after: Lock) -> None:
        rest: Rest | None = None
        try:
            take = job()
        except BaseException as error:
            take = partial(_raise, error)
        turn.acquire()
        try:
            rest = None if self._over else take()
        except BaseException as caught:
            self.error = caught
        finally:
            after.release()
        try:
            if rest is not None:
                rest()
        except BaseException as caught:
            self.error = self.error or caught

    @property
    def _over(self) -> bool:
        return self.stopped or self.error is not None


def _raise(error: BaseException) -> NoReturn:
    raise error
