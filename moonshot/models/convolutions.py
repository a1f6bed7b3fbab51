"""Convolutions and transposed convolutions as matrices to prune."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moonshot.errors import ArgumentError
from moonshot.models.layer_view import LayerView


class Convolution(LayerView):
    """A convolution in 1, 2 or 3 dimensions: an output position sees what its kernel covers.

    A convolution of G groups is G matrices, each with rows of its own. docs/convolutions.md has the mathematics.
    """

    plain_rows = False

    def __init__(self, module: Any):
        super().__init__(module)
        self.reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        self.stride = module.stride
        self.spacing = (1,) * len(self.reach)  # of the inputs, with zeros between
        if module.padding == "same":
            self.margins = [(reach // 2, reach - reach // 2) for reach in self.reach]
        else:
            padding = (0,) * len(self.reach) if module.padding == "valid" else module.padding
            self.margins = [(p, p) for p in padding]

    def weight_view(self) -> Tensor:
        return self.weight.data.unflatten(0, (self.module.groups, -1)).movedim(2, -1)

    def by_sample(self, tensor: Tensor, samples: int) -> Tensor:
        return tensor

    def channels_last(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == len(self.reach) + 1:
            tensor = tensor[None]
        if tensor.ndim != len(self.reach) + 2:
            raise ArgumentError(
                f"{type(self.module).__name__} cannot have seen or returned {tuple(tensor.shape)}"
            )
        return tensor.movedim(1, -1)

    def positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            ((size - 1) * spacing + sum(margin) - reach) // stride + 1
            for size, spacing, margin, reach, stride in zip(
                sizes, self.spacing, self.margins, self.reach, self.stride, strict=True
            )
        )

    def windows(self, x: Tensor) -> Tensor:
        """A strided view of x, spaced out and padded."""
        windows = self._padded(self._spaced(x)).contiguous()  # channels together are faster to read
        axes = zip(self.reach, self.module.dilation, self.stride, strict=True)
        for axis, (reach, dilation, stride) in enumerate(axes, start=1):
            windows = windows.unfold(axis, reach + 1, stride)[..., ::dilation]
        return windows.movedim(1 + len(self.reach), -1)

    def _spaced(self, x: Tensor) -> Tensor:
        if max(self.spacing) == 1:
            return x
        sizes = [(size - 1) * spacing + 1 for size, spacing in zip(x.shape[1:-1], self.spacing, strict=True)]
        spaced = x.new_zeros((len(x), *sizes, x.shape[-1]))
        spaced[(slice(None), *(slice(None, None, spacing) for spacing in self.spacing))] = x
        return spaced

    def _padded(self, x: Tensor) -> Tensor:
        backwards = [size for margin in reversed(self.margins) for size in margin]
        if not any(backwards):
            return x
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        return F.pad(x.movedim(-1, 1), backwards, mode).movedim(1, -1)


class TransposedConvolution(Convolution):
    """An ordinary convolution, with the kernel flipped, of the inputs with stride - 1 zeros between them.

    With n inputs, kernel k and padding p, an output o = stride i + dilation j - p gets weight j times input i: in
    the spaced inputs, padded by reach - p, the window of o begins at o and has weight j at reach - dilation j.
    """

    def __init__(self, module: Any):
        super().__init__(module)
        self.flipped = tuple(range(2, 2 + len(self.reach)))
        self.spacing, self.stride = module.stride, (1,) * len(self.reach)
        self.margins = [
            (reach - padding, reach - padding + extra)
            for reach, padding, extra in zip(self.reach, module.padding, module.output_padding, strict=True)
        ]

    def weight_view(self) -> Tensor:
        return self.weight.data.unflatten(0, (self.module.groups, -1)).movedim(1, -1)
