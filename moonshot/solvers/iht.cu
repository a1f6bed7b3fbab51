// The steps of IHT between products with the rows' matrices; iht_steps.py says what they compute. One thread block for
// each row.
//
//   REAL     float or double
//   SHARED   1 if all rows have one diagonal (d,), 0 if each has its own (m, d)
//
// step, rise, lower, moved, changed: (m,); all else: (m, d). Right for any number of threads.

#include "linalg/block.cuh"

typedef REAL real;

extern __shared__ real sums[]; // one for each thread

extern "C" __global__ void descended(const real *x, const real *gradient, const real *step, const real *diagonal,
                                     real *y, real *scores, int d)
{
    const size_t row = (size_t)blockIdx.x * d;
    const real *unit = diagonal + (SHARED ? 0 : row);
    EACH(j, d) {
        const real to = x[row + j] - step[blockIdx.x] * gradient[row + j] / unit[j];
        y[row + j] = to;
        scores[row + j] = unit[j] * (to * to);
    }
}

extern "C" __global__ void restricted(const bool *mask, const bool *before, real *y, bool *changed, int d)
{
    const size_t row = (size_t)blockIdx.x * d;
    real count = 0;
    EACH(j, d) {
        if (!mask[row + j])
            y[row + j] = 0;
        count += mask[row + j] != before[row + j];
    }
    count = summed(count, sums);
    if (threadIdx.x == 0)
        changed[blockIdx.x] = count > 0;
}

// product: of the row's matrix with `to` at first, the gradient there at last.
extern "C" __global__ void compared(const real *x, const real *gradient, const real *to, const real *pull,
                                    real *product, real *rise, int d)
{
    const size_t row = (size_t)blockIdx.x * d;
    real sum = 0;
    EACH(j, d) {
        const real there = product[row + j] - pull[row + j];
        product[row + j] = there;
        sum += (to[row + j] - x[row + j]) * (there + gradient[row + j]);
    }
    sum = summed(sum, sums);
    if (threadIdx.x == 0)
        rise[blockIdx.x] = sum;
}

// to, gradient_there: those of the point that is taken at last.
extern "C" __global__ void taken(const bool *lower, const bool *moved, const real *x, const real *gradient,
                                 const bool *mask, const bool *mask_there, const real *step, real longer, real shorter,
                                 real *to, real *gradient_there, bool *mask_taken, real *next, int d)
{
    const size_t row = (size_t)blockIdx.x * d;
    const bool goes = lower[blockIdx.x];
    EACH(j, d) {
        mask_taken[row + j] = goes ? mask_there[row + j] : mask[row + j];
        if (!goes) {
            to[row + j] = x[row + j];
            gradient_there[row + j] = gradient[row + j];
        }
    }
    if (threadIdx.x == 0)
        next[blockIdx.x] = step[blockIdx.x] * (!moved[blockIdx.x] ? 1 : goes ? longer : shorter);
}
