// Paged attention for single rows, which decoding is made of, and the joining of its splits.
//
// A layer's keys are [block][kv_head][32 positions][dim], and so are its values: the keys of one block and head lie
// side by side. A step's indices: `place` [t], how many rows of its sequence come before each packed row, and `table`
// [t], where its sequence's block table begins in `tables`.
#pragma once
#include "tree.cuh"

// Keys of a sequence that one CUDA block goes through. It depends on how many keys the row has and on nothing else, so
// the order of its sums, and with it its result, is the same in every batch. src/kernels/cuda/step.rs has the same.
__device__ __forceinline__ int split_length(int keys) { return keys <= 8192 ? 512 : keys <= 32768 ? 1024 : 4096; }

// How scores are made of products of queries and keys; src/kernels/cuda/serving.rs has the same structure.
struct Scores {
    float scale;
    // 0: none.
    float softcap;
    // 0: none.
    int window;
    // 2 * farthest + 1 numbers for each head, if there is a relative position bias.
    int farthest;
    const float* slopes;
    const float* bias;
};

// Query and key are positions.
__device__ __forceinline__ float score(float product, const Scores& scores, int head, int query, int key) {
    float s = product * scores.scale;
    if (scores.softcap > 0.0f) s = scores.softcap * tanhf(s / scores.softcap);
    if (scores.slopes) s += scores.slopes[head] * float(key - query);
    if (scores.bias) {
        int distance = min(query - key, scores.farthest);
        s += scores.bias[head * (2 * scores.farthest + 1) + scores.farthest - distance];
    }
    return s;
}

// Warps of a block of attend_rows; src/kernels/cuda/serving.rs has the same.
constexpr int ROW_WARPS = 8;

// Joins the results of a block's warps, in their order: maxima and sums [ROW_WARPS][QUERIES][2], results
// [ROW_WARPS][QUERIES][dim]. With one split in the whole step they are the row's results, otherwise partial ones.
template <int QUERIES, class T>
__device__ __forceinline__ void join_warps(const float* sums, const float* results, int num_queries, unsigned row,
                                           int first_head, int dim, T* out, float* partial, float* partial_out, int heads) {
    for (int i = threadIdx.x; i < num_queries * dim; i += blockDim.x) {
        int n = i / dim, d = i % dim;
        float largest = NEGATIVE_INFINITY, total = 0.0f, y = 0.0f;
#pragma unroll
        for (int w = 0; w < ROW_WARPS; w++) largest = fmaxf(largest, sums[(w * QUERIES + n) * 2]);
#pragma unroll
        for (int w = 0; w < ROW_WARPS; w++) {
            float of_warp = sums[(w * QUERIES + n) * 2];
            if (of_warp == NEGATIVE_INFINITY) continue;
            float correction = expf(of_warp - largest);
            total += correction * sums[(w * QUERIES + n) * 2 + 1];
            y += correction * results[(w * QUERIES + n) * dim + d];
        }
        if (gridDim.z == 1) {
            out[(size_t(row) * heads + first_head + n) * dim + d] = from_float<T>(y / total);
            continue;
        }
        size_t place = (size_t(blockIdx.x) * heads + first_head + n) * gridDim.z + blockIdx.z;
        partial_out[place * dim + d] = y;
        if (d == 0) {
            partial[place * 2] = largest;
            partial[place * 2 + 1] = total;
        }
    }
}

