// Optimal Brain Surgeon on a CUDA device: a thread block takes one row of the layer after the other.
//
// obs_batched has the mathematics and the names; all is float64. A thread block has a matrix (d, d), vectors (d,) and
// the columns that wait, `pending`, in global memory of its own. Compiled for
//   BLOCK   columns that wait before the matrix loses them, and columns of a Cholesky panel
//   TILE    of a side of the matrix, in shared memory at once: a multiple of 16
//   LOST    what is left of a diagonal entry of the inverse where its digits are gone
//
// Right for any number of threads up to 256.

#include "linalg/block.cuh"

constexpr int most = 256; // threads
constexpr int side = 16;  // of a square of threads, each with (TILE / side)^2 entries of a tile
constexpr int each = TILE / side;

// matrix[p][c] = source[where p][where c] + sign sum_q pending[q][where p] pending[q][where c], first <= p, c < size.
// pitch, width: what is between rows of the matrices, and of pending. where: null for p and c themselves. The matrices
// may be one where each place stays, or comes from beyond `size`.
__device__ void combine(double *matrix, const double *source, int pitch, const int *where, const double *pending,
                        size_t width, int first, int size, int count, double sign)
{
    __shared__ double left[BLOCK * TILE], right[BLOCK * TILE];
    for (int begin = 0; begin == 0 || begin < count; begin += BLOCK) {
        const int depth = count - begin < BLOCK ? count - begin : BLOCK;
        for (int top = first; top < size; top += TILE)
            for (int start = first; start < size; start += TILE) {
                __syncthreads();
                EACH(e, depth * TILE) {
                    const double *row = pending + (begin + e / TILE) * width;
                    const int p = top + e % TILE, c = start + e % TILE;
                    left[e] = p < size ? sign * row[where ? where[p] : p] : 0;
                    right[e] = c < size ? row[where ? where[c] : c] : 0;
                }
                __syncthreads();
                EACH(thread, side * side) {
                    const int y = thread / side, x = thread % side;
                    double sum[each][each] = {};
                    for (int q = 0; q < depth; ++q)
                        for (int i = 0; i < each; ++i)
                            for (int j = 0; j < each; ++j)
                                sum[i][j] += left[q * TILE + y + i * side] * right[q * TILE + x + j * side];
                    for (int i = 0; i < each; ++i)
                        for (int j = 0; j < each; ++j) {
                            const int p = top + y + i * side, c = start + x + j * side;
                            if (p >= size || c >= size)
                                continue;
                            const double before = begin == 0 && where ? source[(size_t)where[p] * pitch + where[c]]
                                : begin == 0                          ? source[(size_t)p * pitch + c]
                                                                      : matrix[(size_t)p * pitch + c];
                            matrix[(size_t)p * pitch + c] = before + sum[i][j];
                        }
                }
            }
    }
    __syncthreads();
}

// What those waiting take from entry c of a column: sum_q coefficient[q] pending[q][c].
__device__ double waiting(const double *coefficient, const double *pending, int d, int count, int c)
{
    double sum = 0;
    for (int q = 0; q < count; ++q)
        sum += coefficient[q] * pending[(size_t)q * d + c];
    return sum;
}

// Whether a place has nothing that could still go. kind: its group, -1 where the weight has gone.
__device__ bool closed(const int *kind, const int *left, int c)
{
    return kind[c] < 0 || left[kind[c]] == 0;
}

// The place of the cheapest weight, of equals that of the first column.
__device__ int cheapest(const double *weight, const double *diagonal, const int *index, const int *kind,
                        const int *left, int size)
{
    __shared__ double costs[most];
    __shared__ int places[most];
    double least = 0;
    int place = -1;
    EACH(c, size) {
        if (closed(kind, left, c))
            continue;
        const double cost = weight[c] * weight[c] / diagonal[c];
        if (place < 0 || cost < least || (cost == least && index[c] < index[place]))
            least = cost, place = c;
    }
    costs[threadIdx.x] = least, places[threadIdx.x] = place;
    __syncthreads();
    for (int count = blockDim.x; count > 1;) { // the second half is merged into the first
        const int half = (count + 1) / 2, mine = threadIdx.x, other = mine + half;
        if (other < count && places[other] >= 0
            && (places[mine] < 0 || costs[other] < costs[mine]
                || (costs[other] == costs[mine] && index[places[other]] < index[places[mine]])))
            costs[mine] = costs[other], places[mine] = places[other];
        __syncthreads();
        count = half;
    }
    return places[0];
}

