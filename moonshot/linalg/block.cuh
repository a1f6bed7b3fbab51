// What the threads of a block do together.

#define EACH(i, count) for (int i = threadIdx.x; i < (count); i += blockDim.x)

// The sum of each thread's number. sums: shared, one for each thread.
template <class T> __device__ T summed(T number, T *sums)
{
    sums[threadIdx.x] = number;
    __syncthreads();
    for (int count = blockDim.x; count > 1;) { // the second half is added to the first
        const int half = (count + 1) / 2;
        if (threadIdx.x + half < count)
            sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
        count = half;
    }
    const T sum = sums[0];
    __syncthreads();
    return sum;
}