// Attention of single rows. Grid: (rows, kv_heads * parts, splits), ROW_WARPS warps. A block goes through one split of the
// row's keys for QUERIES queries of one kv head's group; a part is the next QUERIES of a larger group. Each warp takes
// every eighth tile of 32 keys: lane j has the scores of key j, and then every lane 2 * PAIRS dimensions of the results. At
// the end the warps' results are joined, in their order. With one split in the whole step the result goes to `out` [t, heads
// * dim]; otherwise maximum and sum to `partial` [rows, heads, splits, 2] and the unscaled result to `partial_out` [rows,
// heads, splits, dim], which join_splits makes `out` of. Shared memory in floats: queries [QUERIES][dim rounded up to a
// multiple of 8], maxima and sums [ROW_WARPS][QUERIES][2], results [ROW_WARPS][QUERIES][dim].
template <class T, int PAIRS, int QUERIES>
__device__ __forceinline__ void attend_rows(const float* q, const T* keys, const T* values, const unsigned* rows,
                                            const unsigned* place, const unsigned* table, const unsigned* tables,
                                            T* out, float* partial, float* partial_out, int heads, int kv_heads, int dim,
                                            const Scores& scores) {
    SHARED_MEMORY(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int group = heads / kv_heads, parts = gridDim.y / kv_heads;
    int kv_head = blockIdx.y / parts, first = blockIdx.y % parts * QUERIES;
    int first_head = kv_head * group + first, num_queries = min(QUERIES, group - first);
    int padded = (dim + 7) / 8 * 8;
    float* queries = reinterpret_cast<float*>(shared);
    float* sums = queries + QUERIES * padded;
    float* results = sums + ROW_WARPS * QUERIES * 2;

    unsigned row = rows[blockIdx.x];
    int query = place[row], count = query + 1;
    Tree tree = tree_of(tables, table[row]);
    int position = position_of(tree, query), first_key = first_row(tree, scores.window, position);
    int length = split_length(count);
    int begin = blockIdx.z * length, end = min(count, begin + length);
    // The same for all threads of the block.
    if (gridDim.z > 1 && (begin >= count || end <= first_key)) return;

    for (int i = threadIdx.x; i < QUERIES * padded; i += blockDim.x) {
        int n = i / padded, d = i % padded;
        queries[i] = n < num_queries && d < dim ? q[(size_t(row) * heads + first_head + n) * dim + d] : 0.0f;
    }
    __syncthreads();
    float best[QUERIES], sum[QUERIES], result[QUERIES][2 * PAIRS];
#pragma unroll
    for (int n = 0; n < QUERIES; n++) {
        best[n] = NEGATIVE_INFINITY;
        sum[n] = 0.0f;
#pragma unroll
        for (int d = 0; d < 2 * PAIRS; d++) result[n][d] = 0.0f;
    }
    const unsigned* blocks = tables + table[row];
    int first_tile = max(begin, first_key) / BLOCK_SIZE * BLOCK_SIZE;
    for (int tile = first_tile + warp * BLOCK_SIZE; tile < end; tile += ROW_WARPS * BLOCK_SIZE) {
        size_t at = (size_t(blocks[tile / BLOCK_SIZE]) * kv_heads + kv_head) * BLOCK_SIZE * dim;
        int valid = min(BLOCK_SIZE, end - tile), key = tile + lane;
        bool seen = lane < valid && key >= first_key && !is_hidden(tree, scores.window, query, position, key);
        float products[QUERIES], weights[QUERIES];
#pragma unroll
        for (int n = 0; n < QUERIES; n++) products[n] = 0.0f;
        if (seen) {
            const T* own = keys + at + lane * dim;
            if (dim % VECTOR<T> == 0) {
#pragma unroll 4
                for (int d = 0; d < dim; d += VECTOR<T>) {
                    float values_of_key[VECTOR<T>];
                    load_vector(own + d, values_of_key);
#pragma unroll
                    for (int n = 0; n < QUERIES; n++)
#pragma unroll
                        for (int i = 0; i < VECTOR<T>; i++) products[n] += values_of_key[i] * queries[n * padded + d + i];
                }
            } else {
                for (int d = 0; d < dim; d++)
#pragma unroll
                    for (int n = 0; n < QUERIES; n++) products[n] += to_float(own[d]) * queries[n * padded + d];
            }
        }
#pragma unroll
        for (int n = 0; n < QUERIES; n++) {
            // A query that is not there has the score of the first head, which no one reads.
            int head = first_head + min(n, num_queries - 1);
            float s = seen ? score(products[n], scores, head, position, position_of(tree, key)) : NEGATIVE_INFINITY;
            float larger = fmaxf(best[n], warp_max(s));
            weights[n] = s == NEGATIVE_INFINITY ? 0.0f : expf(s - larger);
            float correction = best[n] == NEGATIVE_INFINITY ? 0.0f : expf(best[n] - larger);
            best[n] = larger;
            sum[n] = sum[n] * correction + warp_sum(weights[n]);
#pragma unroll
            for (int d = 0; d < 2 * PAIRS; d++) result[n][d] *= correction;
        }
        const T* of_tile = values + at;
#pragma unroll 8
        for (int j = 0; j < valid; j++) {
            float pair_values[2 * PAIRS];
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                int d = 2 * (pair * 32 + lane);
                pair_values[2 * pair] = pair_values[2 * pair + 1] = 0.0f;
                if (d < dim) load_pair(of_tile + j * dim + d, pair_values + 2 * pair);
            }
#pragma unroll
            for (int n = 0; n < QUERIES; n++) {
                float weight = __shfl_sync(0xffffffffu, weights[n], j);
#pragma unroll
                for (int d = 0; d < 2 * PAIRS; d++) result[n][d] += weight * pair_values[d];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < QUERIES; n++) {
        if (lane == 0) {
            sums[(warp * QUERIES + n) * 2] = best[n];
            sums[(warp * QUERIES + n) * 2 + 1] = sum[n];
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            int d = 2 * (pair * 32 + lane);
            if (d < dim) {
                results[(warp * QUERIES + n) * dim + d] = result[n][2 * pair];
                results[(warp * QUERIES + n) * dim + d + 1] = result[n][2 * pair + 1];
            }
        }
    }
    __syncthreads();
    join_warps<QUERIES>(sums, results, num_queries, row, first_head, dim, out, partial, partial_out, heads);
}

#define ATTEND_ROWS(T, NAME, PAIRS, QUERIES)                                                                           \
    extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32) attend_rows_##NAME##_##PAIRS##_##QUERIES(             \
        const float* q, const T* keys, const T* values, const unsigned* rows, const unsigned* place,                \
        const unsigned* table, const unsigned* tables, T* out, float* partial, float* partial_out, int heads,          \
        int kv_heads, int dim, Scores scores) {                                                                        \
        attend_rows<T, PAIRS, QUERIES>(q, keys, values, rows, place, table, tables, out, partial, partial_out,      \
                                       heads, kv_heads, dim, scores);                                                  \
    }
