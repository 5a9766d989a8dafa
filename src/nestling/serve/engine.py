"""The one thread that computes: it takes what came in, steps the scheduler, and hands on what was heard."""

import logging
import queue
import threading
from collections.abc import Callable

from nestling.serve.scheduler import Heard, Request, Scheduler

log = logging.getLogger("nestling.serve")


class Engine:
    """told: is given, in the engine's thread, what each step brought; None when everything in hand has failed."""

    def __init__(self, scheduler: Scheduler, told: Callable[[list[Heard] | None], None]) -> None:
        self.scheduler, self.told = scheduler, told
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="nestling-engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends after the step under way."""
        self.inbox.put(None)
        self.thread.join()

    def submit(self, request: Request) -> None:
        self.inbox.put(lambda: self.scheduler.submit(request))

    def cancel(self, request: Request) -> None:
        self.inbox.put(lambda: self.scheduler.cancel(request))

    def _run(self) -> None:
        while self._take():
            try:
                heard = self.scheduler.step()
            except Exception:  # such as out of memory: those in hand are lost, the server is not
                log.exception("a step failed; the requests in hand have failed")
                self.scheduler.clear()
                self.told(None)
            else:
                self.told(heard)

    def _take(self) -> bool:
        """Do what was asked since the last step; with nothing at hand, wait. False: stop."""
        while self.scheduler.idle or not self.inbox.empty():
            if (act := self.inbox.get()) is None:
                return False
            act()
        return True
