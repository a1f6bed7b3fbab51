"""A pattern of whole input columns, which can be cut out of a model."""

from dataclasses import dataclass, replace
from numbers import Real

from moonshot.errors import ArgumentTypeError
from moonshot.layer.patterns import PatternError, PatternMismatchError, eased_sparsity
from moonshot.linalg.backend import Array, namespace, smallest


@dataclass(frozen=True)
class Columns:
    """The same input columns of every row are zero.

    sparsity: the fraction of columns that are zero, 0 to 1, rounded to whole groups.
    group: so many consecutive columns go together, such as those of an attention head.

    ADMM, OBS, IHT, Magnitude and Wanda take it. `moonshot.shrink` cuts columns that are zero out of a model.
    """

    sparsity: float
    group: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or isinstance(self.sparsity, bool):
            raise ArgumentTypeError(f"sparsity must be a number from 0 to 1, got {self.sparsity!r}")
        if not 0 <= self.sparsity <= 1:
            raise PatternError(
                f"sparsity is the fraction of columns that are zero, 0 to 1, got {self.sparsity!r}"
            )
        if not isinstance(self.group, int) or isinstance(self.group, bool) or self.group < 1:
            raise PatternError(f"group is a number of columns, 1 or more, got {self.group!r}")

    def __str__(self) -> str:
        groups = "columns" if self.group == 1 else f"groups of {self.group} columns"
        return f"{100 * self.sparsity:g}% of {groups}"

    def validate(self, shape: tuple[int, int]) -> None:
        if shape[1] % self.group:
            raise PatternError(
                f"{self} need a number of inputs divisible by {self.group}, this layer has {shape[1]}: leave the layer "
                "out with ignore, or choose another group"
            )

    def zeros(self, shape: tuple[int, int]) -> int:
        return shape[0] * self.group * self.pruned_groups(shape)

    def eased(self, share: float) -> "Columns":
        return replace(self, sparsity=eased_sparsity(self.sparsity, share))

    def keep(self, scores: Array) -> Array:
        self.validate(scores.shape)
        xp, (m, d) = namespace(scores), scores.shape
        by_group = xp.sum(scores.reshape(m, d // self.group, self.group), axis=(0, 2))
        pruned = smallest(by_group[None, :], self.pruned_groups((m, d)))[0]
        columns = xp.broadcast_to(~pruned[:, None], (d // self.group, self.group)).reshape(1, d)
        return xp.asarray(xp.broadcast_to(columns, (m, d)), copy=True)

    def check(self, mask: Array) -> None:
        self.validate(mask.shape)
        xp, (m, d) = namespace(mask), mask.shape
        groups = mask.reshape(m, d // self.group, self.group)
        present = xp.any(groups, axis=(0, 2))
        if bool(xp.any(present != xp.all(groups, axis=(0, 2)))):
            raise PatternMismatchError(f"{self}: a group of the mask is neither zero nor left as a whole")
        if int(xp.sum(~present)) != self.pruned_groups((m, d)):
            raise PatternMismatchError(
                f"{self} promises {self.pruned_groups((m, d))} groups of zeros, the mask has {int(xp.sum(~present))}"
            )

    def pruned_groups(self, shape: tuple[int, int]) -> int:
        """How many groups of columns are zero."""
        return round(self.sparsity * (shape[1] // self.group))
