"""Plain torch references, written by us from the papers."""

import torch
from torch import Tensor


def torch_wanda(weight: Tensor, hessian: Tensor, size: int, zeros: int) -> Tensor:
    """Wanda (arXiv 2306.11695): of every `size` weights in a row the `zeros` with the least `|w_ij| sqrt(A_jj)` go."""
    score = (weight.abs() * hessian.diagonal().sqrt()).reshape(-1, size)
    pruned = score.topk(zeros, dim=1, largest=False).indices
    return weight.reshape(-1, size).scatter(1, pruned, 0.0).reshape(weight.shape)


def torch_sparsegpt(weight: Tensor, hessian: Tensor, block: int = 128) -> Tensor:
    """SparseGPT at 2:4 as its paper's algorithm 1 has it (arXiv 2301.00774)."""
    w = weight.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    d = w.shape[1]
    for start in range(0, d, block):
        stop = min(start + block, d)
        part, r = w[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.zeros_like(part)
        mask = torch.zeros_like(part, dtype=torch.bool)
        for j in range(stop - start):
            if j % 4 == 0:
                score = (part[:, j : j + 4] / r.diagonal()[j : j + 4]) ** 2
                mask[:, j : j + 4].scatter_(1, score.topk(2, dim=1, largest=False).indices, True)
            error = torch.where(mask[:, j], part[:, j] / r[j, j], 0.0)
            part[:, j:] -= error[:, None] * r[j, j:]
            part[:, j] = torch.where(mask[:, j], 0.0, part[:, j])
            errors[:, j] = error
        w[:, start:stop] = part
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w


def torch_obc(weight: Tensor, hessians: Tensor, size: int, zeros: int) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal Brain Compression's algorithm 1 (arXiv 2208.11580), rows in one batch, until groups have their zeros.

    size, zeros: a group of `size` columns that has lost `zeros` weights is closed. Returns the weights, the order in
    which each row (m, steps) loses them, and the loss that each removal adds.
    """
    w = weight.clone()
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(hessians))
    m, d = w.shape
    rows = torch.arange(m)
    gone = torch.zeros_like(w, dtype=torch.bool)
    left = torch.full((m, d // size), zeros)
    order, losses = [], []
    for _ in range(d // size * zeros):
        diagonal = inverses.diagonal(dim1=1, dim2=2)
        shut = gone | (left == 0).repeat_interleave(size, dim=1)
        j = torch.where(shut, torch.inf, w**2 / diagonal).argmin(dim=1)
        column, pivot = inverses[rows, j], diagonal[rows, j]
        order.append(j)
        losses.append(w[rows, j] ** 2 / pivot)
        w -= column * (w[rows, j] / pivot)[:, None]
        gone[rows, j] = True
        left[rows, j // size] -= 1
        inverses.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None, :], alpha=-1)
        inverses[rows, j, j] = 1.0
    return w.masked_fill(gone, 0.0), torch.stack(order, dim=1), torch.stack(losses, dim=1)


def torch_alps(weight: Tensor, hessian: Tensor, size: int, zeros: int) -> Tensor:
    """ALPS (arXiv 2406.07831): ADMM with a growing penalty, then conjugate gradients on the support.

    size, zeros: every `size` consecutive weights have `zeros` zeros. The Hessian is scaled to a unit diagonal. Until
    the support has moved for the first time the penalty shrinks, as it is too large for the problem.
    """
    scale = hessian.diagonal().sqrt()
    h, dense = hessian / scale / scale[:, None], weight * scale
    values, basis = (part.to(h.dtype) for part in torch.linalg.eigh(h.double()))

    def shifted_inverse(rho: float) -> Tensor:
        return (basis / (values + rho)) @ basis.T

    rho, moved, pull = 0.1, False, dense @ h
    kept = dense.numel() // size * (size - zeros)
    d = checked = _projected(dense, size, zeros)
    dual, inverse = torch.zeros_like(dense), shifted_inverse(rho)
    for iteration in range(1, 301):
        w = (pull - dual + rho * d) @ inverse
        d = _projected(w + dual / rho, size, zeros)
        dual = dual + rho * (w - d)
        if iteration % 3:
            continue
        change = int(((d != 0) != (checked != 0)).sum())
        checked = d
        if not moved and change <= 0.005 * kept:
            rho, d, dual = rho / 5, _projected(dense, size, zeros), torch.zeros_like(dense)
            inverse = shifted_inverse(rho)
            continue
        moved = True
        if change == 0:
            break
        rho *= 1.3 if change > 0.1 * kept else 1.2 if change > 0.005 * kept else 1.1
        inverse = shifted_inverse(rho)
    return _refitted(d, h, pull, 10) / scale


def _projected(w: Tensor, size: int, zeros: int) -> Tensor:
    """The nearest weights with `zeros` zeros in every `size`."""
    groups = w.reshape(-1, size)
    return groups.scatter(1, groups.abs().topk(zeros, dim=1, largest=False).indices, 0.0).reshape(w.shape)


def _refitted(w: Tensor, hessian: Tensor, pull: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on the support of each row; the preconditioner is the diagonal, which is one."""
    support = w != 0
    residual = (pull - w @ hessian) * support
    direction, norm = residual, (residual**2).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian) * support
        step = norm / (direction * image).sum(dim=1, keepdim=True).clamp_min(1e-30)
        w, residual = w + step * direction, residual - step * image
        following = (residual**2).sum(dim=1, keepdim=True)
        direction = residual + following / norm.clamp_min(1e-30) * direction
        norm = following
    return w