#define ATTEND_ROWS_OF(T, NAME)   \
    ATTEND_ROWS(T, NAME, 1, 1)    \
    ATTEND_ROWS(T, NAME, 2, 1)    \
    ATTEND_ROWS(T, NAME, 4, 1)    \
    ATTEND_ROWS(T, NAME, 1, 4)    \
    ATTEND_ROWS(T, NAME, 2, 4)    \
    ATTEND_ROWS(T, NAME, 4, 4)
ATTEND_ROWS_OF(bf16, bf16)
ATTEND_ROWS_OF(float, f32)

// The sums over LANES lanes of QUERIES values each: lane i of the group gets that of query i * QUERIES / LANES.
template <int LANES, int QUERIES>
__device__ __forceinline__ float sum_over_lanes(float* values) {
    int lane = threadIdx.x % LANES, mask = LANES / 2;
#pragma unroll
    for (int left = QUERIES; left > 1; left /= 2, mask /= 2) {
        // Half of the values stay, the other lane's half of them come.
        bool upper = lane & mask;
#pragma unroll
        for (int n = 0; n < left / 2; n++) {
            float stays = upper ? values[n + left / 2] : values[n], goes = upper ? values[n] : values[n + left / 2];
            values[n] = stays + __shfl_xor_sync(0xffffffffu, goes, mask);
        }
    }
#pragma unroll
    for (; mask > 0; mask /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], mask);
    return values[0];
}

