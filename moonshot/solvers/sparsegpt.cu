// The sequential sweep on a CUDA device: one row of the layer is one thread block, its state is in shared memory.
//
// sparsegpt_batched has the mathematics and the names. Compiled for one type and number of factors each:
//   REAL    float or double
//   RANK    factors of a row, n
//   TILED   columns whose p and t are in shared memory at once
// How much shared memory each kernel needs is said by sparsegpt_cuda.shared_bytes.
//
// a, z, keep: (d, m); r: (d, d); p, t: (d, m, n); phi: (d, m); residual: (m, n). Right for any number of threads.

#include "linalg/block.cuh"

typedef REAL real;
constexpr int rank = RANK, width = RANK ? RANK : 1;
constexpr int tiled = TILED;

extern __shared__ real shared[];

// What is read from shared memory at once. What `best_step` reads lies at its multiples where `rank` is one.
constexpr int at_once = 16 / sizeof(real);
struct alignas(16) pack { real of[at_once]; };

// mu = t' r
__device__ real best_step(const real *gain, const real *rest)
{
    real sum = 0;
    if (rank % at_once == 0) {
        for (int k = 0; k < rank; k += at_once) {
            const pack t = *reinterpret_cast<const pack *>(gain + k), r = *reinterpret_cast<const pack *>(rest + k);
            for (int q = 0; q < at_once; ++q)
                sum += t.of[q] * r.of[q];
        }
    } else {
        for (int k = 0; k < rank; ++k)
            sum += gain[k] * rest[k];
    }
    return sum;
}

// Put the p, then the t, of `count` columns from `first` on into a tile: each column would be waited for otherwise.
__device__ void fetch(int first, int count, const real *p, const real *t, real *tile, int m)
{
    EACH(e, count * rank) {
        const size_t at = ((size_t)(first + e / width) * m + blockIdx.x) * rank + e % width;
        tile[e] = p[at];
        tile[tiled * rank + e] = t[at];
    }
    __syncthreads();
}

// Give column j, whose p is in the tile, the value of z that is `step`: value begins with column `first` and has `count`
// of them.
__device__ void take_step(int j, real step, const real *column, const real *r, real *rest, real *value, int first,
                          int count, int d)
{
    EACH(k, rank)
        rest[k] -= column[k] * step;
    EACH(q, first + count - j)
        value[j - first + q] += r[(size_t)j * d + j + q] * step;
}

// Turn the values of `count` columns from `first` on into what pruning each costs; `rest` is used up.
__device__ void look_ahead(real *cost, int first, int count, const real *r, const real *p, const real *t,
                           const real *phi, real *rest, real *tile, int d, int m)
{
    for (int begin = first; rank && begin < first + count; begin += tiled) {
        const int left = first + count - begin, here = left < tiled ? left : tiled;
        fetch(begin, here, p, t, tile, m);
        for (int q = 0; q < here; ++q) {
            const real step = best_step(tile + (tiled + q) * rank, rest);
            __syncthreads();
            take_step(begin + q, step, tile + q * rank, r, rest, cost, first, count, d);
            __syncthreads();
        }
    }
    EACH(j, count) {
        const real pivot = r[(size_t)(first + j) * (d + 1)];
        cost[j] *= cost[j] / (pivot * pivot * phi[(size_t)(first + j) * m + blockIdx.x]);
    }
    __syncthreads();
}

// Fix columns first..last and compensate those up to `stop` in `value`, which begins with column `start`. fetched:
// whether all of these columns are in the tile.
__device__ void fix(int first, int last, const real *r, const real *p, const real *t, const bool *keep, real *rest,
                    real *tile, bool fetched, real *value, real *z, int start, int stop, int d, int m)
{
    for (int begin = first; begin < last; begin += tiled) {
        const int here = last - begin < tiled ? last - begin : tiled;
        if (rank && !fetched)
            fetch(begin, here, p, t, tile, m);
        for (int q = 0; q < here; ++q) {
            const int j = begin + q;
            const size_t at = (size_t)j * m + blockIdx.x;
            const bool kept = keep[at];
            const real step =
                kept ? best_step(tile + (tiled + q) * rank, rest) : -value[j - start] / r[(size_t)j * (d + 1)];
            __syncthreads();
            take_step(j, step, tile + q * rank, r, rest, value, start, stop - start, d);
            if (threadIdx.x == 0) {
                z[at] = step;
                value[j - start] = kept ? value[j - start] : 0; // which this thread has just added to
            }
            __syncthreads();
        }
    }
}

__device__ void load(real *value, real *rest, const real *a, const real *residual, int start, int stop, int m)
{
    EACH(j, stop - start)
        value[j] = a[(size_t)(start + j) * m + blockIdx.x];
    EACH(k, rank)
        rest[k] = residual[(size_t)blockIdx.x * rank + k];
    __syncthreads();
}

