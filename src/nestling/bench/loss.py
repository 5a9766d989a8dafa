"""The distillation loss of a 32k vocabulary in chunks of the head, against the plain KL of full logits."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.machine import has_bf16
from nestling.bench.turns import Bench
from nestling.model.pointwise import wide
from nestling.train.chunked import distilled
from nestling.train.objective import Objective

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def figures(bench: Bench) -> Iterator[Figure]:
    positions, hidden, vocabulary = (24, 16, 512) if bench.quick else (2048, 512, 32768)
    generator = torch.Generator().manual_seed(0)
    sizes = ((positions, hidden), (vocabulary, hidden)) * 2
    exact = [torch.randn(*size, generator=generator, dtype=torch.float64) / size[1] ** 0.5 for size in sizes]
    given = [value.to(bench.device, torch.float32) for value in exact]
    expected = learn(plain, exact)()
    objective = Objective(chunk=7) if bench.quick else Objective()
    targets = torch.zeros(positions, dtype=torch.long, device=bench.device)

    def ours(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        return distilled(objective, student, head, teacher, teacher_head, targets)

    for dtype in (torch.float32, torch.bfloat16) if has_bf16(bench.device) else (torch.float32,):
        runs = {name: learn(loss, given, dtype) for name, loss in (("ours", ours), ("plain", plain))}
        error = agree("loss", runs, expected, TOLERANCE[dtype])
        times = bench.in_turn(runs)
        case = f"{positions} positions, {vocabulary} tokens" + (", bf16" if dtype == torch.bfloat16 else "")
        yield Figure("loss", case, "KL of full logits", "× the time", times.ratio("ours", "plain"), 1.1,
                     times.median("ours"), error=error)  # fmt: skip
        memory = peak(bench.device, runs["ours"]) / peak(bench.device, runs["plain"])
        yield Figure(
            "loss", f"{case}, peak", "KL of full logits", "× the memory", (memory,), None if bench.quick else 0.25
        )


def plain(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    taught = F.log_softmax(wide(teacher @ teacher_head.T), -1)  # on a CPU autocast leaves it in bf16: nothing is right
    return F.kl_div(F.log_softmax(wide(student @ head.T), -1), taught, reduction="batchmean", log_target=True)


def learn(loss: Loss, given: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
    """The loss and the gradients of the student and of its head, multiplied in a dtype."""
    student, head = (value.clone().requires_grad_() for value in given[:2])

    def run() -> Sequence[Tensor]:
        with torch.autocast(student.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = loss(student, head, *given[2:])
        return found.detach()[None], *torch.autograd.grad(found, (student, head))

    return run


def peak(device: str, run: Callable[[], object]) -> int:
    """Bytes that a run holds at its worst moment, beyond what was there."""
    if device != "cpu":
        memory = torch.get_device_module(device)
        before = memory.memory_allocated()
        memory.reset_peak_memory_stats()
        run()
        return int(memory.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
