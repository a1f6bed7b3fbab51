// Conjugate gradients on every row's support, preconditioned by the diagonal: what is done to a row between two
// products with its matrix. One thread block for each row.
//
//   REAL     float or double
//   SHARED   1 if all rows have one diagonal (d,), 0 if each has its own (m, d)
//
// product, pull, target, x, residual, direction, mask: (m, d); rho, tiny, loss: (m). Right for any number of threads.

#include "linalg/block.cuh"

typedef REAL real;

extern __shared__ real sums[]; // one for each thread

// From the product with x: residual and first direction, `rho`, below which `tiny` the row rests, and its loss.
extern "C" __global__ void start(const real *product, const real *pull, const real *target, const bool *mask,
                                 const real *diagonal, const real *x, real *residual, real *direction, real *rho,
                                 real *tiny, real *loss, real of_first, real of_pull, int d)
{
    const size_t row = (size_t)blockIdx.x * d;
    const real *unit = diagonal + (SHARED ? 0 : row);
    real first = 0, scale = 0, rest = 0;
    EACH(j, d) {
        const size_t at = row + j;
        const real inverse = mask[at] ? 1 / unit[j] : 0, r = mask[at] ? pull[at] - product[at] : 0;
        residual[at] = r;
        direction[at] = r * inverse;
        first += r * (r * inverse);
        scale += pull[at] * pull[at] * inverse;
        rest += (target[at] - x[at]) * pull[at] - x[at] * r;
    }
    first = summed(first, sums), scale = summed(scale, sums), rest = summed(rest, sums);
    if (threadIdx.x == 0) {
        rho[blockIdx.x] = first;
        tiny[blockIdx.x] = of_first * first + of_pull * scale;
        loss[blockIdx.x] = rest;
    }
}

// From the product with the direction: the next x, residual and direction. active: set to 1 if the row goes on.
extern "C" __global__ void advance(const real *product, const bool *mask, const real *diagonal, real *x, real *residual,
                                real *direction, real *rho, const real *tiny, real *loss, real hardly, int *active,
                                int d)
{
    const size_t row = (size_t)blockIdx.x * d;
    const real *unit = diagonal + (SHARED ? 0 : row);
    const real before = rho[blockIdx.x];
    if (!(before > tiny[blockIdx.x]))
        return;
    real sum = 0;
    EACH(j, d)
        if (mask[row + j])
            sum += direction[row + j] * product[row + j];
    const real curvature = summed(sum, sums), length = curvature > 0 ? before / curvature : 0;
    sum = 0;
    EACH(j, d)
        if (mask[row + j]) {
            x[row + j] += length * direction[row + j];
            const real r = residual[row + j] - length * product[row + j];
            residual[row + j] = r;
            sum += r * (r / unit[j]);
        }
    const real following = summed(sum, sums), ratio = following / before;
    EACH(j, d)
        if (mask[row + j])
            direction[row + j] = residual[row + j] / unit[j] + ratio * direction[row + j];
    if (threadIdx.x == 0) {
        const real gain = length * before, rest = loss[blockIdx.x] - gain;
        const real next = curvature > 0 && gain > hardly * rest ? following : 0;
        loss[blockIdx.x] = rest;
        rho[blockIdx.x] = next;
        if (next > tiny[blockIdx.x])
            *active = 1;
    }
}
