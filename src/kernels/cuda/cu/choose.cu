// Choosing tokens on the device: the largest logit of each row and its log-probability.
#include "common.cuh"

// For each row of logits [rows, vocab]: the index of the largest, the first of equals, to `best`; its log-probability
// to `log_probability`, NaN if the row has NaN or positive infinity. NaN is never the largest. One block of whole warps
// a row; shared memory for 96 words.
extern "C" __global__ void choose_largest(const float* logits, unsigned* best, float* log_probability, int vocab) {
    SHARED_MEMORY(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    float* maxima = scratch + 32;
    unsigned* places = reinterpret_cast<unsigned*>(maxima + 32);
    const float* row = logits + size_t(blockIdx.x) * vocab;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float largest = NEGATIVE_INFINITY, sum = 0.0f, unusable = 0.0f;
    unsigned place = 0xffffffffu;
    // Each thread's largest and the sum of e^(x - largest), in one pass. Eight values are on their way at a time.
    for (int start = threadIdx.x; start < vocab; start += 8 * blockDim.x) {
        float values[8], larger = largest;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int i = start + j * blockDim.x;
            values[j] = i < vocab ? row[i] : NEGATIVE_INFINITY;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (!(values[j] < INFINITY)) unusable = 1.0f;
            if (values[j] > larger) {
                larger = values[j];
                place = start + j * blockDim.x;
            }
        }
        if (larger == NEGATIVE_INFINITY) continue;
        float added = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) added += expf(values[j] - larger);
        sum = (largest == NEGATIVE_INFINITY ? 0.0f : sum * expf(largest - larger)) + added;
        largest = larger;
    }
    float own = largest;
    for (int mask = 16; mask > 0; mask /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, largest, mask);
        unsigned other_place = __shfl_xor_sync(0xffffffffu, place, mask);
        if (other > largest || (other == largest && other_place < place)) {
            largest = other;
            place = other_place;
        }
    }
    if (lane == 0) {
        maxima[warp] = largest;
        places[warp] = place;
    }
    __syncthreads();
    largest = NEGATIVE_INFINITY;
    place = 0xffffffffu;
    for (int i = 0; i < warps; i++) {
        if (maxima[i] > largest || (maxima[i] == largest && places[i] < place)) {
            largest = maxima[i];
            place = places[i];
        }
    }
    sum = block_sum(own == NEGATIVE_INFINITY ? 0.0f : sum * expf(own - largest), scratch);
    unusable = block_sum(unusable, scratch);
    if (threadIdx.x == 0) {
        best[blockIdx.x] = place;
        log_probability[blockIdx.x] = unusable > 0.0f || place == 0xffffffffu ? NAN : -logf(sum);
    }
}

// Log-probabilities of given ids of rows of logits [rows, vocab], by what choose_largest found of each row. `asked` has for
// each of `count` ids the row and the id; of one that is not in the vocabulary it is negative infinity, of a row that no
// token can be chosen from NaN.
extern "C" __global__ void pick_log_probabilities(const float* logits, const unsigned* best, const float* log_probability,
                                                  const unsigned* asked, float* out, int vocab, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    unsigned row = asked[2 * i], id = asked[2 * i + 1];
    float of_best = log_probability[row];
    if (of_best != of_best)
        out[i] = NAN;
    else if (id >= unsigned(vocab))
        out[i] = NEGATIVE_INFINITY;
    else
        out[i] = logits[size_t(row) * vocab + id] - logits[size_t(row) * vocab + best[row]] + of_best;
}