// Where each place that stays open comes from: itself, or beyond those that stay; returns how many do.
__device__ int packed(const int *kind, const int *left, int *where, int size)
{
    __shared__ int open;
    if (threadIdx.x == 0) {
        int count = 0;
        for (int c = 0; c < size; ++c)
            count += !closed(kind, left, c);
        int from = count;
        for (int p = 0; p < count; ++p) {
            where[p] = p;
            if (closed(kind, left, p)) {
                while (closed(kind, left, from))
                    ++from;
                where[p] = from++;
            }
        }
        open = count;
    }
    __syncthreads();
    return open;
}

// order, increments: (m, total); done: (m); columns: (n, m, d); weights: (m, d); groups: (d); quotas: (kinds).
// Work space of each thread block: matrices (d, d), vectors (3 + max(n, BLOCK), d), integers (3 d + kinds).
extern "C" __global__ void trace(const double *inverse, const double *columns, const double *weights,
                                 const int *groups, const int *quotas, long long *order, double *increments,
                                 long long *done, double *matrices, double *vectors, int *integers, int n, int m,
                                 int d, int total, int kinds)
{
    __shared__ double coefficient[BLOCK];
    __shared__ int lost;
    const int room = n > BLOCK ? n : BLOCK;
    double *matrix = matrices + (size_t)blockIdx.x * d * d;
    double *weight = vectors + (size_t)blockIdx.x * (3 + room) * d, *diagonal = weight + d, *floor = diagonal + d;
    double *pending = floor + d;
    int *index = integers + (size_t)blockIdx.x * (3 * d + kinds), *kind = index + d, *where = kind + d;
    int *left = where + d;

    for (int row = blockIdx.x; row < m; row += gridDim.x) {
        const double *source = inverse;
        int size = d, count = n, removed = 0;
        __syncthreads();
        if (threadIdx.x == 0)
            lost = 0;
        EACH(g, kinds)
            left[g] = quotas[g];
        __syncthreads();
        EACH(c, d) {
            double rest = inverse[(size_t)c * (d + 1)];
            floor[c] = LOST * rest;
            for (int k = 0; k < n; ++k) {
                const double u = columns[((size_t)k * m + row) * d + c];
                pending[(size_t)k * d + c] = u;
                rest -= u * u;
            }
            weight[c] = weights[(size_t)row * d + c];
            diagonal[c] = rest;
            index[c] = c;
            kind[c] = groups[c];
            if (!(rest >= floor[c]))
                lost = 1;
        }
        __syncthreads();
        while (removed < total && !lost) {
            if (count >= BLOCK) {
                const int open = packed(kind, left, where, size);
                combine(matrix, source, d, where, pending, d, 0, open, count, -1);
                EACH(p, open) {
                    const int from = where[p];
                    weight[p] = weight[from];
                    diagonal[p] = diagonal[from];
                    floor[p] = floor[from];
                    index[p] = index[from];
                    kind[p] = kind[from];
                }
                source = matrix, size = open, count = 0;
                __syncthreads();
            }
            const int place = cheapest(weight, diagonal, index, kind, left, size);
            EACH(q, count)
                coefficient[q] = pending[(size_t)q * d + place];
            const double pivot = diagonal[place], value = weight[place], root = 1 / sqrt(pivot);
            __syncthreads();
            EACH(c, size) {
                if (c == place || closed(kind, left, c))
                    continue;
                const double column = source[(size_t)place * d + c] - waiting(coefficient, pending, d, count, c);
                const double loss = column * root;
                pending[(size_t)count * d + c] = loss;
                weight[c] -= value * root * loss;
                diagonal[c] -= loss * loss;
                if (!(diagonal[c] >= floor[c]))
                    lost = 1;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                order[(size_t)row * total + removed] = index[place];
                increments[(size_t)row * total + removed] = value * value / pivot;
                left[kind[place]] -= 1;
                kind[place] = -1;
            }
            ++removed, ++count;
            __syncthreads();
        }
        if (threadIdx.x == 0)
            done[row] = removed;
    }
}

