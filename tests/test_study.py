"""The study of elastic training (benchmarks/elastic): its variants, its controls, and what its table says."""

import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

STUDY = Path(__file__).parents[1] / "benchmarks" / "elastic"


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


def test_every_variant_is_a_recipe_of_its_own_and_is_compared_with_one():
    from variants import VARIANTS

    import study

    prints = [study.fingerprint(study.settings(variant, seed)) for variant in VARIANTS.values() for seed in (0, 1)]
    assert len(set(prints)) == len(prints)
    assert {variant.against for variant in VARIANTS.values()} <= VARIANTS.keys()
    assert len({study.slug(name) for name in VARIANTS}) == len(VARIANTS)


def test_every_committed_result_is_of_a_variant_as_it_is_now_and_seeds_share_a_parent():
    import study

    found, files = study.results(), list(study.RESULTS.glob("*.json"))
    assert len(found) == len(files)
    parents = {(seed, result["parent"]["checksum"]) for (_, seed), result in found.items()}
    assert len(parents) == len({seed for seed, _ in parents})


def test_learning_from_solutions_is_cross_entropy():
    from controls import Solutions

    from nestling.arch.architecture import Architecture
    from nestling.data.batches import batch
    from nestling.tasks import Task
    from nestling.tokenizer import character_tokenizer

    tokenizer = character_tokenizer()
    teacher = Solutions(Architecture("M", vocab_size=16), tokenizer)
    for part, _ in batch(Task("chain_sum", (("max_terms", 3),)), tokenizer, 0, 0, 16).parts():
        logits = torch.randn(*part.inputs_BL.shape, 16, generator=torch.Generator().manual_seed(0))
        known, said = (
            x[part.counted_BL].log_softmax(-1) for x in (logits, teacher.hidden(part.inputs_BL) @ teacher.head_weight())
        )
        kl = F.kl_div(known, said, log_target=True, reduction="batchmean")
        torch.testing.assert_close(kl, F.cross_entropy(logits[part.counted_BL], part.targets_BL[part.counted_BL]))


def test_norms_of_the_whole_width_divide_by_all_channels():
    from controls import whole

    from nestling.arch.architecture import Architecture
    from nestling.arch.submodel import Submodel
    from nestling.model.block import rms_norm
    from nestling.model.width import hard

    architecture = Architecture("M-", hidden_size=8, intermediate_size=8, n_groups=1, mamba_num_heads=2)
    widths = whole(hard(architecture, Submodel(hidden_size=6)))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    padded = F.rms_norm(F.pad(x, (0, 2)), (8,), eps=1e-5)[:, :6]
    for width in (widths.ends, dict(widths.layers)[0]):
        torch.testing.assert_close(rms_norm(x, torch.ones(6), width, 1e-5), padded)


def test_a_difference_is_paired_and_never_taken_over_seeds_that_are_missing():
    from page import page
    from tables import difference, report
    from variants import PICKED, ROUTER, VARIANTS

    def result(exact):
        sizes = {
            size: {"exact": exact, "terms": {"2": exact, "3": exact}, "kl": 0.0} for size in ("100%", "50%", "30%")
        }
        points = [{"step": step, "tokens": step, "student_tokens": step, "sizes": sizes} for step in range(0, 121, 20)]
        return {"points": points, "seconds": 1.0, "made": {"python": "3"}, "parent": {"exact": 1.0}}

    router, picked = (0.9, 0.8, 0.85), (0.86, 0.79, 0.8)
    results = {(ROUTER, seed): result(exact) for seed, exact in enumerate(router)}
    results |= {(PICKED, seed): result(exact) for seed, exact in enumerate(picked)}
    found = difference(results, [0, 1, 2, 3], VARIANTS[PICKED], "50%")
    points = [100 * (p - r) for p, r in zip(picked, router, strict=True)]
    assert found.points == pytest.approx(points)
    assert found.error == pytest.approx(4.303 * statistics.stdev(points) / math.sqrt(3))
    text = report(results, [0, 1, 2, 3])
    assert "| hand-picked sizes | 3, missing 3 |" in text
    assert "| random sizes | 0, missing 0, 1, 2, 3 | missing | missing |" in text
    assert not found.is_clear
    assert "mean clear" not in page(results, [0, 1, 2, 3])
    results |= {(PICKED, seed): result(exact - 0.2) for seed, exact in enumerate(router)}
    assert page(results, [0, 1, 2]).count('"mean clear"') == 2  # 50% and 30%


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A parent that has learnt nothing and its checkpoint, as if ranked."""
    import study
    from nestling.model.nemotron_h import NemotronH
    from nestling.model.store import save_model
    from nestling.recipe import parent_architecture
    from nestling.tokenizer import character_tokenizer, save_tokenizer
    from nestling.train.pretrain import initialize
    from nestling.weights.output import write_json
    from nestling.weights.ranking import identity
    from nestling.weights.transform import permute

    out, architecture = tmp_path_factory.mktemp("study"), parent_architecture(study.base())
    (out / "parent").mkdir()
    save_model(initialize(NemotronH(architecture), 0), out / "parent")
    write_json(out / "parent" / "config.json", architecture.to_config({"dtype": "float32"}))
    save_tokenizer(character_tokenizer(), out / "parent")
    permute(out / "parent", identity(architecture), out / "ranked")
    return out


@pytest.mark.parametrize("name", ["router's sizes", "CE alone"])
def test_a_run_measures_every_size_at_the_start_and_along_the_way(prepared, tmp_path, name):
    from runs import Cell, HeldOut
    from variants import VARIANTS

    import study
    from nestling.model.store import load_model
    from nestling.tokenizer import read_tokenizer
    from nestling.weights.elastic import open_elastic

    short = {"stages": [{"steps": 20, "batch": 2}], "router_steps": 2}
    given = VARIANTS[name]
    variant = replace(given, train={**given.train, **short}, active_width=given.target == "teacher")
    cell = Cell(variant, variant.recipe(study.base(), 0), prepared)
    parent, tokenizer = load_model(open_elastic(prepared / "parent")), read_tokenizer(prepared / "parent")
    held_out = HeldOut(cell.recipe.task.task, tokenizer, parent, 0, 20)
    made = cell.train(tmp_path / "state", "print", held_out, {})
    assert [point["step"] for point in made["points"]] == [0, 20]
    assert made["points"][0]["sizes"]["100%"]["kl"] == pytest.approx(0, abs=1e-5)
    whole = made["family"]["100%"]["parameters"]
    for size, share in (("50%", 0.5), ("30%", 0.3)):
        assert 0.97 * share <= made["family"][size]["parameters"] / whole <= share
        assert ("as_trained" in made["points"][1]["sizes"][size]) == (not variant.active_width)
