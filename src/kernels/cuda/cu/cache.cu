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
    auto turned = [&](const float* x, int i) { return rotated(x + i, i % dim, cos + row * half, sin + row * half, half); };
    int queries = half > 0 ? heads * dim : 0, width = kv_heads * dim;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < queries + width; i += gridDim.y * blockDim.x) {
        if (i < queries) {
            q_out[row * heads * dim + i] = turned(q + row * q_stride, i);
        } else {
            int j = i - queries;
            size_t to = ((size_t(block) * kv_heads + j / dim) * BLOCK_SIZE + place) * dim + j % dim;
            keys[to] = from_float<T>(turned(k + row * k_stride, j));
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

// rotate_and_write after a root-mean-square norm of each head of queries and keys, by weights [dim], in one. A warp has a head:
// of the queries, or of the keys with its values. Queries go to q_out also where nothing is rotated. Sums run in the order in
// which rms_norm adds a row of `dim` values with as many warps as src/kernels/cuda/module.rs gives it, so the results are
// those of the norms and rotate_and_write one after another. Grid: (t, heads and kv_heads by the warps of a block); shared
// memory for `dim` floats a warp.
template <class T>
__device__ __forceinline__ void norm_rotate_and_write(const float* q, const float* k, const float* v, int q_stride,
                                                      int k_stride, int v_stride, const float* q_weight,
                                                      const float* k_weight, float q_eps, float k_eps, const float* cos,
                                                      const float* sin, int half, const unsigned* slot, float* q_out,
                                                      T* keys, T* values, int heads, int kv_heads, int dim) {
    SHARED_MEMORY(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, unit = blockIdx.y * (blockDim.x / 32) + warp;
    if (unit >= heads + kv_heads) return;
    size_t row = blockIdx.x;
    bool is_query = unit < heads;
    int head = is_query ? unit : unit - heads;
    const float* x = is_query ? q + row * q_stride + head * dim : k + row * k_stride + head * dim;
    const float* weight = is_query ? q_weight : k_weight;

    float squares = 0.0f;
    int warps = (dim + 127) / 128;
    for (int w = 0; w < warps; w++) {
        float own = 0.0f;
        if (dim % 4 == 0) {
            int i = 4 * (lane + 32 * w);
            if (i < dim) own += sum_of_squares(float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
        } else {
            for (int i = lane + 32 * w; i < dim; i += 32 * warps) own += x[i] * x[i];
        }
        squares += warp_sum(own);
    }
    float scale = 1.0f / sqrtf(squares / dim + (is_query ? q_eps : k_eps));
    float* normed = reinterpret_cast<float*>(shared) + warp * dim;
    for (int i = lane; i < dim; i += 32) normed[i] = x[i] * scale * weight[i];
    __syncwarp();

    size_t cell = ((size_t(slot[row] / BLOCK_SIZE) * kv_heads + head) * BLOCK_SIZE + slot[row] % BLOCK_SIZE) * dim;
    for (int d = lane; d < dim; d += 32) {
        float y = rotated(normed + d, d, cos + row * half, sin + row * half, half);
        if (is_query) {
            q_out[(row * heads + head) * dim + d] = y;
        } else {
            keys[cell + d] = from_float<T>(y);
            values[cell + d] = from_float<T>(v[row * v_stride + head * dim + d]);
        }
    }
}
extern "C" __global__ void norm_rotate_and_write_bf16(const float* q, const float* k, const float* v, int q_stride,
                                                      int k_stride, int v_stride, const float* q_weight,
                                                      const float* k_weight, float q_eps, float k_eps, const float* cos,
                                                      const float* sin, int half, const unsigned* slot, float* q_out,
                                                      bf16* keys, bf16* values, int heads, int kv_heads, int dim) {
    norm_rotate_and_write(q, k, v, q_stride, k_stride, v_stride, q_weight, k_weight, q_eps, k_eps, cos, sin, half, slot,
                          q_out, keys, values, heads, kv_heads, dim);
}
extern "C" __global__ void norm_rotate_and_write_f32(const float* q, const float* k, const float* v, int q_stride,
                                                     int k_stride, int v_stride, const float* q_weight,
                                                     const float* k_weight, float q_eps, float k_eps, const float* cos,
                                                     const float* sin, int half, const unsigned* slot, float* q_out,
                                                     float* keys, float* values, int heads, int kv_heads, int dim) {
    norm_rotate_and_write(q, k, v, q_stride, k_stride, v_stride, q_weight, k_weight, q_eps, k_eps, cos, sin, half, slot,
                          q_out, keys, values, heads, kv_heads, dim);
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