// x becomes the solution of a system (size, size), of which the upper triangle becomes the Cholesky factor's; returns
// the smallest pivot, relative to the diagonal of whole (d, d). panel: (BLOCK, d).
__device__ double cholesky_solve(double *matrix, double *x, double *panel, const double *whole, const int *where,
                                 int size, int d)
{
    __shared__ double coefficient[BLOCK], sums[most];
    double smallest = 1;
    for (int start = 0; start < size; start += BLOCK) {
        const int stop = start + BLOCK < size ? start + BLOCK : size;
        for (int j = start; j < stop; ++j) {
            double *column = panel + (size_t)(j - start) * d, *upper = matrix + (size_t)j * d;
            EACH(q, j - start)
                coefficient[q] = panel[(size_t)q * d + j];
            __syncthreads();
            EACH(c, size - j)
                column[j + c] = upper[j + c] - waiting(coefficient, panel, d, j - start, j + c);
            __syncthreads();
            const double pivot = column[j], root = sqrt(pivot), value = x[j] / root;
            const double share = pivot / whole[(size_t)where[j] * (d + 1)];
            smallest = share < smallest ? share : smallest;
            if (!(pivot > 0))
                return share < 0 ? share : 0;
            __syncthreads();
            EACH(c, size - j) {
                const double entry = column[j + c] / root;
                column[j + c] = upper[j + c] = entry;
                x[j + c] = c ? x[j + c] - value * entry : value;
            }
            __syncthreads();
        }
        combine(matrix, matrix, d, nullptr, panel, d, stop, size, stop - start, -1);
    }
    for (int j = size - 1; j >= 0; --j) {
        const double *upper = matrix + (size_t)j * d;
        double sum = 0;
        EACH(c, size - j - 1)
            sum += upper[j + 1 + c] * x[j + 1 + c];
        sum = summed(sum, sums);
        if (threadIdx.x == 0)
            x[j] = (x[j] - sum) / upper[j];
        __syncthreads();
    }
    return smallest;
}

// whole: (d, d); factors: (n, m, d); right, chosen, out: (m, d), out zero before; pivots: (m).
// Work space of each thread block: matrices (d, d), vectors (1 + BLOCK, d), integers (d).
extern "C" __global__ void solve_restricted(const double *whole, const double *factors, double sign,
                                            const double *right, const bool *chosen, double *out, double *pivots,
                                            double *matrices, double *vectors, int *integers, int n, int m, int d)
{
    __shared__ int size;
    double *matrix = matrices + (size_t)blockIdx.x * d * d;
    double *x = vectors + (size_t)blockIdx.x * (1 + BLOCK) * d, *panel = x + d;
    int *where = integers + (size_t)blockIdx.x * d;
    for (int row = blockIdx.x; row < m; row += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) {
            size = 0;
            for (int c = 0; c < d; ++c)
                if (chosen[(size_t)row * d + c])
                    where[size++] = c;
        }
        __syncthreads();
        combine(matrix, whole, d, where, factors + (size_t)row * d, (size_t)m * d, 0, size, n, sign);
        EACH(p, size)
            x[p] = right[(size_t)row * d + where[p]];
        __syncthreads();
        const double pivot = cholesky_solve(matrix, x, panel, whole, where, size, d);
        if (pivot > 0)
            EACH(p, size)
                out[(size_t)row * d + where[p]] = x[p];
        if (threadIdx.x == 0)
            pivots[row] = pivot;
    }
}
