// What all kernels share: number formats, 16-byte loads, sums over warps and blocks, activations.
//
// Compiled by nvcc for a GPU, and as C++ over tests/cuda/emulation.h for the tests.
#pragma once
#ifdef SOFTSERVE_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <mma.h>
#include <stdint.h>
#define SHARED_MEMORY(name) extern __shared__ __align__(32) unsigned char name[]
#endif

using bf16 = __nv_bfloat16;

// Positions in one block of the key-value cache; src/kernels/layout.rs has the same.
constexpr int BLOCK_SIZE = 32;
constexpr float NEGATIVE_INFINITY = -INFINITY;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16(x);
}

// The two bf16 values of a word, the first in its low half.
__device__ __forceinline__ float low_half(unsigned word) {
    union {
        unsigned bits;
        float value;
    } x;
    x.bits = word << 16;
    return x.value;
}
__device__ __forceinline__ float high_half(unsigned word) {
    union {
        unsigned bits;
        float value;
    } x;
    x.bits = word & 0xffff0000u;
    return x.value;
}

// Values of T in 16 bytes.
template <class T>
constexpr int VECTOR = 16 / int(sizeof(T));

// 16 bytes of values as floats.
__device__ __forceinline__ void load_vector(const bf16* from, float* to) {
    uint4 words = *reinterpret_cast<const uint4*>(from);
    to[0] = low_half(words.x);
    to[1] = high_half(words.x);
    to[2] = low_half(words.y);
    to[3] = high_half(words.y);
    to[4] = low_half(words.z);
    to[5] = high_half(words.z);
    to[6] = low_half(words.w);
    to[7] = high_half(words.w);
}
__device__ __forceinline__ void load_vector(const float* from, float* to) {
    float4 values = *reinterpret_cast<const float4*>(from);
    to[0] = values.x;
    to[1] = values.y;
    to[2] = values.z;
    to[3] = values.w;
}

// Two values that lie side by side, the first at an even place.
__device__ __forceinline__ void load_pair(const bf16* from, float* to) {
    unsigned word = *reinterpret_cast<const unsigned*>(from);
    to[0] = low_half(word);
    to[1] = high_half(word);
}
__device__ __forceinline__ void load_pair(const float* from, float* to) {
    float2 values = *reinterpret_cast<const float2*>(from);
    to[0] = values.x;
    to[1] = values.y;
}

// The dot product of 16 bytes of values with as many floats.
__device__ __forceinline__ float dot_vector(const bf16* a, const float* b) {
    uint4 words = *reinterpret_cast<const uint4*>(a);
    float sum = low_half(words.x) * b[0];
    sum += high_half(words.x) * b[1];
    sum += low_half(words.y) * b[2];
    sum += high_half(words.y) * b[3];
    sum += low_half(words.z) * b[4];
    sum += high_half(words.z) * b[5];
    sum += low_half(words.w) * b[6];
    sum += high_half(words.w) * b[7];
    return sum;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

// The sum over all threads of a block of whole warps, in each of them. `scratch` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

__device__ __forceinline__ float sum_of_squares(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

// Dimension d of a head that a rotary embedding turns, where x points to it. cos and sin are those of the head's row; of
// dimensions from 2 * half on nothing changes.
__device__ __forceinline__ float rotated(const float* x, int d, const float* cos, const float* sin, int half) {
    if (d < half) return x[0] * cos[d] - x[half] * sin[d];
    if (d < 2 * half) return x[0] * cos[d - half] + x[-half] * sin[d - half];
    return x[0];
}

// The activation functions, numbered as src/kernels/cuda/mod.rs numbers them.
__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
        case 0:  // SiLU
            return x / (1.0f + expf(-x));
        case 1:  // GELU
            return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        case 2:  // GELU by a hyperbolic tangent
            return 0.5f * x * (1.0f + tanhf(0.79788456f * x * (1.0f + 0.044715f * x * x)));
        default:  // ReLU
            return fmaxf(x, 0.0f);
    }
}
