"""What a run refuses before anything is started, so that nothing is trained in vain."""

from importlib.util import find_spec
from pathlib import Path

from nestling import ranks
from nestling.errors import NestlingError
from nestling.layouts import check_ranks
from nestling.material import Material
from nestling.memory import check_memory, memory_here
from nestling.models import check_models, check_scratch_teacher
from nestling.recipe import Recipe, parent_architecture, space_of
from nestling.sections import OwnParent


def check(recipe: Recipe, material: Material, until: str, *, is_trained: bool) -> None:
    """Refuse what a run up to a stage would fail at later. is_trained: whether the elastic checkpoint is there."""
    check_looks(recipe)
    _check_processes(recipe, until)
    if isinstance(recipe.parent, OwnParent):
        check_models(Path(recipe.parent.model), recipe.train)
    elif recipe.train.teacher is not None:
        check_scratch_teacher(recipe)
    if until not in ("parent", "rank") and not is_trained:
        _check_room(recipe)
        material.check_lasting(recipe.train.stages)
    if until == "report":
        _check_extras()
        _check_slices(recipe)
        material.check()
    if recipe.tensorboard:
        from nestling.train.tensorboard import check_installed

        check_installed()


def check_looks(recipe: Recipe) -> None:
    """Refuse looks along the way where a model is in pieces."""
    if recipe.evaluate.every is not None and ranks.size() > 1:
        raise NestlingError(
            f"evaluate.every looks at sizes in one process, and there are {ranks.size()}; leave it out, or start "
            "without torchrun, as a study must be"
        )


def _check_processes(recipe: Recipe, until: str) -> None:
    """Refuse a number of processes that batches or replicas cannot be shared out to, and budgets that part them."""
    count, how = ranks.size(), recipe.train
    first = [] if isinstance(recipe.parent, OwnParent) else [recipe.parent.batch]
    later = [] if first and until == "parent" else [stage.batch for stage in how.stages]
    said = f"{count} process{'es' * (count > 1)}"
    check_ranks(first + later, count, said, has_parent=bool(first))
    if count % recipe.layout.replicas:
        raise NestlingError(
            f"layout.replicas = {recipe.layout.replicas} does not divide the {said}; every replica needs as "
            "many as the others"
        )
    if how.budgets_per_step == "rank" and count > 1:
        for field, what in (("layers", "layer"), ("n_routed_experts", "expert")):
            if _drops(recipe, field):
                raise NestlingError(
                    f"budgets_per_step = 'rank' needs sizes that have every {what}, as processes exchange the weights "
                    f"of one when all of them run it; leave {field} out of the search space and of train.sizes, or say "
                    "'one'"
                )


def _drops(recipe: Recipe, field: str) -> bool:
    """Whether a size that is trained may lack layers, or experts."""
    given = [*recipe.train.sizes.values(), *recipe.controls.uniform.values()]
    found = not recipe.train.sizes and field in space_of(parent_architecture(recipe), recipe.train)
    return found or any(field in size for size in given)


def _check_room(recipe: Recipe) -> None:
    """Refuse a training that its device has too little memory for."""
    from nestling.model.device import find_device, free

    device = find_device(recipe.layout.device)
    needed = memory_here(recipe, ranks.size(), ranks.size_here() if device.type == "cpu" else None)
    check_memory(needed, "the elastic training", free(device))


def _check_extras() -> None:
    """Refuse now what the last stages would refuse after the training."""
    if missing := [name for name in ("jinja2", "reasoning_gym", "transformers") if find_spec(name) is None]:
        raise NestlingError(f"a whole run needs {', '.join(missing)}: pip install 'nestling[demo]'")


def _check_slices(recipe: Recipe) -> None:
    """Refuse now what could not be cut out after the training."""
    sizes = [spec.get("mamba_num_heads") for spec in recipe.controls.uniform.values()]
    if "mamba_num_heads" in recipe.train.per_layer or any(isinstance(size, list) for size in sizes):
        raise NestlingError(
            "nestling run judges sizes as standalone checkpoints, and no format holds mamba_num_heads per layer; "
            "leave it out of per_layer and of controls.uniform, or train alone: nestling train"
        )
