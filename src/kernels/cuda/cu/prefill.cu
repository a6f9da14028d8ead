// Paged attention for parts of a sequence with many queries, on tensor cores (FlashAttention, Dao et al. 2022).
#include "attention.cu"

constexpr int TILE_ROWS = 64;

// Copies 32 rows of `dim` values that lie side by side to shared memory in rows of `stride`, with zeros from row `valid`
// on: memory that no one has written may hold NaN. dim is a multiple of 8.
__device__ __forceinline__ void load_tile(const bf16* from, bf16* to, int valid, int dim, int stride) {
    int vectors = dim / 8;
    for (int i = threadIdx.x; i < BLOCK_SIZE * vectors; i += blockDim.x) {
        int row = i / vectors, column = i % vectors * 8;
        uint4 zero = {0, 0, 0, 0};
        *reinterpret_cast<uint4*>(to + row * stride + column) =
            row < valid ? *reinterpret_cast<const uint4*>(from + row * dim + column) : zero;
    }
}

// One block computes 64 queries: `pack` heads of one kv head's group of 64 / pack rows. A tile is four numbers: first
// packed row, rows, how many rows of its sequence come before the first, beginning of the block table. Grid: (tiles, heads / pack), 128 threads;
// each warp has 16 of the queries. dim is 16 * COLUMNS.
//
// Queries and the weights of values are rounded to bf16; scores, maxima, sums and results are f32. Results stay in matrix
// fragments; only when a larger score is found do they go through shared memory to be scaled. Shared memory, in this order:
// results [64][dim + 8] and scores [4][16][40] in f32; queries [64][dim + 8], keys and values [32][dim + 8] each and weights
// [4][16][48] in bf16; the rows are padded so that matrix fragments are aligned. src/kernels/cuda/serving.rs counts the same
// bytes.
template <int COLUMNS>
__device__ __forceinline__ void attend_tiles(const float* q, const bf16* keys, const bf16* values, const unsigned* tiles,
                                             const unsigned* tables, bf16* out, int heads, int kv_heads, int pack,
                                             const Scores& scores) {
    using namespace nvcuda::wmma;
    SHARED_MEMORY(shared);
    constexpr int dim = 16 * COLUMNS, stride = dim + 8, result_stride = dim + 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* results = reinterpret_cast<float*>(shared);
    float* all_scores = results + TILE_ROWS * result_stride;
    bf16* queries = reinterpret_cast<bf16*>(all_scores + 4 * 16 * 40);
    bf16* key_tile = queries + TILE_ROWS * stride;
    bf16* value_tile = key_tile + BLOCK_SIZE * stride;
    bf16* all_weights = value_tile + BLOCK_SIZE * stride;
    float* own_scores = all_scores + warp * 16 * 40;
    bf16* own_weights = all_weights + warp * 16 * 48;
    float* own_results = results + warp * 16 * result_stride;

    const unsigned* tile = tiles + blockIdx.x * 4;
    int first_packed = tile[0], rows = tile[1], first_query = tile[2];
    const unsigned* blocks = tables + tile[3];
    Tree tree = tree_of(tables, tile[3]);
    int first_head = blockIdx.y * pack, kv_head = first_head / (heads / kv_heads);

    for (int i = threadIdx.x; i < TILE_ROWS * dim; i += blockDim.x) {
        int r = i / dim, d = i % dim, at = r / pack;
        float x = at < rows ? q[(size_t(first_packed + at) * heads + first_head + r % pack) * dim + d] : 0.0f;
        queries[r * stride + d] = __float2bfloat16(x);
    }
    fragment<accumulator, 16, 16, 16, float> result[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) fill_fragment(result[c], 0.0f);
    // Where there are registers for them, the queries are loaded once.
    constexpr int KEPT = COLUMNS <= 8 ? COLUMNS : 1;
    fragment<matrix_a, 16, 16, 16, bf16, row_major> of_queries[KEPT];
    __syncthreads();
    if (COLUMNS <= 8) {
#pragma unroll
        for (int c = 0; c < KEPT; c++) load_matrix_sync(of_queries[c], queries + warp * 16 * stride + c * 16, stride);
    }
    bool is_plain = scores.softcap == 0.0f && !scores.slopes && !scores.bias;
    // Two lanes a query, each with 16 of a tile's 32 scores.
    int r = warp * 16 + lane / 2, side = lane % 2, at = r / pack, head = first_head + r % pack;
    bool is_query = at < rows;
    int query = first_query + (is_query ? at : 0), position = position_of(tree, query);
    float best = NEGATIVE_INFINITY, sum = 0.0f;

    int count = first_query + rows;
    // In a tree, later rows may have earlier positions, but none before the tree's first.
    int first_key = first_row(tree, scores.window, min(first_query, tree.start));
    for (int begin = first_key / BLOCK_SIZE * BLOCK_SIZE; begin < count; begin += BLOCK_SIZE) {
        size_t from = (size_t(blocks[begin / BLOCK_SIZE]) * kv_heads + kv_head) * BLOCK_SIZE * dim;
        int valid = min(BLOCK_SIZE, count - begin);
        __syncthreads();
        load_tile(keys + from, key_tile, valid, dim, stride);
        load_tile(values + from, value_tile, valid, dim, stride);
        __syncthreads();
        fragment<accumulator, 16, 16, 16, float> products[2];
        fill_fragment(products[0], 0.0f);
        fill_fragment(products[1], 0.0f);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int kept = COLUMNS <= 8 ? c : 0;
            if (COLUMNS > 8) load_matrix_sync(of_queries[0], queries + warp * 16 * stride + c * 16, stride);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                fragment<matrix_b, 16, 16, 16, bf16, col_major> b;
                load_matrix_sync(b, key_tile + half * 16 * stride + c * 16, stride);
                mma_sync(products[half], of_queries[kept], b, products[half]);
            }
        }
        store_matrix_sync(own_scores, products[0], 40, mem_row_major);
        store_matrix_sync(own_scores + 16, products[1], 40, mem_row_major);
        __syncwarp();
        float s[16], larger = best;
