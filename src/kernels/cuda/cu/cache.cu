// Writing the key-value cache: keys and values of a step's rows, and copies of blocks. attention.cu says how it lies.
#include "common.cuh"

// Rotary embedding of queries and keys, and the writing of keys and values, in one: q [t, heads * dim] is rotated to
// q_out, k [t, kv_heads * dim] to its row's slot, and v goes there as it is. Rows of q, k and v begin every so many values.
// cos and sin are [t, half]; half is 0 where nothing is rotated, and q then stays where it is. Grid: (t, any).
template <class T>
__device__ __forceinline__ void rotate_and_write(const float* q, const float* k, const float* v, int q_stride, int k_stride,
                                                 int v_stride, const float* cos, const float* sin, int half,
                                                 const unsigned* slot, float* q_out, T* keys, T* values, int heads,
                                                 int kv_heads, int dim) {
    size_t row = blockIdx.x;
    unsigned block = slot[row] / BLOCK_SIZE, place = slot[row] % BLOCK_SIZE;
    auto rotated = [&](const float* x, int i) {
        int d = i % dim;
        if (d < half) return x[i] * cos[row * half + d] - x[i + half] * sin[row * half + d];
        if (d < 2 * half) return x[i] * cos[row * half + d - half] + x[i - half] * sin[row * half + d - half];
        return x[i];
    };
    int queries = half > 0 ? heads * dim : 0, width = kv_heads * dim;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < queries + width; i += gridDim.y * blockDim.x) {
        if (i < queries) {
            q_out[row * heads * dim + i] = rotated(q + row * q_stride, i);
        } else {
            int j = i - queries;
            size_t to = ((size_t(block) * kv_heads + j / dim) * BLOCK_SIZE + place) * dim + j % dim;
            keys[to] = from_float<T>(rotated(k + row * k_stride, j));
            values[to] = from_float<T>(v[row * v_stride + j]);
        }
    }
}
extern "C" __global__ void rotate_and_write_bf16(const float* q, const float* k, const float* v, int q_stride, int k_stride,
                                                 int v_stride, const float* cos, const float* sin, int half,
                                                 const unsigned* slot, float* q_out, bf16* keys, bf16* values, int heads,
                                                 int kv_heads, int dim) {
    rotate_and_write(q, k, v, q_stride, k_stride, v_stride, cos, sin, half, slot, q_out, keys, values, heads, kv_heads, dim);
}
extern "C" __global__ void rotate_and_write_f32(const float* q, const float* k, const float* v, int q_stride, int k_stride,
                                                int v_stride, const float* cos, const float* sin, int half,
                                                const unsigned* slot, float* q_out, float* keys, float* values, int heads,
                                                int kv_heads, int dim) {
    rotate_and_write(q, k, v, q_stride, k_stride, v_stride, cos, sin, half, slot, q_out, keys, values, heads, kv_heads, dim);
}

// Copies the first `slots` positions of one block of one layer to another. Grid: kv_heads.
template <class T>
__device__ __forceinline__ void copy_slots(T* keys, T* values, unsigned from, unsigned to, int slots, int dim) {
    size_t tile = size_t(BLOCK_SIZE) * dim;
    size_t source = (size_t(from) * gridDim.x + blockIdx.x) * tile, target = (size_t(to) * gridDim.x + blockIdx.x) * tile;
    for (int i = threadIdx.x; i < slots * dim; i += blockDim.x) {
        keys[target + i] = keys[source + i];
        values[target + i] = values[source + i];
    }
}
extern "C" __global__ void copy_slots_bf16(bf16* keys, bf16* values, unsigned from, unsigned to, int slots, int dim) {
    copy_slots(keys, values, from, to, slots, dim);
}
extern "C" __global__ void copy_slots_f32(float* keys, float* values, unsigned from, unsigned to, int slots, int dim) {
    copy_slots(keys, values, from, to, slots, dim);
}
