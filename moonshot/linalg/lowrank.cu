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

constexpr int lanes_at_most = 32;

extern __shared__ real sums[]; // one for each thread, and more where that is said

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

// Element j of S U_i c, the numbers of c being so many places apart.
__device__ real combined(const factor *factors, const real *c, int apart, const real *scale, int j, int n, int m, int d)
{
    real sum = 0;
    for (int k = 0; k < n; ++k)
        sum += factors[((size_t)k * m + blockIdx.x) * d + j] * c[(size_t)k * apart];
    return sum * scaled(scale, j);
}

// Add S U_i c_i to out (m, d), c (n, m). One thread block for each row.
extern "C" __global__ void combine(const factor *factors, const real *c, const real *scale, real *out, int n, int m,
                                   int d)
{
    EACH(j, d)
        out[(size_t)blockIdx.x * d + j] += combined(factors, c + blockIdx.x, m, scale, j, n, m, d);
}

// out[k]: the products of all factors of this block's row with S x_i, in shared memory beyond `sums`. Some lanes share
// a factor.
__device__ void projected(const factor *factors, const real *x, const real *scale, real *out, int n, int m, int d)
{
    const int lanes = blockDim.x < lanes_at_most ? blockDim.x : lanes_at_most, together = blockDim.x / lanes;
    const int lane = threadIdx.x % lanes, own = threadIdx.x / lanes;
    const real *row = x + (size_t)blockIdx.x * d;
    for (int first = 0; first < n; first += together) {
        const int k = first + own;
        const bool busy = own < together && k < n;
        real sum = 0;
        if (busy) {
            const factor *u = factors + ((size_t)k * m + blockIdx.x) * d;
            for (int j = lane; j < d; j += lanes)
                sum += u[j] * (row[j] * scaled(scale, j));
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (busy && lane == 0) {
            for (int other = 1; other < lanes; ++other)
                sum += sums[threadIdx.x + other];
            out[k] = sum;
        }
        __syncthreads();
    }
}

// Add S U_i U_i' S x_i to out (m, d), x (m, d). One thread block for each row.
extern "C" __global__ void apply(const factor *factors, const real *x, const real *scale, real *out, int n, int m,
                                 int d)
{
    real *c = sums + blockDim.x;
    projected(factors, x, scale, c, n, m, d);
    EACH(j, d)
        out[(size_t)blockIdx.x * d + j] += combined(factors, c, 1, scale, j, n, m, d);
}

// Add C_i^-1 (U_i' S x_i - c_i) to c (m, n), and put S U_i c_i into out (m, d); inverses (m, n, n) are the C_i^-1. One
// thread block for each row.
extern "C" __global__ void refresh(const factor *factors, const real *x, const real *inverses, real *c,
                                   const real *scale, real *out, int n, int m, int d)
{
    real *change = sums + blockDim.x, *found = change + n, *own = c + (size_t)blockIdx.x * n;
    projected(factors, x, scale, change, n, m, d);
    EACH(k, n)
        change[k] -= own[k];
    __syncthreads();
    EACH(k, n) {
        real sum = own[k];
        for (int q = 0; q < n; ++q)
            sum += inverses[((size_t)blockIdx.x * n + k) * n + q] * change[q];
        found[k] = own[k] = sum;
    }
    __syncthreads();
    EACH(j, d)
        out[(size_t)blockIdx.x * d + j] = combined(factors, found, 1, scale, j, n, m, d);
}

// out (m, n, n): P_i' P_i, p (d, m, n) being the P_i by column; of columns so many in shared memory at once.
extern "C" __global__ void gram(const real *p, real *out, int tile, int n, int m, int d)
{
    real *total = sums, *columns = total + n * n;
    EACH(e, n * n)
        total[e] = 0;
    for (int start = 0; start < d; start += tile) {
        const int count = d - start < tile ? d - start : tile;
        __syncthreads();
        EACH(e, count * n)
            columns[e] = p[((size_t)(start + e / n) * m + blockIdx.x) * n + e % n];
        __syncthreads();
        EACH(e, n * n) {
            real sum = total[e];
            for (int j = 0; j < count; ++j)
                sum += columns[j * n + e / n] * columns[j * n + e % n];
            total[e] = sum;
        }
    }
    EACH(e, n * n)
        out[(size_t)blockIdx.x * n * n + e] = total[e];
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