__device__ void store(const real *value, const real *rest, real *a, real *residual, int start, int stop, int m)
{
    EACH(j, stop - start)
        a[(size_t)(start + j) * m + blockIdx.x] = value[j];
    EACH(k, rank)
        residual[(size_t)blockIdx.x * rank + k] = rest[k];
}

// A column of the state is in a thread's registers where it is short and there is a thread for each.
constexpr bool is_short = rank && rank <= 32 && rank % at_once == 0;
constexpr int held = is_short ? rank : 1;

extern "C" __global__ void gains(const real *p, real share, real *t, real *phi, int d, int m)
{
    real *u = shared, *next = u + rank, *tile = next + rank, *inverse = tile + (tiled + 1) * rank;
    const bool holds = is_short && rank <= blockDim.x;
    real own[held];
    for (int q = 0; q < held; ++q)
        own[q] = q == threadIdx.x ? share : 0;
    EACH(e, holds ? 0 : rank * rank)
        inverse[e] = e % (rank + 1) ? 0 : share;
    EACH(k, rank)
        u[k] = share * p[((size_t)(d - 1) * m + blockIdx.x) * rank + k];
    for (int top = d; top > 0; top -= tiled) {
        const int first = top > tiled ? top - tiled : 0;
        EACH(e, (top - first + 1) * rank) { // one column more than are worked through, for the u after them
            const int j = first - 1 + e / width;
            tile[e] = j < 0 ? 0 : p[((size_t)j * m + blockIdx.x) * rank + e % width];
        }
        __syncthreads();
        for (int j = top - 1; j >= first; --j) {
            const size_t at = (size_t)j * m + blockIdx.x;
            const real *below = tile + (j - first) * rank;
            const real shrink = 1 / (1 + best_step(u, below + rank));
            EACH(k, rank) { // of column k, which is row k: both are rounded alike
                const real mine = u[k];
                real sum = 0;
                t[at * rank + k] = shrink * mine;
                if (holds) {
                    for (int first = 0; first < held; first += at_once) {
                        const pack all = *reinterpret_cast<const pack *>(u + first);
                        const pack next_column = *reinterpret_cast<const pack *>(below + first);
                        for (int q = 0; q < at_once && q < held; ++q) {
                            own[first + q] -= shrink * (all.of[q] * mine);
                            sum += own[first + q] * next_column.of[q];
                        }
                    }
                } else {
                    for (int q = 0; q < rank; ++q) {
                        inverse[q * rank + k] -= shrink * (u[q] * mine);
                        sum += inverse[q * rank + k] * below[q];
                    }
                }
                next[k] = sum;
            }
            if (threadIdx.x == 0)
                phi[at] = shrink;
            __syncthreads();
            real *const used = u;
            u = next;
            next = used;
        }
    }
}

extern "C" __global__ void scores(const real *a, const real *r, const real *p, const real *t, const real *phi,
                                  const real *residual, real *out, int start, int stop, int d, int m)
{
    real *tile = shared, *rest = tile + 2 * tiled * rank, *cost = rest + rank;
    load(cost, rest, a, residual, start, stop, m);
    look_ahead(cost, start, stop - start, r, p, t, phi, rest, tile, d, m);
    EACH(j, stop - start)
        out[(size_t)j * m + blockIdx.x] = cost[j];
}

extern "C" __global__ void sweep(real *a, const real *r, const real *p, const real *t, real *residual,
                                 const bool *keep, real *z, int start, int stop, int d, int m)
{
    real *tile = shared, *rest = tile + 2 * tiled * rank, *value = rest + rank;
    load(value, rest, a, residual, start, stop, m);
    fix(start, stop, r, p, t, keep, rest, tile, false, value, z, start, stop, d, m);
    store(value, rest, a, residual, start, stop, m);
}

extern "C" __global__ void sweep_groups(real *a, const real *r, const real *p, const real *t, const real *phi,
                                        real *residual, bool *keep, real *z, int start, int stop, int kept,
                                        int group, int d, int m)
{
    real *tile = shared, *rest = tile + 2 * tiled * rank, *ahead = rest + rank, *value = ahead + rank;
    real *cost = value + stop - start;
    load(value, rest, a, residual, start, stop, m);
    for (int first = start; first < stop; first += group) {
        EACH(j, group)
            cost[j] = value[first - start + j];
        EACH(k, rank)
            ahead[k] = rest[k];
        __syncthreads();
        look_ahead(cost, first, group, r, p, t, phi, ahead, tile, d, m);
        EACH(j, group) {
            int cheaper = 0; // of equals, the earlier
            for (int q = 0; q < group; ++q)
                cheaper += cost[q] < cost[j] || (cost[q] == cost[j] && q < j);
            keep[(size_t)(first + j) * m + blockIdx.x] = cheaper >= group - kept;
        }
        __syncthreads();
        fix(first, first + group, r, p, t, keep, rest, tile, group <= tiled, value, z, start, stop, d, m);
    }
    store(value, rest, a, residual, start, stop, m);
}
