// Products of up to four rows with matrices in bf16 (matrix-vector products): what decoding a few sequences is made of.
// Each matrix is read once, 16 bytes a lane. For one row a block of four warps shares a column of the result; for two to
// four rows a warp has two columns, so that each value of x that it loads is used twice.
#include "common.cuh"

// Threads of a block; src/kernels/cuda/products.rs has the same.
constexpr int PRODUCT_THREADS = 128;

// The dot product of x [k] with one row of a matrix, over the threads of a block, in thread 0. k is a multiple of 8;
// shared memory for 4 floats.
__device__ __forceinline__ float dot_by_block(const bf16* x, const bf16* w, int k, float* scratch) {
    float sum = 0.0f;
    for (int i = threadIdx.x * 8; i < k; i += 2 * PRODUCT_THREADS * 8) {
        // Both loads are on their way before the first is used.
        int second = i + PRODUCT_THREADS * 8;
        uint4 a = *reinterpret_cast<const uint4*>(w + i), b = {0, 0, 0, 0};
        if (second < k) b = *reinterpret_cast<const uint4*>(w + second);
        float values[8];
        load_vector(x + i, values);
        sum += dot_vector(reinterpret_cast<const bf16*>(&a), values);
        if (second < k) {
            load_vector(x + second, values);
            sum += dot_vector(reinterpret_cast<const bf16*>(&b), values);
        }
    }
    sum = warp_sum(sum);
    // What was summed before is read before it is overwritten.
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
    __syncthreads();
    return scratch[0] + scratch[1] + scratch[2] + scratch[3];
}

// The dot products of ROWS rows of x [ROWS, k] with two rows of a matrix, over the lanes of a warp, in each of them.
template <int ROWS>
__device__ __forceinline__ void dot_two(const bf16* x, const bf16* first, const bf16* second, int k, float* of_first,
                                        float* of_second) {
    for (int r = 0; r < ROWS; r++) of_first[r] = of_second[r] = 0.0f;
#pragma unroll 2
    for (int i = threadIdx.x % 32 * 8; i < k; i += 256) {
        uint4 a = *reinterpret_cast<const uint4*>(first + i), b = *reinterpret_cast<const uint4*>(second + i);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float values[8];
            load_vector(x + size_t(r) * k + i, values);
            of_first[r] += dot_vector(reinterpret_cast<const bf16*>(&a), values);
            of_second[r] += dot_vector(reinterpret_cast<const bf16*>(&b), values);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        of_first[r] = warp_sum(of_first[r]);
        of_second[r] = warp_sum(of_second[r]);
    }
}

// A matrix [n, k] with what is added to its product: bias [n], residual [rows, n]; either may be null.
struct Matrix {
    const bf16* weight;
    const float* bias;
    const float* residual;
    float* out;
    int n;
};

__device__ __forceinline__ void store(const Matrix& m, int row, int column, float y) {
    if (m.bias) y += m.bias[column];
    size_t at = size_t(row) * m.n + column;
    m.out[at] = m.residual ? y + m.residual[at] : y;
}

// x Wᵀ + bias + residual of up to three matrices, for one row: a block a column, counted over all of them. Shared memory
// for 4 floats.
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)
    multiply_1(const bf16* x, int k, Matrix first, Matrix second, Matrix third) {
    SHARED_MEMORY(shared);
    int column = blockIdx.x;
    Matrix m = first;
    if (column >= m.n) {
        column -= m.n;
        m = second;
    }
    if (column >= m.n) {
        column -= m.n;
        m = third;
    }
    // The same for all threads of the block.
    if (column >= m.n) return;
    float y = dot_by_block(x, m.weight + size_t(column) * k, k, reinterpret_cast<float*>(shared));
    if (threadIdx.x == 0) store(m, 0, column, y);
}

// The same for ROWS rows: a warp a pair of columns of one matrix.
template <int ROWS>
__device__ __forceinline__ void multiply(const bf16* x, int k, Matrix first, Matrix second, Matrix third) {
    int pair = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    Matrix m = first;
    if (pair >= (m.n + 1) / 2) {
        pair -= (m.n + 1) / 2;
        m = second;
    }
    if (pair >= (m.n + 1) / 2) {
        pair -= (m.n + 1) / 2;
        m = third;
    }
    if (pair >= (m.n + 1) / 2) return;
    int column = 2 * pair, other = min(column + 1, m.n - 1);
    float y[ROWS], of_other[ROWS];
    dot_two<ROWS>(x, m.weight + size_t(column) * k, m.weight + size_t(other) * k, k, y, of_other);
    if (threadIdx.x % 32 != 0) return;
    for (int r = 0; r < ROWS; r++) {
        store(m, r, column, y[r]);
        if (other > column) store(m, r, other, of_other[r]);
    }
}

// activation(x gateᵀ) * (x upᵀ) [1, n], without biases: a block a column. Shared memory for 4 floats.
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)
    multiply_gated_1(const bf16* x, int k, const bf16* gate, const bf16* up, bf16* out, int n, int activation) {
    SHARED_MEMORY(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    float g = dot_by_block(x, gate + size_t(blockIdx.x) * k, k, scratch);
    float u = dot_by_block(x, up + size_t(blockIdx.x) * k, k, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = __float2bfloat16(activate(g, activation) * u);
}

// The same [ROWS, n]: a warp a column.
template <int ROWS>
__device__ __forceinline__ void multiply_gated(const bf16* x, int k, const bf16* gate, const bf16* up, bf16* out, int n,
                                               int activation) {
    int column = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (column >= n) return;
    float gates[ROWS], ups[ROWS];
    dot_two<ROWS>(x, gate + size_t(column) * k, up + size_t(column) * k, k, gates, ups);
    if (threadIdx.x % 32 != 0) return;
    for (int r = 0; r < ROWS; r++) out[size_t(r) * n + column] = __float2bfloat16(activate(gates[r], activation) * ups[r]);
}

#define MULTIPLY(ROWS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)                                                      \
        multiply_##ROWS(const bf16* x, int k, Matrix first, Matrix second, Matrix third) {                             \
        multiply<ROWS>(x, k, first, second, third);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS) multiply_gated_##ROWS(                               \
        const bf16* x, int k, const bf16* gate, const bf16* up, bf16* out, int n, int activation) {                    \
        multiply_gated<ROWS>(x, k, gate, up, out, n, activation);                                                      \
    }
MULTIPLY(2)
MULTIPLY(3)
MULTIPLY(4)
