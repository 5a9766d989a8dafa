"""`nestling serve`: a family on an address, until it is told to stop."""

import asyncio
import logging
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from nestling.errors import NestlingError
from nestling.infer.family import load
from nestling.model.device import find_device
from nestling.serve.http import create_app
from nestling.serve.models import Models
from nestling.serve.protocol import Limits
from nestling.serve.scheduler import Scheduler
from nestling.serve.service import Service

LOCAL = ("127.0.0.1", "localhost", "::1")
LAST_WORDS = 2
"""Seconds for telling clients that their answers are cut off; who does not read by then is told nothing."""

log = logging.getLogger("nestling.serve")


@dataclass(frozen=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    insecure: bool = False
    name: str | None = None
    pins: tuple[str, ...] = ()
    cache_bytes: int = 2**30
    chunk: int = 256
    rows: int = 64
    grace: int = 30  # seconds that running streams have after a stop
    limits: Limits = field(default_factory=Limits)
    device: str = "auto"  # cpu, cuda, or auto: a GPU where there is one

    def check(self) -> None:
        """Refuse to stand open to others by mistake."""
        if self.host not in LOCAL and not self.api_key and not self.insecure:
            raise NestlingError(
                f"--host {self.host} can be reached from elsewhere: set a key, NESTLING_API_KEY={secrets.token_hex(16)}"
                " for one, or say --insecure"
            )


def _bind(settings: Settings) -> socket.socket:
    """The socket to listen on; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise NestlingError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another --port"
        ) from None


class Server(uvicorn.Server):
    """One that ends what still runs `grace` seconds after a stop, and says so to its clients."""

    def __init__(self, app: FastAPI, service: Service, grace: int) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace + LAST_WORDS))
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        self.service, self.grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(self.grace, self._cut_off)
        await super().shutdown(sockets)
        ending.cancel()
        for connection in self.server_state.connections:  # of clients that did not read
            connection.transport.abort()

    def _cut_off(self) -> None:
        if cut := self.service.cut_off():
            log.warning("%d answers were not finished %d s after the stop and are cut off", cut, self.grace)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Connections that uvicorn gives up at the very end are no faults of the application."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def serve(directory: Path, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; streams that run then have `grace` seconds to finish."""
    settings.check()
    family = load(directory, device=find_device(settings.device, "--device "))
    models = Models(family, directory, settings.name, settings.pins)
    scheduler = Scheduler(cache_bytes=settings.cache_bytes, chunk=settings.chunk, rows=settings.rows)
    hosts = (*LOCAL, "[::1]") if settings.host in LOCAL and not settings.api_key else None
    service = Service(models, scheduler, settings.limits)
    app = create_app(service, settings.api_key, hosts)
    ids = ", ".join(entry["id"] for entry in models.listed())
    listening = _bind(settings)
    print(f"http://{settings.host}:{listening.getsockname()[1]}/v1 serves {ids}", flush=True)
    try:
        Server(app, service, settings.grace).run([listening])
    except KeyboardInterrupt:  # raised once more by uvicorn when all is closed
        return
