"""A trained layer of any kind as matrices to prune: `output rows = input rows @ matrix.T (+ bias)`.

`layer_view` knows Linear, transformers' Conv1D, convolutions and transposed convolutions; `layers_of` also finds the
experts of a mixture that are slices of one parameter. A convolution of G groups is G matrices, each with rows of its
own; every other layer is one. docs/convolutions.md has the mathematics.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

NUMBERS = 2**24  # in a chunk at most, unless a single row has more


class UnsupportedLayerError(ValueError):
    """A layer of a known kind that overrides its forward, or whose weight is not an ordinary parameter."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a layer: the given `positions` of the given `samples`.

    inputs: (samples, positions, d); output_gradients: (samples, positions, m), where they were given. Either may
    share memory with what the layer saw.
    """

    samples: slice
    positions: slice
    inputs: Tensor
    output_gradients: Tensor | None


def layer_view(module: nn.Module) -> "LayerView | None":
    """The module as matrices; None where it is no Linear, Conv1D (transformers), Conv1d to 3d or ConvTranspose1d to 3d.

    Raises UnsupportedLayerError for one of these that overrides `forward`, whose weight is made from other tensors
    (parametrisations such as weight_norm), is not floating-point (quantised) or not there yet (lazy).
    """
    kinds: dict[type[nn.Module], type[LayerView]] = {
        nn.Linear: LayerView,
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _Convolution),
        **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TransposedConvolution),
    }
    if transformers := sys.modules.get("transformers.pytorch_utils"):  # without it nobody has a Conv1D
        kinds[transformers.Conv1D] = _TransposedLinear
    for kind, view in kinds.items():
        if isinstance(module, kind):
            _check(module, kind)
            return view(module)
    return None


def _check(module: nn.Module, kind: type[nn.Module]) -> None:
    name = type(module).__name__
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            raise UnsupportedLayerError(
                f"{name} overrides {method} of {kind.__name__}: leave the layer out with ignore"
            )
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise UnsupportedLayerError(
            f"the weight of {name} is no parameter but made from others: make it one first "
            "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
        )
    if is_lazy(weight):
        raise UnsupportedLayerError(f"{name} has no weight yet: run the model once first")
    if not weight.is_floating_point():
        raise UnsupportedLayerError(f"the weight of {name} is {weight.dtype}: prune before quantising")


class LayerView:
    """A layer as `groups` matrices of `shape` (m, d); this class is a Linear, its subclasses are the others.

    channels: the inputs at one kernel position (in a Linear all d). They are consecutive columns of the matrix, so
    that the groups of an N:M pattern run along the input channels, and stay within a position where M divides this.

    The view holds the module and not its weight, which may be replaced.
    """

    parameter = "weight"  # of the module
    flipped: tuple[int, ...] = ()  # dimensions of _weight() that the matrices have in reverse

    def __init__(self, module: Any):
        self.module = module
        self.groups, m, *kernel, self.channels = self._weight().shape
        self.shape = (m, prod(kernel) * self.channels)

    @property
    def problem_shape(self) -> tuple[int, int]:
        """Rows and columns of the layer's problem, those of all groups below one another."""
        m, d = self.shape
        return self.groups * m, d

    def matrices(self) -> Tensor:
        """(groups, m, d), a copy."""
        return self._weight().flip(self.flipped).contiguous().flatten(2)

    def assign(self, matrices: Tensor) -> None:
        """Write matrices (groups, m, d) into the weight, in place and in its dtype."""
        expected = (self.groups, *self.shape)
        if tuple(matrices.shape) != expected:
            raise ValueError(f"matrices must be {expected}, got {tuple(matrices.shape)}")
        weight = self._weight()
        weight.copy_(matrices.detach().reshape(weight.shape).flip(self.flipped))

    def assign_rows(self, rows: Tensor) -> None:
        """`assign`, from the rows of all groups below one another (groups m, d)."""
        self.assign(rows.reshape(self.groups, *self.shape))

    def chunks(self, inputs: Tensor, output_gradients: Tensor | None = None, group: int = 0) -> Iterator[Chunk]:
        """The rows of one group of a batch, each once and in order, at most NUMBERS numbers at a time.

        inputs: what the layer was called with; output_gradients: in the shape of what it returned.

        The first dimension is the samples; an input without it is one sample. A sample's positions are its tokens (all
        dimensions between samples and inputs), or those of a convolution's output, in row-major order. A chunk has
        several whole samples, or a part of one. Where it begins and ends depends on the shape of `inputs` alone. The
        gradients of all samples add up by::

            for chunk in view.chunks(inputs, output_gradients):
                for s in range(len(chunk.inputs)):
                    g[chunk.samples.start + s] += chunk.output_gradients[s].T @ chunk.inputs[s]

        Raises ValueError for shapes that the layer cannot have seen or returned.
        """
        m, d = self.shape
        x = self._group(inputs, self.channels, group, "inputs")
        positions = self._positions(tuple(x.shape[1:-1]))
        delta = None
        if output_gradients is not None:
            delta = self._group(output_gradients, m, group, "output_gradients")
            if tuple(delta.shape[:-1]) != (len(x), *positions):
                raise ValueError(
                    f"inputs {tuple(inputs.shape)} give {len(x)} samples at positions {positions}, "
                    f"output_gradients are {tuple(output_gradients.shape)}"
                )
        limit = max(1, NUMBERS // (m + d))
        step = max(1, limit // max(1, prod(positions)))
        for first in range(0, len(x), step):
            windows = self._windows(x[first : first + step])
            done = 0
            for box in _boxes((len(windows), *positions), limit):
                rows = windows[box].reshape(len(windows), -1, d)
                at = slice(done, done + rows.shape[1])
                samples = slice(first, first + len(windows))
                outputs = None if delta is None else delta[samples][box].reshape(len(windows), -1, m)
                yield Chunk(samples, at, rows, outputs)
                done = at.stop

    def _group(self, tensor: Tensor, channels: int, group: int, name: str) -> Tensor:
        """One group's channels, last: (samples, ..., channels)."""
        tensor = self._channels_last(tensor.detach())
        if tensor.shape[-1] != self.groups * channels:
            raise ValueError(f"{name} have {tensor.shape[-1]} channels, the layer {self.groups * channels}")
        return tensor.narrow(-1, group * channels, channels)

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it."""
        return getattr(self.module, self.parameter)

    def by_sample(self, tensor: Tensor, samples: int) -> Tensor:
        """What the layer reads or returns in a batch, (samples, ...) where that was folded with another dimension."""
        if tensor.ndim < 2 or len(tensor) == samples or len(tensor) % samples:
            return tensor
        return tensor.unflatten(0, (samples, -1))

    def _weight(self) -> Tensor:
        """A view of the weight as (groups, m, *kernel, channels)."""
        return self.module.weight.data[None]

    def _channels_last(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:
            tensor = tensor[None]
        return tensor[:, None].flatten(1, -2)

    def _positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the output for inputs of the given sizes, samples and channels apart."""
        return sizes

    def _windows(self, x: Tensor) -> Tensor:
        """(samples, *positions, *kernel, channels): what each output position sees of x (samples, ..., channels)."""
        return x


class _TransposedLinear(LayerView):
    """transformers' Conv1D, a Linear with the weight (d, m)."""

    def _weight(self) -> Tensor:
        return self.module.weight.data.T[None]


class ExpertView(LayerView):
    """One expert of a mixture: a slice of a parameter (experts, m, d), or (experts, d, m) if `is_transposed`."""

    def __init__(self, module: Any, parameter: str, expert: int):
        self.parameter, self.expert = parameter, expert
        super().__init__(module)

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter).data[self.expert]

    def matrix(self) -> Tensor:
        """(m, d), a view."""
        return self.weight.T if self.module.is_transposed else self.weight

    def _weight(self) -> Tensor:
        return self.matrix()[None]


class _Convolution(LayerView):
    """A convolution in 1, 2 or 3 dimensions: an output position sees what its kernel covers."""

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

    def _weight(self) -> Tensor:
        return self.module.weight.data.unflatten(0, (self.module.groups, -1)).movedim(2, -1)

    def by_sample(self, tensor: Tensor, samples: int) -> Tensor:
        return tensor

    def _channels_last(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == len(self.reach) + 1:
            tensor = tensor[None]
        if tensor.ndim != len(self.reach) + 2:
            raise ValueError(f"{type(self.module).__name__} cannot have seen or returned {tuple(tensor.shape)}")
        return tensor.movedim(1, -1)

    def _positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            ((size - 1) * spacing + sum(margin) - reach) // stride + 1
            for size, spacing, margin, reach, stride in zip(
                sizes, self.spacing, self.margins, self.reach, self.stride, strict=True
            )
        )

    def _windows(self, x: Tensor) -> Tensor:
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


class _TransposedConvolution(_Convolution):
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

    def _weight(self) -> Tensor:
        return self.module.weight.data.unflatten(0, (self.module.groups, -1)).movedim(1, -1)


def _boxes(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `limit` cells that cover a grid in row-major order: runs along the first axis that fits."""
    axis = next(a for a in range(len(shape)) if prod(shape[a + 1 :]) <= limit)
    step = limit // max(1, prod(shape[axis + 1 :]))
    for outer in product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, start + step))


def layers_of(prefix: str, module: nn.Module) -> Iterator[tuple[str, LayerView]]:
    """(name, view) of every layer in a module that can be pruned."""
    for name, inner in module.named_modules(prefix=prefix):
        for key, expert in _experts(inner):
            yield f"{name}.{key}".lstrip("."), expert
        try:
            view = layer_view(inner)
        except UnsupportedLayerError:
            continue
        if view is not None:
            yield name, view


def _experts(module: nn.Module) -> Iterator[tuple[str, ExpertView]]:
    """The experts in a module's three-dimensional parameters.

    `num_experts` and `is_transposed` are what transformers gives such a module (use_experts_implementation).
    """
    count = getattr(module, "num_experts", None)
    if not hasattr(module, "is_transposed"):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and len(parameter) == count and parameter.is_floating_point():
            yield from ((f"{name}.{k}", ExpertView(module, name, k)) for k in range(count))
