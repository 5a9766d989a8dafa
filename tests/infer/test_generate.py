"""Generation: stock transformers' greedy tokens for every size, and draws that the seed alone decides."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import nestling
import stock
from nestling.arch.submodel import WHOLE, Submodel
from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.infer.generate import generate, left_padded

HYBRID = stock.SPOKEN
SMALL = Submodel(
    layers=(0, 1, 2, 4),
    hidden_size=16,
    intermediate_size=20,
    mamba_num_heads=4,
    mamba_head_dim=3,
    num_attention_heads=2,
)
PROMPTS = [[5, 3, 8, 13, 2, 7, 9], [4], [11, 2, 2, 19], [22, 21, 20, 19, 18, 17, 16, 15, 14]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate")
    stock.save(HYBRID, directory / "whole")
    nestling.slice(directory / "whole", SMALL, directory / "small")
    return directory


def view(saved: Path, submodel: Submodel = SMALL) -> View:
    return nestling.load(saved / "whole")[submodel]


def stocks(model: torch.nn.Module, prompts: list[list[int]], eos: int | None, count: int) -> list[list[int]]:
    """Stock's greedy tokens for one left-padded batch, cut before the end token."""
    ids, mask = left_padded(prompts)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=eos,
                         pad_token_id=0)  # fmt: skip
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@pytest.mark.parametrize(("name", "submodel"), [("whole", WHOLE), ("small", SMALL)])
def test_greedy_tokens_are_stocks_for_prompts_of_unequal_lengths(saved: Path, name: str, submodel: Submodel) -> None:
    model = stock.load(saved / name)
    found = generate(view(saved, submodel), PROMPTS, max_tokens=12)
    assert found == stocks(model, PROMPTS, None, 12)
    assert found == [stocks(model, [prompt], None, 12)[0] for prompt in PROMPTS]  # as if each had come alone
    assert len({tuple(row) for row in found}) > 1


def test_the_end_token_ends_its_row_only_and_is_left_out(saved: Path) -> None:
    free = generate(view(saved), PROMPTS, max_tokens=12)
    model, ended = stock.load(saved / "small"), set()
    for eos in sorted({token for row in free for token in row}):
        found = generate(view(saved), PROMPTS, max_tokens=12, eos=eos)
        assert found == stocks(model, PROMPTS, eos, 12)
        assert found == [row[: row.index(eos)] if eos in row else row for row in free]
        ended.add(tuple(len(row) < 12 for row in found))
    assert len(ended) > 2  # some end, some go on


def test_generation_stops_when_every_row_has_ended(saved: Path) -> None:
    (row,) = generate(view(saved), PROMPTS[:1], max_tokens=12)
    calls: list[torch.Tensor] = []
    watched = view(saved)
    watched.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    assert generate(watched, PROMPTS[:1], max_tokens=12, eos=row[3]) == [row[: row.index(row[3])]]
    assert len(calls) == row.index(row[3]) + 1
    assert [x.shape[1] for x in calls] == [7] + [1] * (len(calls) - 1)  # one token at a time, from the cache


def test_draws_depend_on_the_seed_alone(saved: Path) -> None:
    torch.manual_seed(0)
    first = generate(view(saved), PROMPTS, max_tokens=10, temperature=1.0, seed=4)
    torch.manual_seed(1)
    assert generate(view(saved), PROMPTS, max_tokens=10, temperature=1.0, seed=4) == first
    assert generate(view(saved), PROMPTS, max_tokens=10, temperature=1.0, seed=5) != first
    assert generate(view(saved), PROMPTS, max_tokens=10) != first


def test_draws_follow_the_models_probabilities(saved: Path) -> None:
    opened, prompt = view(saved), PROMPTS[0]
    with torch.no_grad():
        wanted = (opened(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    rows = generate(opened, [prompt] * 4000, max_tokens=1, temperature=0.7, seed=1)
    counts = Counter(token for (token,) in rows)
    share = torch.tensor([counts[token] / 4000 for token in range(23)])
    assert (share - wanted).abs().max() < 0.03
    cold = generate(opened, PROMPTS, max_tokens=8, temperature=1e-4, seed=1)
    assert cold == generate(opened, PROMPTS, max_tokens=8)


def test_with_seeds_of_its_own_a_row_draws_the_same_in_any_batch(saved: Path) -> None:
    opened, seeds = view(saved), [7, 8, 9, 10]
    together = generate(opened, PROMPTS, max_tokens=10, temperature=1.0, top_p=0.9, seed=seeds)
    for order in ([3, 0], [2], [1, 2, 3, 0]):
        batch, own = [PROMPTS[i] for i in order], [seeds[i] for i in order]
        found = generate(opened, batch, max_tokens=10, temperature=1.0, top_p=0.9, seed=own)
        assert found == [together[i] for i in order]
    with pytest.raises(NestlingError, match="2 seeds for 4 prompts"):
        generate(opened, PROMPTS, max_tokens=1, seed=[1, 2])


def test_several_continuations_of_a_prompt_stand_side_by_side(saved: Path) -> None:
    opened = view(saved)
    rows = generate(opened, PROMPTS, max_tokens=6, temperature=1.0, seed=[1, 2, 3, 4], n=3)
    assert len(rows) == 12
    assert len({tuple(row) for row in rows[:3]}) > 1
    assert rows[3:6] == generate(opened, PROMPTS[1:2], max_tokens=6, temperature=1.0, seed=[2], n=3)
    assert generate(opened, PROMPTS, max_tokens=6, n=2)[::2] == generate(opened, PROMPTS, max_tokens=6)


def test_rows_that_have_ended_leave_the_batch(saved: Path) -> None:
    opened, widths = view(saved), []
    opened.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    ends = {0: 2, 1: 5, 2: 1, 3: 9}
    heard: dict[int, list[int]] = {place: [] for place in ends}

    def told(place: int, token: int) -> bool:
        heard[place].append(token)
        return len(heard[place]) == ends[place]

    free = generate(opened, PROMPTS, max_tokens=12)
    widths.clear()
    assert generate(opened, PROMPTS, max_tokens=12, told=told) == [row[: ends[i]] for i, row in enumerate(free)]
    assert [heard[place] for place in range(4)] == [row[: ends[i]] for i, row in enumerate(free)]
    assert widths == [4, 3, 2, 2, 2, 1, 1, 1, 1]


def test_any_of_several_end_tokens_ends_a_row(saved: Path) -> None:
    free = generate(view(saved), PROMPTS, max_tokens=12)
    ends = (free[0][4], free[1][2])
    wanted = [row[: min([row.index(end) for end in ends if end in row], default=12)] for row in free]
    assert generate(view(saved), PROMPTS, max_tokens=12, eos=ends) == wanted


def test_no_tokens_and_no_prompts(saved: Path) -> None:
    assert generate(view(saved), PROMPTS, max_tokens=0) == [[], [], [], []]
    for prompts in ([], [[1], []]):
        with pytest.raises(NestlingError, match="at least one token"):
            generate(view(saved), prompts, max_tokens=3)


def test_generation_leaves_no_gradients(saved: Path) -> None:
    opened = view(saved)
    opened.model.requires_grad_(True)
    generate(opened, PROMPTS, max_tokens=2)
    assert all(parameter.grad is None for parameter in opened.model.parameters())


def test_padding_is_on_the_left() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
