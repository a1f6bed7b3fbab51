"""Which pattern each layer of a model is pruned to."""

from collections.abc import Mapping

from moonshot.layer.patterns import Pattern, PatternError, as_pattern
from moonshot.models.layer_view import LayerView
from moonshot.models.partition import Partition
from moonshot.models.targets import TargetError, select
from moonshot.pruning.recipe import Recipe

PatternLike = Pattern | str | float


def layer_patterns(
    partition: Partition, pattern: PatternLike | Mapping[str, PatternLike], recipe: Recipe
) -> dict[str, Pattern]:
    """{layer name: pattern} of the layers to prune, checked against every layer's shape.

    Raises TargetError for names and expressions that match no layer, PatternError for a layer that cannot have its
    pattern, ModelError for layers that no sample reached, unless the recipe skips them.
    """
    layers = partition.layers()
    if isinstance(pattern, Mapping):
        if named := [name for name in pattern if name in partition.left_out]:
            raise TargetError(f"{named[0]} cannot be pruned: {partition.left_out[named[0]]}")
        if unknown := [name for name in pattern if name not in layers]:
            raise TargetError(
                f"no such layer: {', '.join(unknown)}; layers are {', '.join(list(layers)[:4])}, ..."
            )
        names = select(list(pattern), recipe.targets, recipe.ignore)
        patterns = {name: as_pattern(pattern[name]) for name in names}
    else:
        patterns = dict.fromkeys(partition.select(recipe.targets, recipe.ignore), as_pattern(pattern))
    check_fits(layers, patterns)
    if recipe.unreached == "error":
        partition.check_reached(patterns)
    return patterns


def check_fits(layers: Mapping[str, LayerView], patterns: Mapping[str, Pattern]) -> None:
    """PatternError for the first layer that cannot have its pattern, which names all others too."""
    errors = {}
    for name, pattern in patterns.items():
        try:
            check_fit(name, layers[name], pattern)
        except ValueError as error:
            errors[name] = error
    if errors:
        first, *others = errors
        if others:
            errors[first].add_note(f"and in {', '.join(others)}")
        raise errors[first]


def check_fit(name: str, view: LayerView, pattern: Pattern) -> None:
    """PatternError where a layer cannot have a pattern.

    Groups of an N:M pattern must stay within one position of a convolution's kernel.
    """
    try:
        pattern.validate(view.problem_shape)
        if not hasattr(pattern, "groups"):
            return
        size, _ = pattern.groups(view.problem_shape)
        if size < view.shape[1] and view.channels % size:
            raise PatternError(
                f"{pattern} needs input channels divisible by {size}, the layer has {view.channels}: "
                "leave it out with ignore, or give it a pattern of its own"
            )
    except ValueError as error:
        error.add_note(f"in layer {name}")
        raise
