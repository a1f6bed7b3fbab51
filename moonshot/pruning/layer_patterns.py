"""Which pattern each layer of a model is pruned to."""

from collections.abc import Iterable, Mapping
from typing import Literal

from moonshot.layer.patterns import Pattern, PatternError, as_pattern, stages
from moonshot.models.layer_view import LayerView
from moonshot.models.partition import Partition
from moonshot.models.targets import TargetError, listed, select
from moonshot.pruning.recipe import Recipe

PatternLike = Pattern | str | float


def layer_patterns(
    partition: Partition, pattern: PatternLike | Mapping[str, PatternLike], recipe: Recipe
) -> tuple[dict[str, Pattern], dict[str, str]]:
    """{layer name: pattern} of the layers to prune, checked against every layer's shape, and why others are skipped.

    Raises TargetError for names and expressions that match no layer, and unless the recipe skips them PatternError for
    layers that cannot have their pattern, ModelError for those that no sample reached.
    """
    layers = partition.layers()
    if isinstance(pattern, Mapping):
        if not pattern:
            raise TargetError(
                "no layer is left to prune: the mapping of patterns is empty, write {layer name: pattern}"
            )
        if named := [name for name in pattern if name in partition.left_out]:
            raise TargetError(f"{named[0]} cannot be pruned: {partition.left_out[named[0]]}")
        if unknown := [name for name in pattern if name not in layers]:
            raise TargetError(f"no such layer: {listed(map(str, unknown))}; layers are {listed(layers)}")
        names = select(list(pattern), recipe.targets, recipe.ignore)
        patterns = {name: as_pattern(pattern[name]) for name in names}
    else:
        patterns = dict.fromkeys(partition.select(recipe.targets, recipe.ignore), as_pattern(pattern))
    if recipe.unreached == "error":
        partition.check_reached(patterns)
    skipped = unreached_layers(partition, patterns)
    skipped |= check_fits(
        {name: layers[name] for name in patterns if name not in skipped}, patterns, recipe.unfit
    )
    return {name: chosen for name, chosen in patterns.items() if name not in skipped}, skipped


def unreached_layers(partition: Partition, names: Iterable[str]) -> dict[str, str]:
    """{name: that it was not reached} of those among some layers that no sample reached."""
    return {name: "no calibration sample reached it" for name in names if name in partition.unreached}


def check_fits(
    views: Mapping[str, LayerView], patterns: Mapping[str, Pattern], unfit: Literal["error", "skip"] = "error"
) -> dict[str, str]:
    """{layer name: why it cannot have its pattern}; PatternError as `refuse_unfit`."""
    reasons: dict[str, str] = {}
    for name, view in views.items():
        try:
            check_fit(view, patterns[name])
        except ValueError as error:  # what one's own pattern raises
            reasons[name] = str(error)
    refuse_unfit(reasons, len(views), unfit)
    return reasons


def refuse_unfit(reasons: Mapping[str, str], layers: int, unfit: Literal["error", "skip"]) -> None:
    """PatternError that names some that do not fit of so many layers, unless they are skipped and not all there are."""
    if not reasons or (unfit == "skip" and len(reasons) < layers):
        return
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    remedy = '; or leave all of them dense with unfit="skip" (--unfit skip)' if len(reasons) < layers else ""
    raise PatternError("; ".join(f"{listed(who)}: {reason}" for reason, who in names.items()) + remedy)


def check_fit(view: LayerView, pattern: Pattern) -> None:
    """PatternError where a layer cannot have a pattern.

    Groups of an N:M pattern must stay within one position of a convolution's kernel.
    """
    pattern.validate(view.problem_shape)
    if not hasattr(pattern, "groups"):
        return
    size, _ = pattern.groups(view.problem_shape)
    if size < view.shape[1] and view.channels % size:
        raise PatternError(
            f"{pattern} needs input channels divisible by {size}, the layer has {view.channels}: "
            "leave it out with ignore, or give it a pattern of its own"
        )


def stages_of(patterns: Mapping[str, Pattern], count: int) -> list[dict[str, Pattern]]:
    """What layers are pruned to, stage after stage, at least one and at most `count`; the last is `patterns`.

    All end together: a layer whose pattern has fewer stages than others' stays dense in the first ones.
    """
    by_layer = {name: stages(pattern, count) for name, pattern in patterns.items()}
    longest = max(map(len, by_layer.values()), default=1)
    return [
        {name: found[k] for name, found in by_layer.items() if len(found) >= -k} for k in range(-longest, 0)
    ]
