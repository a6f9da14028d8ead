// Kernels over rows of activations: norms, rotary embedding, activations, sums, casts, embeddings, choices of rows.
#include "common.cuh"

__device__ __forceinline__ float4 scaled(float4 x, float scale, float4 w) {
    return {x.x * scale * w.x, x.y * scale * w.y, x.z * scale * w.z, x.w * scale * w.w};
}
__device__ __forceinline__ float4 added(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ float4 load_four(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ void store_four(float4 y, float* to) { *reinterpret_cast<float4*>(to) = y; }

// Four values from place `at` on, to `out` and, unless it is null, in bf16 to `rounded`.
__device__ __forceinline__ void store_normed(float4 y, float* out, bf16* rounded, size_t at) {
    store_four(y, out + at);
    if (rounded) {
        rounded[at] = __float2bfloat16(y.x);
        rounded[at + 1] = __float2bfloat16(y.y);
        rounded[at + 2] = __float2bfloat16(y.z);
        rounded[at + 3] = __float2bfloat16(y.w);
    }
}

// What a root-mean-square norm multiplies a row with, by the sum of its squares over all threads.
__device__ __forceinline__ float rms_scale(float squares, int width, float eps, float* scratch) {
    return 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
}

// Whether a thread keeps what it has of a row in registers between two passes: up to four times four values.
__device__ __forceinline__ bool fits_registers(int width) { return width % 4 == 0 && width <= 16 * int(blockDim.x); }

// Root-mean-square norm of each row of x [rows, width] by weight [width]. `rounded` gets the result in bf16 too,
// unless it is null: a product with weights in bf16 reads it. One block a row, of whole warps; shared memory for 32 floats.
extern "C" __global__ void rms_norm(const float* x, const float* weight, float* out, bf16* rounded, int width, float eps) {
    SHARED_MEMORY(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    size_t row = size_t(blockIdx.x) * width;
    float sum = 0.0f;
    if (fits_registers(width)) {
        float4 values[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i >= width) continue;
            values[n] = load_four(x + row + i);
            sum += sum_of_squares(values[n]);
        }
        float scale = rms_scale(sum, width, eps, scratch);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i < width) store_normed(scaled(values[n], scale, load_four(weight + i)), out, rounded, row + i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[row + i] * x[row + i];
    float scale = rms_scale(sum, width, eps, scratch);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = x[row + i] * scale * weight[i];
        out[row + i] = y;
        if (rounded) rounded[row + i] = __float2bfloat16(y);
    }
}

// The sum of a residual stream and a branch, and its norm, in one: sum = residual + x, where x is first normed by `after`
// [width] unless that is null, and out is rms_norm of the sum by weight. Sums run in the order of rms_norm, so the results
// are those of the three operations one after another. All of x, residual, sum and out are [rows, width]; grid, threads and
// shared memory as in rms_norm.
extern "C" __global__ void add_rms_norm(const float* x, const float* after, const float* residual, const float* weight,
                                        float* sum, float* out, bf16* rounded, int width, float after_eps, float eps) {
    SHARED_MEMORY(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    size_t row = size_t(blockIdx.x) * width;
    float of_x = 0.0f, of_sum = 0.0f, after_scale = 1.0f;
    if (fits_registers(width)) {
        float4 values[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i >= width) continue;
            values[n] = load_four(x + row + i);
            of_x += sum_of_squares(values[n]);
        }
        // The same for all threads.
        if (after) after_scale = rms_scale(of_x, width, after_eps, scratch);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i >= width) continue;
            if (after) values[n] = scaled(values[n], after_scale, load_four(after + i));
            values[n] = added(load_four(residual + row + i), values[n]);
            store_four(values[n], sum + row + i);
            of_sum += sum_of_squares(values[n]);
        }
        float scale = rms_scale(of_sum, width, eps, scratch);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i < width) store_normed(scaled(values[n], scale, load_four(weight + i)), out, rounded, row + i);
        }
        return;
    }
    if (after) {
        for (int i = threadIdx.x; i < width; i += blockDim.x) of_x += x[row + i] * x[row + i];
        after_scale = rms_scale(of_x, width, after_eps, scratch);
    }
    // Each thread reads again only what it wrote itself.
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = after ? x[row + i] * after_scale * after[i] : x[row + i];
        y = residual[row + i] + y;
        sum[row + i] = y;
        of_sum += y * y;
    }
    float scale = rms_scale(of_sum, width, eps, scratch);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = sum[row + i] * scale * weight[i];
        out[row + i] = y;
        if (rounded) rounded[row + i] = __float2bfloat16(y);
    }
}

