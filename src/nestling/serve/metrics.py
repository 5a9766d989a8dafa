"""What Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nestling.serve.scheduler import Scheduler


class Metrics:
    """Counters of one server, and gauges of its scheduler as it was after its last step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("nestling_requests", "Requests by how they ended.", ["outcome"], registry=registry)
        self.prompt = Counter("nestling_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated = Counter("nestling_generated_tokens", "Tokens generated.", registry=registry)
        self.first = Histogram("nestling_first_token_seconds", "From a request to its first token.", registry=registry)
        gauges: list[tuple[str, str, Callable[[], int]]] = [
            ("nestling_queued_sequences", "Sequences that wait.", lambda: scheduler.queued),
            ("nestling_active_sequences", "Sequences that hold a cache.", lambda: len(scheduler.active)),
            ("nestling_cache_bytes", "Bytes that caches hold.", lambda: scheduler.held_bytes),
            ("nestling_cache_limit_bytes", "Bytes that caches may hold.", lambda: scheduler.room.limit),
        ]
        self.gauges = {Gauge(name, what, registry=registry): look for name, what, look in gauges}
        self.look()

    def look(self) -> None:
        """Read the gauges; in the engine's thread, since the scheduler changes under any other."""
        for gauge, look in self.gauges.items():
            gauge.set(look())

    def text(self) -> bytes:
        return generate_latest(self.registry)
