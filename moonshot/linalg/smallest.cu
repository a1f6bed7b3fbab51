// The k smallest of each row of `scores` (rows, columns), of equals the first: a mask, as on the CPU.
//
//   REAL    float or double
//   BITS    unsigned int or unsigned long long, as wide
//   FEW     columns of `few`
//   CHUNK   entries of a row that one thread block looks at
//
// `few` compares all pairs, a row per thread. Longer rows have their threshold found eight bits at a time from the
// top: `count` counts the digits of what agrees with the bits found so far, `narrow` takes the digit in which the k-th
// smallest lies. Then `mark` takes what is below the threshold and as many of those equal to it as are missing.
// Right for any number of threads. Rows have their chunks one after the other.

#include "linalg/block.cuh"

typedef REAL real;
typedef BITS bits;

constexpr int digits = 256;

// A number's bits, so that numbers are ordered as these are: a comparison of the numbers themselves may take the
// smallest for zero.
__device__ bits ordered(real score)
{
    union { real number; bits pattern; } both;
    both.number = score;
    const bits sign = (bits)1 << (8 * sizeof(bits) - 1);
    if (both.pattern == sign) // -0 is 0
        return sign;
    return both.pattern & sign ? ~both.pattern : both.pattern | sign;
}

extern "C" __global__ void few(const real *scores, bool *mask, int rows, int k)
{
    for (size_t row = (size_t)blockIdx.x * blockDim.x + threadIdx.x; row < rows; row += (size_t)gridDim.x * blockDim.x) {
        bits score[FEW];
        for (int j = 0; j < FEW; ++j)
            score[j] = ordered(scores[row * FEW + j]);
        for (int j = 0; j < FEW; ++j) {
            int smaller = 0;
            for (int q = 0; q < FEW; ++q)
                smaller += score[q] < score[j] || (score[q] == score[j] && q < j);
            mask[row * FEW + j] = smaller < k;
        }
    }
}

// Add to counts (rows, 256) the digits, `shift` bits up, of what agrees with threshold (rows) above them.
extern "C" __global__ void count(const real *scores, const bits *threshold, int *counts, int columns, int chunks,
                                 int shift)
{
    __shared__ int own[digits];
    const int row = blockIdx.x / chunks, start = blockIdx.x % chunks * CHUNK;
    const int length = columns - start < CHUNK ? columns - start : CHUNK;
    const real *here = scores + (size_t)row * columns + start;
    const bits found = threshold[row];
    EACH(digit, digits)
        own[digit] = 0;
    __syncthreads();
    EACH(j, length) {
        const bits value = ordered(here[j]);
        if ((value ^ found) >> shift >> 8 == 0) // in two steps: a shift by all bits is undefined
            atomicAdd(&own[value >> shift & (digits - 1)], 1);
    }
    __syncthreads();
    EACH(digit, digits)
        if (own[digit])
            atomicAdd(&counts[row * (size_t)digits + digit], own[digit]);
}

// Find the next digit of threshold (rows), whose `missing` (rows) smallest are wanted; `equal` (rows) says how many
// have it. counts is zero again.
extern "C" __global__ void narrow(int *counts, bits *threshold, int *missing, int *equal, int shift)
{
    __shared__ int own[digits];
    EACH(digit, digits) {
        own[digit] = counts[blockIdx.x * (size_t)digits + digit];
        counts[blockIdx.x * (size_t)digits + digit] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int left = missing[blockIdx.x], digit = 0;
        while (own[digit] < left)
            left -= own[digit++];
        threshold[blockIdx.x] |= (bits)digit << shift;
        missing[blockIdx.x] = left;
        equal[blockIdx.x] = own[digit];
    }
}

// How many of each chunk are equal to the threshold, where not all of those are wanted: ties (rows, chunks).
extern "C" __global__ void count_ties(const real *scores, const bits *threshold, const int *missing, const int *equal,
                                      int *ties, int columns, int chunks)
{
    __shared__ int own;
    const int row = blockIdx.x / chunks, start = blockIdx.x % chunks * CHUNK;
    const int length = columns - start < CHUNK ? columns - start : CHUNK;
    if (missing[row] == equal[row])
        return;
    const real *here = scores + (size_t)row * columns + start;
    if (threadIdx.x == 0)
        own = 0;
    __syncthreads();
    int found = 0;
    EACH(j, length)
        found += ordered(here[j]) == threshold[row];
    if (found)
        atomicAdd(&own, found);
    __syncthreads();
    if (threadIdx.x == 0)
        ties[blockIdx.x] = own;
}

extern "C" __global__ void mark(const real *scores, const bits *threshold, const int *missing, const int *equal,
                                const int *ties, bool *mask, int columns, int chunks)
{
    extern __shared__ int before[]; // of each thread's entries, the ties
    __shared__ int earlier;
    const int row = blockIdx.x / chunks, chunk = blockIdx.x % chunks, start = chunk * CHUNK;
    const int length = columns - start < CHUNK ? columns - start : CHUNK;
    const size_t offset = (size_t)row * columns + start;
    const bits limit = threshold[row];
    const bool all = missing[row] == equal[row];
    if (all || ties[blockIdx.x] == 0) {
        EACH(j, length) {
            const bits value = ordered(scores[offset + j]);
            mask[offset + j] = value < limit || (all && value == limit);
        }
        return;
    }
    if (threadIdx.x == 0)
        earlier = 0;
    __syncthreads();
    int found = 0;
    EACH(other, chunk)
        found += ties[(size_t)row * chunks + other];
    if (found)
        atomicAdd(&earlier, found);

    const int share = (length + blockDim.x - 1) / blockDim.x; // entries of a thread, one after the other
    const int first = threadIdx.x * share, last = first + share < length ? first + share : length;
    found = 0;
    for (int j = first; j < last; ++j)
        found += ordered(scores[offset + j]) == limit;
    before[threadIdx.x] = found;
    __syncthreads();
    int rank = earlier;
    for (int other = 0; other < threadIdx.x; ++other)
        rank += before[other];
    for (int j = first; j < last; ++j) {
        const bits value = ordered(scores[offset + j]);
        const bool tie = value == limit;
        mask[offset + j] = value < limit || (tie && rank < missing[row]);
        rank += tie;
    }
}