// A thread reads of x only what it may have written itself.
__device__ __forceinline__ void layer_norm_row(const float* x, const float* weight, const float* bias, float* out,
                                               bf16* rounded, int width, float eps, float* scratch) {
    size_t row = size_t(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[row + i];
    float mean = block_sum(sum, scratch) / width;
    sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += (x[row + i] - mean) * (x[row + i] - mean);
    float scale = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = (x[row + i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
        out[row + i] = y;
        if (rounded) rounded[row + i] = __float2bfloat16(y);
    }
}

// Layer norm of each row by weight and bias [width]; a null bias is none. As rms_norm otherwise.
extern "C" __global__ void layer_norm(const float* x, const float* weight, const float* bias, float* out, bf16* rounded,
                                      int width, float eps) {
    SHARED_MEMORY(shared);
    layer_norm_row(x, weight, bias, out, rounded, width, eps, reinterpret_cast<float*>(shared));
}

// sum = residual + x and the layer norm of the sum, in one. As add_rms_norm otherwise.
extern "C" __global__ void add_layer_norm(const float* x, const float* residual, const float* weight, const float* bias,
                                          float* sum, float* out, bf16* rounded, int width, float eps) {
    SHARED_MEMORY(shared);
    size_t row = size_t(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum[row + i] = residual[row + i] + x[row + i];
    layer_norm_row(sum, weight, bias, out, rounded, width, eps, reinterpret_cast<float*>(shared));
}

// Rotary embedding, half-split form: x [t, heads, dim] by cos and sin [t, half] to out. Dimensions from 2 * half on
// are copied. One thread an element.
extern "C" __global__ void rope(const float* x, const float* cos, const float* sin, float* out, int heads, int dim,
                                int half, size_t count) {
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    size_t t = at / dim / heads;
    out[at] = rotated(x + at, at % dim, cos + t * half, sin + t * half, half);
}

// activation(gate) * up of every element, in bf16 or f32. Rows of `width` values of gate and up begin every `stride`
// values; those of the result lie side by side.
template <class T>
__device__ __forceinline__ void gate_up_values(const float* gate, const float* up, T* out, size_t count, int width,
                                               int stride, int activation) {
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    size_t from = at / width * stride + at % width;
    out[at] = from_float<T>(activate(gate[from], activation) * up[from]);
}
extern "C" __global__ void gate_up_bf16(const float* gate, const float* up, bf16* out, size_t count, int width, int stride,
                                        int activation) {
    gate_up_values(gate, up, out, count, width, stride, activation);
}
extern "C" __global__ void gate_up_f32(const float* gate, const float* up, float* out, size_t count, int width, int stride,
                                       int activation) {
    gate_up_values(gate, up, out, count, width, stride, activation);
}

extern "C" __global__ void activate_rows(const float* x, float* out, size_t count, int activation) {
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) out[at] = activate(x[at], activation);
}

// Adds bias [width] to rows of y, in place, which begin every `stride` values; `count` values in all.
extern "C" __global__ void add_bias(float* y, const float* bias, size_t count, int width, int stride) {
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) y[at / width * stride + at % width] += bias[at % width];
}

extern "C" __global__ void round_to_bf16(const float* x, bf16* out, size_t count) {
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) out[at] = __float2bfloat16(x[at]);
}

// Rows `ids` of a table [n, width] in f32. One block a row.
template <class T>
__device__ __forceinline__ void embed(const T* table, const unsigned* ids, float* out, int width) {
    const T* row = table + size_t(ids[blockIdx.x]) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[size_t(blockIdx.x) * width + i] = to_float(row[i]);
}
extern "C" __global__ void embed_bf16(const bf16* table, const unsigned* ids, float* out, int width) {
    embed(table, ids, out, width);
}
extern "C" __global__ void embed_f32(const float* table, const unsigned* ids, float* out, int width) {
    embed(table, ids, out, width);
}

// Row ids[i] of x [rows, words] to row i of out, in words of four bytes; of a row that is not there all bits are ones, which
// is NaN in f32 and bf16. Grid: (ids, any).
extern "C" __global__ void pick_rows(const unsigned* x, const unsigned* ids, unsigned* out, unsigned rows, int words) {
    unsigned id = ids[blockIdx.x];
    size_t from = size_t(id) * words, to = size_t(blockIdx.x) * words;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < words; i += gridDim.y * blockDim.x)
        out[to + i] = id < rows ? x[from + i] : 0xffffffffu;
}