#pragma unroll
        for (int j = 0; j < 16; j++) s[j] = own_scores[lane / 2 * 40 + side * 16 + j];
        // Most tiles lie before all queries and trees, within every window.
        bool is_before = begin + 31 <= query && begin + 31 < tree.start;
        if (is_plain && is_query && is_before && (scores.window == 0 || position - begin < scores.window)) {
#pragma unroll
            for (int j = 0; j < 16; j++) s[j] *= scores.scale;
        } else {
#pragma unroll
            for (int j = 0; j < 16; j++) {
                int key = begin + side * 16 + j;
                bool seen = is_query && key <= query && key >= first_row(tree, scores.window, position) &&
                            !is_hidden(tree, scores.window, query, position, key);
                s[j] = seen ? score(s[j], scores, head, position, position_of(tree, key)) : NEGATIVE_INFINITY;
            }
        }
#pragma unroll
        for (int j = 0; j < 16; j++) larger = fmaxf(larger, s[j]);
        larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
        float correction = best == NEGATIVE_INFINITY ? 1.0f : expf(best - larger), added = 0.0f;
        best = larger;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float weight = s[j] == NEGATIVE_INFINITY ? 0.0f : __expf(s[j] - larger);
            added += weight;
            own_weights[lane / 2 * 48 + side * 16 + j] = __float2bfloat16(weight);
        }
        sum = sum * correction + added + __shfl_xor_sync(0xffffffffu, added, 1);
        // The largest score rarely changes after the first tiles.
        if (__any_sync(0xffffffffu, correction != 1.0f)) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                store_matrix_sync(own_results + c * 16, result[c], result_stride, mem_row_major);
            __syncwarp();
            for (int i = 0; i < 16; i++) {
                float c = __shfl_sync(0xffffffffu, correction, 2 * i);
                for (int d = lane; d < dim; d += 32) own_results[i * result_stride + d] *= c;
            }
            __syncwarp();
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                load_matrix_sync(result[c], own_results + c * 16, result_stride, mem_row_major);
        }
        __syncwarp();
        fragment<matrix_a, 16, 16, 16, bf16, row_major> weights[2];
        load_matrix_sync(weights[0], own_weights, 48);
        load_matrix_sync(weights[1], own_weights + 16, 48);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                fragment<matrix_b, 16, 16, 16, bf16, row_major> b;
                load_matrix_sync(b, value_tile + half * 16 * stride + c * 16, stride);
                mma_sync(result[c], weights[half], b, result[c]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) store_matrix_sync(own_results + c * 16, result[c], result_stride, mem_row_major);
    __syncwarp();
    for (int i = 0; i < 16; i++) {
        float total = __shfl_sync(0xffffffffu, sum, 2 * i);
        int own = (warp * 16 + i) / pack;
        if (own >= rows) continue;
        size_t to = (size_t(first_packed + own) * heads + first_head + (warp * 16 + i) % pack) * dim;
        for (int d = lane; d < dim; d += 32) out[to + d] = __float2bfloat16(own_results[i * result_stride + d] / total);
    }
}

#define ATTEND_TILES(COLUMNS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) attend_tiles_##COLUMNS(                                          \
        const float* q, const bf16* keys, const bf16* values, const unsigned* tiles, const unsigned* tables,           \
        bf16* out, int heads, int kv_heads, int pack, Scores scores) {                                                 \
        attend_tiles<COLUMNS>(q, keys, values, tiles, tables, out, heads, kv_heads, pack, scores);                     \
    }
ATTEND_TILES(1)
ATTEND_TILES(2)
ATTEND_TILES(4)
ATTEND_TILES(5)
ATTEND_TILES(6)
ATTEND_TILES(8)
ATTEND_TILES(16)