// attend_rows for keys and values in bf16 and heads of DIM dimensions, 64, 128 or 256: DIM / 8 lanes have a key, with 16
// bytes each, so that loads are of whole rows; the queries are in registers. The same grid and the same results, but that
// sums run in another order. Shared memory in floats: scores [ROW_WARPS][32][QUERIES], maxima and sums
// [ROW_WARPS][QUERIES][2], results [ROW_WARPS][QUERIES][DIM].
template <int DIM, int QUERIES>
__device__ __forceinline__ void attend_vectors(const float* q, const bf16* keys, const bf16* values, const unsigned* rows,
                                               const unsigned* place, const unsigned* table, const unsigned* tables,
                                               bf16* out, float* partial, float* partial_out, int heads, int kv_heads,
                                               const Scores& scores) {
    constexpr int LANES = DIM / 8, KEYS = 32 / LANES, BATCH = LANES < 8 ? LANES : 8;
    SHARED_MEMORY(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, of_keys = lane / LANES;
    int group = heads / kv_heads, parts = gridDim.y / kv_heads;
    int kv_head = blockIdx.y / parts, first = blockIdx.y % parts * QUERIES;
    int first_head = kv_head * group + first, num_queries = min(QUERIES, group - first);
    float* all_scores = reinterpret_cast<float*>(shared);
    float* own_scores = all_scores + warp * 32 * QUERIES;
    float* sums = all_scores + ROW_WARPS * 32 * QUERIES;
    float* results = sums + ROW_WARPS * QUERIES * 2;

    unsigned row = rows[blockIdx.x];
    int query = place[row], count = query + 1;
    Tree tree = tree_of(tables, table[row]);
    int position = position_of(tree, query), first_key = first_row(tree, scores.window, position);
    int length = split_length(count);
    int begin = blockIdx.z * length, end = min(count, begin + length);
    // The same for all threads of the block.
    if (gridDim.z > 1 && (begin >= count || end <= first_key)) return;

    float queries[QUERIES][8], best[QUERIES], sum[QUERIES], result[QUERIES][8];
#pragma unroll
    for (int n = 0; n < QUERIES; n++) {
        const float* from = q + (size_t(row) * heads + first_head + min(n, num_queries - 1)) * DIM + part * 8;
        load_vector(from, queries[n]);
        load_vector(from + 4, queries[n] + 4);
        best[n] = NEGATIVE_INFINITY;
        sum[n] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) result[n][i] = 0.0f;
    }
    const unsigned* blocks = tables + table[row];
    int first_tile = max(begin, first_key) / BLOCK_SIZE * BLOCK_SIZE;
    for (int tile = first_tile + warp * BLOCK_SIZE; tile < end; tile += ROW_WARPS * BLOCK_SIZE) {
        size_t at = (size_t(blocks[tile / BLOCK_SIZE]) * kv_heads + kv_head) * BLOCK_SIZE * DIM + part * 8;
        int valid = min(BLOCK_SIZE, end - tile);
        uint4 zero = {0, 0, 0, 0};
        // The first values are on their way while scores are computed.
        uint4 early[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int key = i * KEYS + of_keys;
            early[i] = key < valid ? *reinterpret_cast<const uint4*>(values + at + key * DIM) : zero;
        }
#pragma unroll
        for (int start = 0; start < LANES; start += BATCH) {
            uint4 loaded[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int key = (start + i) * KEYS + of_keys;
                loaded[i] = key < valid ? *reinterpret_cast<const uint4*>(keys + at + key * DIM) : zero;
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float products[QUERIES];
#pragma unroll
                for (int n = 0; n < QUERIES; n++)
                    products[n] = dot_vector(reinterpret_cast<const bf16*>(&loaded[i]), queries[n]);
                float total = sum_over_lanes<LANES, QUERIES>(products);
                if (part % (LANES / QUERIES) == 0)
                    own_scores[((start + i) * KEYS + of_keys) * QUERIES + part / (LANES / QUERIES)] = total;
            }
        }
        __syncwarp();
        int key = tile + lane;
        bool seen = lane < valid && key >= first_key && !is_hidden(tree, scores.window, query, position, key);
#pragma unroll
        for (int n = 0; n < QUERIES; n++) {
            int head = first_head + min(n, num_queries - 1);
            float s = seen ? score(own_scores[lane * QUERIES + n], scores, head, position, position_of(tree, key)) : NEGATIVE_INFINITY;
            float larger = fmaxf(best[n], warp_max(s));
            float weight = s == NEGATIVE_INFINITY ? 0.0f : expf(s - larger);
            float correction = best[n] == NEGATIVE_INFINITY ? 0.0f : expf(best[n] - larger);
            best[n] = larger;
            sum[n] = sum[n] * correction + warp_sum(weight);
#pragma unroll
            for (int i = 0; i < 8; i++) result[n][i] *= correction;
            // No other lane reads this key's scores.
            own_scores[lane * QUERIES + n] = weight;
        }
        __syncwarp();
#pragma unroll
        for (int start = 0; start < LANES; start += BATCH) {
            uint4 loaded[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int own = (start + i) * KEYS + of_keys;
                loaded[i] = start == 0 ? early[i] : own < valid ? *reinterpret_cast<const uint4*>(values + at + own * DIM) : zero;
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float of_key[8];
                load_vector(reinterpret_cast<const bf16*>(&loaded[i]), of_key);
#pragma unroll
                for (int n = 0; n < QUERIES; n++) {
                    float weight = own_scores[((start + i) * KEYS + of_keys) * QUERIES + n];
#pragma unroll
                    for (int j = 0; j < 8; j++) result[n][j] += weight * of_key[j];
                }
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < QUERIES; n++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int mask = LANES; mask < 32; mask *= 2) result[n][i] += __shfl_xor_sync(0xffffffffu, result[n][i], mask);
            if (of_keys == 0) results[(warp * QUERIES + n) * DIM + part * 8 + i] = result[n][i];
        }
        if (lane == 0) {
            sums[(warp * QUERIES + n) * 2] = best[n];
            sums[(warp * QUERIES + n) * 2 + 1] = sum[n];
        }
    }
    __syncthreads();
    join_warps<QUERIES>(sums, results, num_queries, row, first_head, DIM, out, partial, partial_out, heads);
}

