// Kernels over rows of activations: norms, rotary embedding, activations, sums, casts, embeddings.
#include "common.cuh"

// Root-mean-square norm of each row of x [rows, width] by weight [width]. `rounded` gets the result in bf16 too,
// unless it is null: a product with weights in bf16 reads it. One block a row, of whole warps; shared memory for 32 floats.
// Of rows whose width is a multiple of 4, a thread keeps up to 16 values in registers between the two passes.
extern "C" __global__ void rms_norm(const float* x, const float* weight, float* out, bf16* rounded, int width, float eps) {
    SHARED_MEMORY(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    size_t row = size_t(blockIdx.x) * width;
    float sum = 0.0f;
    if (width % 4 == 0 && width <= 16 * int(blockDim.x)) {
        float4 values[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i >= width) continue;
            values[n] = *reinterpret_cast<const float4*>(x + row + i);
            sum += values[n].x * values[n].x + values[n].y * values[n].y + values[n].z * values[n].z +
                   values[n].w * values[n].w;
        }
        float scale = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = 4 * (threadIdx.x + n * blockDim.x);
            if (i >= width) continue;
            float4 w = *reinterpret_cast<const float4*>(weight + i), y = values[n];
            y = {y.x * scale * w.x, y.y * scale * w.y, y.z * scale * w.z, y.w * scale * w.w};
            *reinterpret_cast<float4*>(out + row + i) = y;
            if (rounded) {
                rounded[row + i] = __float2bfloat16(y.x);
                rounded[row + i + 1] = __float2bfloat16(y.y);
                rounded[row + i + 2] = __float2bfloat16(y.z);
                rounded[row + i + 3] = __float2bfloat16(y.w);
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[row + i] * x[row + i];
    float scale = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = x[row + i] * scale * weight[i];
        out[row + i] = y;
        if (rounded) rounded[row + i] = __float2bfloat16(y);
    }
}

// Layer norm of each row by weight and bias [width]; a null bias is none. As rms_norm otherwise.
extern "C" __global__ void layer_norm(const float* x, const float* weight, const float* bias, float* out, bf16* rounded,
                                      int width, float eps) {
    SHARED_MEMORY(shared);
    float* scratch = reinterpret_cast<float*>(shared);
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

// Rotary embedding, half-split form: x [t, heads, dim] by cos and sin [t, half] to out. Dimensions from 2 * half on
// are copied. One thread an element.
extern "C" __global__ void rope(const float* x, const float* cos, const float* sin, float* out, int heads, int dim,
                                int half, size_t count) {
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int d = at % dim;
    size_t t = at / dim / heads;
    float y = x[at];
    if (d < half)
        y = y * cos[t * half + d] - x[at + half] * sin[t * half + d];
    else if (d < 2 * half)
        y = y * cos[t * half + d - half] + x[at - half] * sin[t * half + d - half];
    out[at] = y;
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
