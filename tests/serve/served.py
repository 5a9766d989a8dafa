"""A server of a tiny random family on the loopback, with its service at hand."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from family_of_three import HYBRID, SIZES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import nestling
import stock
from nestling.infer.generate import generate
from nestling.serve.http import create_app
from nestling.serve.models import Models
from nestling.serve.protocol import Limits
from nestling.serve.scheduler import Scheduler
from nestling.serve.service import Service

BYTES = replace(HYBRID, vocab_size=257, time_step_min=0.001)
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{{ '<assistant>' + ('<think>\n' if enable_thinking else '') }}"
)


def save_family(directory: Path) -> None:
    """Three sizes, and a tokenizer of bytes whose last token, 256, ends a text."""
    stock.save(BYTES, directory)
    budgets = {name: {"submodel": submodel.to_json()} for name, submodel in SIZES.items()}
    (directory / "nestling.json").write_text(json.dumps({"format": 1, "budgets": budgets}))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))


class Served:
    def __init__(self, directory: Path, api_key: str | None = None, cache_bytes: int = 2**21, **limits: Any) -> None:
        self.family = nestling.load(directory)
        self.models = Models(self.family, directory, "tiny")
        scheduler = Scheduler(cache_bytes=cache_bytes, chunk=32, rows=16)
        self.service = Service(self.models, scheduler, Limits(**limits))
        self.app = create_app(self.service, api_key, ("127.0.0.1", "localhost"))
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self, size: str | None, prompt: str, count: int, **given: Any) -> str:
        """What `generate` says to a prompt by itself."""
        ids = self.models.tokenizer.encode(prompt).ids
        (row,) = generate(self.family[size], [ids], max_tokens=count, eos=256, **given)
        return self.models.tokenizer.decode(row)

    def empties(self) -> bool:
        """Whether everything has been let go of, soon."""
        scheduler = self.service.engine.scheduler
        for _ in range(500):
            if scheduler.idle and not self.service.following and self.service.engine.inbox.empty():
                return scheduler.held_bytes == 0
            time.sleep(0.01)
        return False


@contextmanager
def serving(directory: Path, **given: Any) -> Iterator[Served]:
    served = Served(directory, **given)
    server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    served.port = server.servers[0].sockets[0].getsockname()[1]
    torch.set_num_threads(1)
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