#define ATTEND_VECTORS(DIM, QUERIES)                                                                                   \
    extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32) attend_vectors_##DIM##_##QUERIES(                     \
        const float* q, const bf16* keys, const bf16* values, const unsigned* rows, const unsigned* place,          \
        const unsigned* table, const unsigned* tables, bf16* out, float* partial, float* partial_out, int heads,       \
        int kv_heads, int, Scores scores) {                                                                            \
        attend_vectors<DIM, QUERIES>(q, keys, values, rows, place, table, tables, out, partial, partial_out, heads, \
                                     kv_heads, scores);                                                                \
    }
ATTEND_VECTORS(64, 1)
ATTEND_VECTORS(64, 4)
ATTEND_VECTORS(128, 1)
ATTEND_VECTORS(128, 4)
ATTEND_VECTORS(256, 1)
ATTEND_VECTORS(256, 4)

// Joins the splits of attend_rows, in their order. Grid: (rows, heads).
template <class T>
__device__ __forceinline__ void join_splits(const float* partial, const float* partial_out, const unsigned* rows,
                                            const unsigned* place, const unsigned* table, const unsigned* tables, T* out,
                                            int splits, int dim, int window) {
    unsigned row = rows[blockIdx.x];
    int heads = gridDim.y, head = blockIdx.y, count = int(place[row]) + 1, length = split_length(count);
    Tree tree = tree_of(tables, table[row]);
    int first = first_row(tree, window, position_of(tree, count - 1)) / length, end = (count + length - 1) / length;
    size_t base = (size_t(blockIdx.x) * heads + head) * splits;
    float best = NEGATIVE_INFINITY;
    for (int split = first; split < end; split++) best = fmaxf(best, partial[(base + split) * 2]);
    float sum = 0.0f;
    for (int split = first; split < end; split++)
        sum += expf(partial[(base + split) * 2] - best) * partial[(base + split) * 2 + 1];
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float result = 0.0f;
        for (int split = first; split < end; split++)
            result += expf(partial[(base + split) * 2] - best) * partial_out[(base + split) * dim + d];
        out[(size_t(row) * heads + head) * dim + d] = from_float<T>(result / sum);
    }
}
extern "C" __global__ void join_splits_bf16(const float* partial, const float* partial_out, const unsigned* rows,
                                            const unsigned* place, const unsigned* table, const unsigned* tables, bf16* out, int splits, int dim, int window) {
    join_splits(partial, partial_out, rows, place, table, tables, out, splits, dim, window);
}
extern "C" __global__ void join_splits_f32(const float* partial, const float* partial_out, const unsigned* rows,
                                           const unsigned* place, const unsigned* table, const unsigned* tables, float* out, int splits, int dim, int window) {
    join_splits(partial, partial_out, rows, place, table, tables, out, splits, dim, window);
}
