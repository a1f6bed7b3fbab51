from dataclasses import dataclass

import moonshot as ms
from moonshot.linalg import namespace, smallest


@dataclass(frozen=True)
class Blocks:
    """Blocks of `height` x `width` weights, a fraction `sparsity` of them zero as a whole."""

    sparsity: float = 0.5
    height: int = 2
    width: int = 2

    def __str__(self):
        return f"{100 * self.sparsity:g}% of {self.height} x {self.width} blocks"

    def validate(self, shape):
        if shape[0] % self.height or shape[1] % self.width:
            raise ms.PatternError(
                f"{self} do not divide a layer of {shape[0]} x {shape[1]}: leave it out with ignore"
            )

    def zeros(self, shape):
        area = self.height * self.width
        return area * round(self.sparsity * shape[0] * shape[1] / area)

    def keep(self, scores):
        xp, (m, d) = namespace(scores), scores.shape
        by_block = xp.sum(
            scores.reshape(m // self.height, self.height, d // self.width, self.width), axis=(1, 3)
        )
        pruned = smallest(by_block.reshape(1, -1), self.zeros((m, d)) // (self.height * self.width))
        mask = xp.broadcast_to(
            ~pruned.reshape(m // self.height, 1, d // self.width, 1),
            (m // self.height, self.height, d // self.width, self.width),
        )
        return xp.asarray(mask.reshape(m, d), copy=True)

    def check(self, mask):
        xp, (m, d) = namespace(mask), mask.shape
        blocks = mask.reshape(m // self.height, self.height, d // self.width, self.width)
        mixed = bool(xp.any(xp.any(blocks, axis=(1, 3)) != xp.all(blocks, axis=(1, 3))))
        if mixed or int(xp.sum(~mask)) != self.zeros((m, d)):
            raise ms.PatternMismatchError(f"the mask is not {self}")
