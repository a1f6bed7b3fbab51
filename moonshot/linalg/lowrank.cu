// Products with every row's factors, in coordinates scaled by S = diag(scale). factors: (n, m, d); scale: (d,).
//
//   FACTOR   float or double, the factors' type
//   REAL     float or double, that of all else
//   SCALED   0 for S = I: scale is not read then
//
// Right for any number of threads.

#include "linalg/block.cuh"

typedef FACTOR factor;
typedef REAL real;

extern __shared__ real sums[]; // one for each thread

__device__ real scaled(const real *scale, int j)
{
    return SCALED ? scale[j] : 1;
}

// out (n, m): U_i' S x_i, x (m, d). One thread block for each of them.
extern "C" __global__ void project(const factor *factors, const real *x, const real *scale, real *out, int m, int d)
{
    const factor *u = factors + (size_t)blockIdx.x * d;
    const real *row = x + (size_t)(blockIdx.x % m) * d;
    real sum = 0;
    EACH(j, d)
        sum += u[j] * (row[j] * scaled(scale, j));
    sum = summed(sum, sums);
    if (threadIdx.x == 0)
        out[blockIdx.x] = sum;
}

// Add S U_i c_i to out (m, d), c (n, m). One thread block for each row.
extern "C" __global__ void combine(const factor *factors, const real *c, const real *scale, real *out, int n, int m,
                                   int d)
{
    EACH(j, d) {
        real sum = 0;
        for (int k = 0; k < n; ++k)
            sum += factors[((size_t)k * m + blockIdx.x) * d + j] * c[(size_t)k * m + blockIdx.x];
        out[(size_t)blockIdx.x * d + j] += sum * scaled(scale, j);
    }
}

// Add the diagonals of S U_i U_i' S to out (m, d). One thread block for each row.
extern "C" __global__ void diagonal(const factor *factors, const real *scale, real *out, int n, int m, int d)
{
    EACH(j, d)
        for (int k = 0; k < n; ++k) {
            const real u = factors[((size_t)k * m + blockIdx.x) * d + j] * scaled(scale, j);
            out[(size_t)blockIdx.x * d + j] += u * u;
        }
}
