// Products with every row's factors. factors: (n, m, d).
//
//   FACTOR   float or double, the factors' type
//   REAL     float or double, that of all else
//
// Right for any number of threads.

typedef FACTOR factor;
typedef REAL real;

extern __shared__ real sums[]; // one for each thread

#define EACH(i, count) for (int i = threadIdx.x; i < (count); i += blockDim.x)

// out (n, m): U_i' x_i, x (m, d). One thread block for each of them.
extern "C" __global__ void project(const factor *factors, const real *x, real *out, int m, int d)
{
    const factor *u = factors + (size_t)blockIdx.x * d;
    const real *row = x + (size_t)(blockIdx.x % m) * d;
    real sum = 0;
    EACH(j, d)
        sum += u[j] * row[j];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int count = blockDim.x; count > 1;) { // the second half is added to the first
        const int half = (count + 1) / 2;
        if (threadIdx.x + half < count)
            sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
        count = half;
    }
    if (threadIdx.x == 0)
        out[blockIdx.x] = sums[0];
}

// out (m, d): U_i c_i, c (n, m). One thread block for each row.
extern "C" __global__ void combine(const factor *factors, const real *c, real *out, int n, int m, int d)
{
    EACH(j, d) {
        real sum = 0;
        for (int k = 0; k < n; ++k)
            sum += factors[((size_t)k * m + blockIdx.x) * d + j] * c[(size_t)k * m + blockIdx.x];
        out[(size_t)blockIdx.x * d + j] = sum;
    }
}
