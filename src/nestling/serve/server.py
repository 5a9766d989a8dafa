"""`nestling serve`: a family on an address, until it is told to stop."""

import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from nestling.errors import NestlingError
from nestling.infer.family import load
from nestling.serve.http import create_app
from nestling.serve.models import Models
from nestling.serve.protocol import Limits
from nestling.serve.scheduler import Scheduler
from nestling.serve.service import Service

LOCAL = ("127.0.0.1", "localhost", "::1")


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


def serve(directory: Path, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; streams that run then have `grace` seconds to finish."""
    settings.check()
    models = Models(load(directory), directory, settings.name, settings.pins)
    scheduler = Scheduler(cache_bytes=settings.cache_bytes, chunk=settings.chunk, rows=settings.rows)
    hosts = (*LOCAL, "[::1]") if settings.host in LOCAL and not settings.api_key else None
    app = create_app(Service(models, scheduler, settings.limits), settings.api_key, hosts)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=settings.grace)
    ids = ", ".join(entry["id"] for entry in models.listed())
    listening = _bind(settings)
    print(f"http://{settings.host}:{listening.getsockname()[1]}/v1 serves {ids}", flush=True)
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:  # raised once more by uvicorn when all is closed
        return
