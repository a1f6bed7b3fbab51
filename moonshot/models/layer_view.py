"""A trained layer as matrices to prune: `output rows = input rows @ matrix.T (+ bias)`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from moonshot.errors import ArgumentError

NUMBERS = 2**24  # in a chunk at most, unless a single row has more
ON_GPU = 8  # times as many on a GPU, which begins a product in as long as a CPU computes one


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


class LayerView:
    """A layer as `groups` matrices of `shape` (m, d), and what it reads and returns as their rows.

    This class is a Linear, its subclasses are the others. A kind of your own overrides what differs: `parameter` where
    the weight has another name, `weight_view` where it lies in memory another way, and the last four methods where the
    rows that it multiplies are not its inputs as they come.

    module: the layer, such as a Linear.
    channels: the inputs at one kernel position (in a Linear all d). They are consecutive columns of the matrix, so
    that the groups of an N:M pattern run along the input channels, and stay within a position where M divides this.

    The view holds the module and not its weight, which may be replaced.
    """

    parameter = "weight"  # of the module
    plain_rows = True  # whether its rows are its inputs as they come, the same for every layer that reads them
    routed = False  # whether samples may have other numbers of rows in it, or none, as an expert's do
    flipped: tuple[int, ...] = ()  # dimensions of weight_view() that the matrices have in reverse

    def __init__(self, module: Any):
        self.module = module
        self.modules = [module]  # that have this weight: a layer under two names is used as both
        self.groups, m, *kernel, self.channels = self.weight_view().shape
        self.shape = (m, prod(kernel) * self.channels)

    @property
    def problem_shape(self) -> tuple[int, int]:
        """Rows and columns of the layer's problem, those of all groups below one another."""
        m, d = self.shape
        return self.groups * m, d

    def matrices(self) -> Tensor:
        """(groups, m, d), a copy."""
        return self.weight_view().flip(self.flipped).contiguous().flatten(2)

    def assign(self, matrices: Tensor) -> None:
        """Write matrices (groups, m, d) into the weight, in place and in its dtype."""
        expected = (self.groups, *self.shape)
        if tuple(matrices.shape) != expected:
            raise ArgumentError(f"matrices must be {expected}, got {tuple(matrices.shape)}")
        weight = self.weight_view()
        weight.copy_(matrices.detach().reshape(weight.shape).flip(self.flipped))
        increment_version(getattr(self.module, self.parameter))  # of which the view may share the memory alone

    def assign_rows(self, rows: Tensor) -> None:
        """`assign`, from the rows of all groups below one another (groups m, d)."""
        self.assign(rows.reshape(self.groups, *self.shape))

    def chunks(self, inputs: Tensor, output_gradients: Tensor | None = None, group: int = 0) -> Iterator[Chunk]:
        """The rows of one group of a batch, each once and in order, at most NUMBERS numbers at a time.

        inputs: what the layer was called with; output_gradients: in the shape of what it returned.

        The first dimension is the samples; an input without it is one sample. A sample's positions are its tokens (all
        dimensions between samples and inputs), or those of a convolution's output, in row-major order. A chunk has
        several whole samples, or a part of one. Where it begins and ends depends on the shape of `inputs`, and on
        whether they are on a GPU, where it may have ON_GPU times as many. The gradients of all samples add up by::

            for chunk in view.chunks(inputs, output_gradients):
                for s in range(len(chunk.inputs)):
                    g[chunk.samples.start + s] += chunk.output_gradients[s].T @ chunk.inputs[s]

        Raises ValueError for shapes that the layer cannot have seen or returned.
        """
        m, d = self.shape
        x = self._of_group(inputs, self.channels, group, "inputs")
        positions = self.positions(tuple(x.shape[1:-1]))
        delta = None
        if output_gradients is not None:
            delta = self._of_group(output_gradients, m, group, "output_gradients")
            if tuple(delta.shape[:-1]) != (len(x), *positions):
                raise ArgumentError(
                    f"inputs {tuple(inputs.shape)} give {len(x)} samples at positions {positions}, "
                    f"output_gradients are {tuple(output_gradients.shape)}"
                )
        limit = max(1, NUMBERS * (ON_GPU if x.is_cuda else 1) // (m + d))
        step = max(1, limit // max(1, prod(positions)))
        for first in range(0, len(x), step):
            windows = self.windows(x[first : first + step])
            done = 0
            for box in _boxes((len(windows), *positions), limit):
                rows = windows[box].reshape(len(windows), -1, d)
                at = slice(done, done + rows.shape[1])
                samples = slice(first, first + len(windows))
                outputs = None if delta is None else delta[samples][box].reshape(len(windows), -1, m)
                yield Chunk(samples, at, rows, outputs)
                done = at.stop

    def _of_group(self, tensor: Tensor, channels: int, group: int, name: str) -> Tensor:
        """One group's channels, last: (samples, ..., channels)."""
        tensor = self.channels_last(tensor.detach())
        if tensor.shape[-1] != self.groups * channels:
            raise ArgumentError(f"{name} have {tensor.shape[-1]} channels, the layer {self.groups * channels}")
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

    def weight_view(self) -> Tensor:
        """A view of the weight as (groups, m, *kernel, channels)."""
        return self.weight.data[None]

    def channels_last(self, tensor: Tensor) -> Tensor:
        """What the layer reads or returns, as (samples, ..., channels)."""
        if tensor.ndim == 1:
            tensor = tensor[None]
        return tensor[:, None].flatten(1, -2)

    def positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the output for inputs of the given sizes, samples and channels apart."""
        return sizes

    def windows(self, x: Tensor) -> Tensor:
        """(samples, *positions, *kernel, channels): what each output position sees of x (samples, ..., channels)."""
        return x


class TransposedLinear(LayerView):
    """transformers' Conv1D, a Linear with the weight (d, m)."""

    def weight_view(self) -> Tensor:
        return self.weight.data.T[None]


def _boxes(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `limit` cells that cover a grid in row-major order: runs along the first axis that fits."""
    axis = next(a for a in range(len(shape)) if prod(shape[a + 1 :]) <= limit)
    step = limit // max(1, prod(shape[axis + 1 :]))
    for outer in product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, start + step))
