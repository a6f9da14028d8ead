// Every CUDA kernel under the emulation, held to a plain version of it, on odd shapes. `.ci/cuda-emulation` compiles
// this with the address sanitizer and runs it.
#include "../../src/kernels/cuda/cu/all.cu"

#include "compare.h"
#include "fused.h"

namespace {

double plain_activation(double x, int activation) {
    switch (activation) {
        case 0: return x / (1 + std::exp(-x));
        case 1: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case 2: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        default: return x > 0 ? x : 0;
    }
}

void norms() {
    for (auto [rows, width, threads] : {std::tuple{3, 64, 64}, {1, 7, 32}, {5, 1000, 256}, {2, 33, 64}, {2, 1028, 64}}) {
        for (bool rounds : {false, true}) {
            auto x = random_values(rows * width), weight = random_values(width), bias = random_values(width);
            auto out = unwritten<float>(x.size()), centred = out, no_bias = out;
            auto rounded = unwritten<bf16>(x.size());
            bf16* to = rounds ? rounded.data() : nullptr;
            launch({unsigned(rows)}, {unsigned(threads)}, 128,
                   [&] { rms_norm(x.data(), weight.data(), out.data(), to, width, 1e-5f); });
            if (rounds) expect_close("rms_norm rounds", floats(rounded), floats(as<bf16>(out)), 0);
            launch({unsigned(rows)}, {unsigned(threads)}, 128,
                   [&] { layer_norm(x.data(), weight.data(), bias.data(), centred.data(), to, width, 1e-5f); });
            if (rounds) expect_close("layer_norm rounds", floats(rounded), floats(as<bf16>(centred)), 0);
            launch({unsigned(rows)}, {unsigned(threads)}, 128,
                   [&] { layer_norm(x.data(), weight.data(), nullptr, no_bias.data(), to, width, 1e-5f); });
            Values<float> plain(x.size()), plain_centred(x.size()), plain_no_bias(x.size());
            for (int r = 0; r < rows; r++) {
                double square = 0, mean = 0, variance = 0;
                for (int i = 0; i < width; i++) square += double(x[r * width + i]) * x[r * width + i] / width;
                for (int i = 0; i < width; i++) mean += double(x[r * width + i]) / width;
                for (int i = 0; i < width; i++) variance += std::pow(x[r * width + i] - mean, 2) / width;
                for (int i = 0; i < width; i++) {
                    int at = r * width + i;
                    plain[at] = x[at] / std::sqrt(square + 1e-5) * weight[i];
                    plain_no_bias[at] = (x[at] - mean) / std::sqrt(variance + 1e-5) * weight[i];
                    plain_centred[at] = plain_no_bias[at] + bias[i];
                }
            }
            expect_close("rms_norm", out, plain, 1e-5f);
            expect_close("layer_norm", centred, plain_centred, 1e-5f);
            expect_close("layer_norm without a bias", no_bias, plain_no_bias, 1e-5f);
        }
    }
}

void rotary() {
    for (auto [t, heads, dim, half] : {std::tuple{3, 2, 8, 4}, {5, 3, 12, 4}, {1, 1, 64, 32}}) {
        auto x = random_values(t * heads * dim), cos = random_values(t * half), sin = random_values(t * half);
        auto out = unwritten<float>(x.size());
        Values<float> plain = x;
        for (int i = 0; i < t * heads; i++)
            for (int d = 0; d < half; d++) {
                float a = x[i * dim + d], b = x[i * dim + d + half];
                float c = cos[i / heads * half + d], s = sin[i / heads * half + d];
                plain[i * dim + d] = a * c - b * s;
                plain[i * dim + d + half] = b * c + a * s;
            }
        launch({unsigned(x.size() + 63) / 64}, {64}, 0, [&] {
            rope(x.data(), cos.data(), sin.data(), out.data(), heads, dim, half, x.size());
        });
        expect_close("rope", out, plain, 1e-6f);
    }
}

void elementwise() {
    for (size_t count : {1, 63, 200}) {
        unsigned blocks = (count + 63) / 64;
        auto x = random_values(count, 2), up = random_values(count);
        for (int activation = 0; activation < 4; activation++) {
            Values<float> plain(count), plain_gated(count);
            for (size_t i = 0; i < count; i++) {
                plain[i] = plain_activation(x[i], activation);
                plain_gated[i] = plain[i] * up[i];
            }
            auto out = unwritten<float>(count), gated = out;
            auto rounded = unwritten<bf16>(count);
            launch({blocks}, {64}, 0, [&] { activate_rows(x.data(), out.data(), count, activation); });
            int one = int(count);
            launch({blocks}, {64}, 0, [&] { gate_up_f32(x.data(), up.data(), gated.data(), count, one, one, activation); });
            launch({blocks}, {64}, 0, [&] { gate_up_bf16(x.data(), up.data(), rounded.data(), count, one, one, activation); });
            expect_close("activate_rows", out, plain, 1e-5f);
            expect_close("gate_up_f32", gated, plain_gated, 1e-5f);
            expect_close("gate_up_bf16", floats(rounded), plain_gated, 4e-3f);
        }
        auto rounded = unwritten<bf16>(count);
        launch({blocks}, {64}, 0, [&] { round_to_bf16(x.data(), rounded.data(), count); });
        expect_close("round_to_bf16", floats(rounded), x, 4e-3f);
    }
    // Rows of 7 values that begin every 10.
    auto y = random_values(27), bias = random_values(7), plain = y;
    for (int i = 0; i < 21; i++) plain[i / 7 * 10 + i % 7] += bias[i % 7];
    launch({1}, {32}, 0, [&] { add_bias(y.data(), bias.data(), 21, 7, 10); });
    expect_close("add_bias", y, plain, 0);
    auto both = random_values(3 * 14);
    auto gated = unwritten<float>(21);
    Values<float> plain_gated(21);
    for (int i = 0; i < 21; i++) plain_gated[i] = std::max(both[i / 7 * 14 + i % 7], 0.0f) * both[i / 7 * 14 + 7 + i % 7];
    launch({1}, {32}, 0, [&] { gate_up_f32(both.data(), both.data() + 7, gated.data(), 21, 7, 14, 3); });
    expect_close("gate_up_f32 of one product", gated, plain_gated, 0);
    auto table = random_values(5 * 33);
    Values<unsigned> ids = {4, 0, 4};
    auto rows = unwritten<float>(3 * 33), rounded_rows = rows;
    auto rounded_table = as<bf16>(table);
    launch({3}, {32}, 0, [&] { embed_f32(table.data(), ids.data(), rows.data(), 33); });
    launch({3}, {32}, 0, [&] { embed_bf16(rounded_table.data(), ids.data(), rounded_rows.data(), 33); });
    Values<float> picked;
    for (unsigned id : ids) picked.insert(picked.end(), table.begin() + id * 33, table.begin() + (id + 1) * 33);
    expect_close("embed_f32", rows, picked, 0);
    expect_close("embed_bf16", rounded_rows, floats(as<bf16>(picked)), 0);
}

template <int ROWS>
void products_of() {
    for (auto [k, n] : {std::tuple{8, 5}, {264, 33}, {2064, 3}, {1024, 6}}) {
        auto x = as<bf16>(random_values(ROWS * k)), w = as<bf16>(random_values(n * k, 0.1f)),
             v = as<bf16>(random_values((n + 1) * k, 0.1f));
        auto bias = random_values(n), residual = random_values(ROWS * (n + 1));
        auto plain = [&](const Values<bf16>& w, int n) {
            Values<float> y(ROWS * n);
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < n; j++) {
                    double sum = 0;
                    for (int i = 0; i < k; i++) sum += double(to_float(x[r * k + i])) * to_float(w[j * k + i]);
                    y[r * n + j] = sum;
                }
            return y;
        };
        Values<float> first = plain(w, n), second = plain(v, n + 1), gated = first;
        Values<float> ups = plain(v, n);
        for (size_t i = 0; i < gated.size(); i++) gated[i] = plain_activation(gated[i], 0) * ups[i];
        for (size_t i = 0; i < first.size(); i++) first[i] += bias[i % n];
        for (size_t i = 0; i < second.size(); i++) second[i] += residual[i];
        auto a = unwritten<float>(ROWS * n), b = unwritten<float>(ROWS * (n + 1));
        auto inner = unwritten<bf16>(ROWS * n);
        Matrix one = {w.data(), bias.data(), nullptr, a.data(), n};
        Matrix two = {v.data(), nullptr, residual.data(), b.data(), n + 1}, none = {nullptr, nullptr, nullptr, nullptr, 0};
        unsigned columns = ROWS == 1 ? 2 * n + 1 : ((n + 1) / 2 + (n + 2) / 2 + 3) / 4;
        launch({columns}, {PRODUCT_THREADS}, 16, [&] {
            if constexpr (ROWS == 1) multiply_1(x.data(), k, one, two, none);
            if constexpr (ROWS == 2) multiply_2(x.data(), k, one, two, none);
            if constexpr (ROWS == 3) multiply_3(x.data(), k, one, two, none);
            if constexpr (ROWS == 4) multiply_4(x.data(), k, one, two, none);
        });
        launch({ROWS == 1 ? unsigned(n) : unsigned(n + 3) / 4}, {PRODUCT_THREADS}, 16, [&] {
            if constexpr (ROWS == 1) multiply_gated_1(x.data(), k, w.data(), v.data(), inner.data(), n, 0);
            if constexpr (ROWS == 2) multiply_gated_2(x.data(), k, w.data(), v.data(), inner.data(), n, 0);
            if constexpr (ROWS == 3) multiply_gated_3(x.data(), k, w.data(), v.data(), inner.data(), n, 0);
            if constexpr (ROWS == 4) multiply_gated_4(x.data(), k, w.data(), v.data(), inner.data(), n, 0);
        });
        expect_close("multiply with a bias", a, first, 1e-4f);
        expect_close("multiply with a residual", b, second, 1e-4f);
        expect_close("multiply_gated", floats(inner), gated, 5e-3f);
    }
}

void largest() {
    for (int vocab : {1, 5, 500}) {
        auto logits = random_values(4 * vocab, 3);
        logits[vocab / 2] = 50;
        if (vocab > 2) logits[vocab / 2 + 1] = 50;
        for (int i = 0; i < vocab; i++) logits[2 * vocab + i] = i % 2 || vocab == 1 ? 1.5f : -INFINITY;
        logits[3 * vocab + vocab / 2] = NAN;
        Values<unsigned> best(4, 77);
        auto chance = unwritten<float>(4);
        launch({4}, {64}, 96 * 4, [&] { choose_largest(logits.data(), best.data(), chance.data(), vocab); });
        for (int r = 0; r < 3; r++) {
            checks++;
            const float* row = logits.data() + r * vocab;
            unsigned plain = 0;
            double sum = 0;
            for (int i = 0; i < vocab; i++)
                if (row[i] > row[plain]) plain = i;
            for (int i = 0; i < vocab; i++) sum += std::exp(double(row[i]) - row[plain]);
            if (best[r] != plain || std::fabs(chance[r] + std::log(sum)) > 1e-4) {
                std::printf("FAILED choose_largest: row %d of %d: %u at %g, expected %u at %g\n", r, vocab, best[r],
                            chance[r], plain, -std::log(sum));
                failures++;
            }
        }
        Values<unsigned> asked = {0, 0, 2, 0, 1, unsigned(vocab - 1), 3, 0, 0, unsigned(vocab)};
        auto scores = unwritten<float>(5);
        launch({2}, {3}, 0, [&] {
            pick_log_probabilities(logits.data(), best.data(), chance.data(), asked.data(), scores.data(), vocab, 5);
        });
        for (int i = 0; i < 5; i++) {
            const float* row = logits.data() + asked[2 * i] * vocab;
            double sum = 0;
            for (int j = 0; j < vocab; j++) sum += std::exp(double(row[j]) - 50);
            double plain = int(asked[2 * i + 1]) == vocab ? -INFINITY : row[asked[2 * i + 1]] - 50 - std::log(sum);
            bool is_right = i == 3 ? std::isnan(scores[i]) : scores[i] == plain || std::fabs(scores[i] - plain) < 1e-4;
            checks++;
            if (!is_right) {
                std::printf("FAILED pick_log_probabilities: %g, expected %g\n", scores[i], plain);
                failures++;
            }
        }
        checks++;
        if (!std::isnan(chance[3])) {
            std::printf("FAILED choose_largest: a row with NaN has the log-probability %g\n", chance[3]);
            failures++;
        }
    }
}

// The last rows of a part may form a tree, of rows with so many ancestors; it may begin before the part.
struct Part {
    int start, rows;
    Values<unsigned> depths = {};
};

// The row after the last descendant of a row of a tree.
unsigned end_of(const Values<unsigned>& depths, unsigned node) {
    unsigned end = node + 1;
    while (end < depths.size() && depths[end] > depths[node]) end++;
    return end;
}

template <class T>
void attend_by_rows(int parts, int splits, int rows, size_t shared, const float* q, const T* keys, const T* values,
                    const unsigned* list, const unsigned* place, const unsigned* table, const unsigned* tables, T* out,
                    float* partial, float* partial_out, int heads, int kv_heads, int dim, Scores scores, int pairs,
                    int queries) {
    launch({unsigned(rows), unsigned(kv_heads * parts), unsigned(splits)}, {ROW_WARPS * 32}, shared, [&] {
        auto call = [&](auto kernel) {
            kernel(q, keys, values, list, place, table, tables, out, partial, partial_out, heads, kv_heads, dim, scores);
        };
        if constexpr (std::is_same_v<T, bf16>) {
            if (queries == 1) call(pairs == 1 ? attend_rows_bf16_1_1 : pairs == 2 ? attend_rows_bf16_2_1 : attend_rows_bf16_4_1);
            else call(pairs == 1 ? attend_rows_bf16_1_4 : pairs == 2 ? attend_rows_bf16_2_4 : attend_rows_bf16_4_4);
        } else {
            if (queries == 1) call(pairs == 1 ? attend_rows_f32_1_1 : pairs == 2 ? attend_rows_f32_2_1 : attend_rows_f32_4_1);
            else call(pairs == 1 ? attend_rows_f32_1_4 : pairs == 2 ? attend_rows_f32_2_4 : attend_rows_f32_4_4);
        }
    });
}

template <class T>
void attention(int heads, int kv_heads, int dim, const Values<Part>& parts, Scores scores, bool alibi, bool relative) {
    constexpr bool is_bf16 = std::is_same_v<T, bf16>;
    std::string what = std::string(is_bf16 ? "bf16" : "f32") + " attention of " + std::to_string(heads) + "/" +
                       std::to_string(kv_heads) + " heads of " + std::to_string(dim);
    scores.scale = 1.0f / std::sqrt(float(dim));
    auto slopes = random_values(heads, 0.1f);
    scores.farthest = relative ? 5 : 0;
    auto bias = random_values(heads * (2 * scores.farthest + 1));
    scores.slopes = alibi ? slopes.data() : nullptr;
    scores.bias = relative ? bias.data() : nullptr;
    // Block tables in a scattered order; blocks that no one wrote have NaN.
    Values<unsigned> position, place, table, tables, slot, list, tiles;
    Values<std::vector<bool>> is_seen;
    int num_blocks = 1;
    for (const Part& part : parts) num_blocks += (part.start + part.rows + 31) / 32;
    Values<unsigned> order(num_blocks);
    for (int i = 0; i < num_blocks; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    int next = 0, pack = 64 % (heads / kv_heads) ? 1 : heads / kv_heads;
    for (const Part& part : parts) {
        const auto& depths = part.depths;
        int end = part.start + part.rows, tree = end - int(depths.size());
        unsigned tree_at = tables.size();
        if (!depths.empty()) {
            tables.insert(tables.end(), {unsigned(tree), unsigned(depths.size())});
            for (unsigned i = 0; i < depths.size(); i++) tables.push_back(end_of(depths, i));
            tables.insert(tables.end(), depths.begin(), depths.end());
        }
        // No tree is at the array's beginning.
        if (tree_at == 0 && !depths.empty()) std::abort();
        tables.push_back(depths.empty() ? 0 : tree_at);
        unsigned begins = tables.size(), row = place.size();
        for (int i = 0; i < (end + 31) / 32; i++) tables.push_back(order[next++]);
        auto position_of = [&](int p) { return p < tree ? p : tree + int(depths[p - tree]); };
        for (int i = 0; i < part.rows; i++) {
            int p = part.start + i;
            place.push_back(p);
            position.push_back(position_of(p));
            std::vector<bool> seen;
            for (int key = 0; key <= p; key++)
                seen.push_back((key < tree || p - tree < int(end_of(depths, key - tree))) &&
                               (scores.window == 0 || position_of(p) - position_of(key) < scores.window));
            is_seen.push_back(seen);
            table.push_back(begins);
            slot.push_back(tables[begins + p / 32] * 32 + p % 32);
            list.push_back(list.size());
        }
        for (int i = 0; i < part.rows; i += 64 / pack)
            tiles.insert(tiles.end(), {row + i, unsigned(std::min(64 / pack, part.rows - i)), unsigned(part.start + i), begins});
    }
    // The position of a row of the sequence that a packed row belongs to.
    auto position_of = [&](int row, int p) {
        unsigned at = tables[table[row] - 1];
        return at == 0 || p < int(tables[at]) ? p : int(tables[at] + tables[at + 2 + tables[at + 1] + p - tables[at]]);
    };
    int t = position.size(), width = kv_heads * dim;
    auto q = random_values(size_t(t) * heads * dim), k = random_values(size_t(t) * width), v = random_values(size_t(t) * width);
    auto keys = unwritten<T>(size_t(num_blocks) * 32 * width), values = keys;
    auto cell = [&](unsigned block, int head, int p, int d) {
        return ((size_t(block) * kv_heads + head) * 32 + p % 32) * dim + d;
    };
    // What came before this step.
    int first_packed = 0;
    for (const Part& part : parts) {
        unsigned begins = table[first_packed];
        auto past_keys = as<T>(random_values(size_t(part.start) * width)), past_values = as<T>(random_values(size_t(part.start) * width));
        for (int p = 0; p < part.start; p++)
            for (int i = 0; i < width; i++) {
                keys[cell(tables[begins + p / 32], i / dim, p, i % dim)] = past_keys[p * width + i];
                values[cell(tables[begins + p / 32], i / dim, p, i % dim)] = past_values[p * width + i];
            }
        first_packed += part.rows;
    }
    // Queries, keys and values as parts of one row, as one product gives them; the first dimensions of each head are
    // rotated, in every second case none.
    int half = dim % 4 == 0 && (heads + kv_heads) % 2 == 0 ? dim / 4 : 0, all = heads * dim + 2 * width;
    auto cos = random_values(size_t(t) * half), sin = random_values(size_t(t) * half);
    Values<float> product(size_t(t) * all);
    for (int row = 0; row < t; row++) {
        for (int i = 0; i < heads * dim; i++) product[size_t(row) * all + i] = q[size_t(row) * heads * dim + i];
        for (int i = 0; i < width; i++) {
            product[size_t(row) * all + heads * dim + i] = k[size_t(row) * width + i];
            product[size_t(row) * all + heads * dim + width + i] = v[size_t(row) * width + i];
        }
        auto turn = [&](float* x, int count) {
            for (int h = 0; h < count; h++)
                for (int d = 0; d < half; d++) {
                    float a = x[h * dim + d], b = x[h * dim + d + half], c = cos[row * half + d], s = sin[row * half + d];
                    x[h * dim + d] = a * c - b * s;
                    x[h * dim + d + half] = b * c + a * s;
                }
        };
        turn(q.data() + size_t(row) * heads * dim, heads);
        turn(k.data() + size_t(row) * width, kv_heads);
    }
    auto rotated = unwritten<float>(q.size());
    launch({unsigned(t), 2}, {64}, 0, [&] {
        const float *from = product.data(), *of_keys = from + heads * dim, *of_values = of_keys + width;
        if constexpr (is_bf16)
            rotate_and_write_bf16(from, of_keys, of_values, all, all, all, cos.data(), sin.data(), half, slot.data(),
                                  rotated.data(), keys.data(), values.data(), heads, kv_heads, dim);
        else
            rotate_and_write_f32(from, of_keys, of_values, all, all, all, cos.data(), sin.data(), half, slot.data(),
                                 rotated.data(), keys.data(), values.data(), heads, kv_heads, dim);
    });
    if (half > 0) expect_close(what + ": rotated queries", rotated, q, 1e-6f);
    for (int row = 0; row < t; row++) {
        Values<float> written, wanted;
        for (int i = 0; i < width; i++) {
            size_t at = cell(tables[table[row] + place[row] / 32], i / dim, place[row], i % dim);
            written.push_back(to_float(keys[at]));
            written.push_back(to_float(values[at]));
            wanted.push_back(k[size_t(row) * width + i]);
            wanted.push_back(v[size_t(row) * width + i]);
        }
        expect_close(what + ": written keys and values", written, wanted, is_bf16 ? 4e-3f : 1e-6f);
    }
    Values<float> plain(size_t(t) * heads * dim);
    int longest = 0;
    for (int row = 0; row < t; row++) {
        int count = place[row] + 1;
        int length = count <= 8192 ? 512 : 1024;
        longest = std::max(longest, (count + length - 1) / length);
        for (int head = 0; head < heads; head++) {
            int kv = head / (heads / kv_heads);
            Values<double> s(count);
            double best = -INFINITY, sum = 0;
            for (int p = 0; p < count; p++) {
                if (!is_seen[row][p]) continue;
                double product = 0;
                for (int d = 0; d < dim; d++)
                    product += double(q[(size_t(row) * heads + head) * dim + d]) *
                               to_float(keys[cell(tables[table[row] + p / 32], kv, p, d)]);
                product *= scores.scale;
                if (scores.softcap > 0) product = scores.softcap * std::tanh(product / scores.softcap);
                int away = int(position[row]) - position_of(row, p);
                if (alibi) product -= double(slopes[head]) * away;
                if (relative) product += bias[head * 11 + 5 - std::min(away, 5)];
                s[p] = product;
                best = std::max(best, product);
            }
            for (int p = 0; p < count; p++) sum += s[p] = is_seen[row][p] ? std::exp(s[p] - best) : 0;
            for (int d = 0; d < dim; d++) {
                double y = 0;
                for (int p = 0; p < count; p++)
                    y += s[p] / sum * to_float(values[cell(tables[table[row] + p / 32], kv, p, d)]);
                plain[(size_t(row) * heads + head) * dim + d] = y;
            }
        }
    }
    int group = heads / kv_heads, queries = group > 1 ? 4 : 1;
    int pairs = dim <= 64 ? 1 : dim <= 128 ? 2 : 4, padded = (dim + 7) / 8 * 8;
    size_t shared = 4 * (queries * padded + ROW_WARPS * queries * (2 + dim));
    // As many splits as the longest row has, and one: the whole of it where a row has only one.
    for (int splits : {longest, longest + 2}) {
        auto out = unwritten<T>(plain.size());
        auto partial = random_values(size_t(t) * heads * splits * 2), partial_out = random_values(size_t(t) * heads * splits * dim);
        attend_by_rows<T>((group + queries - 1) / queries, splits, t, shared, q.data(), keys.data(),
                          values.data(), list.data(), place.data(), table.data(), tables.data(), out.data(),
                          partial.data(), partial_out.data(), heads, kv_heads, dim, scores, pairs, queries);
        if (splits > 1)
            launch({unsigned(t), unsigned(heads)}, {64}, 0, [&] {
                if constexpr (is_bf16) join_splits_bf16(partial.data(), partial_out.data(), list.data(), place.data(), table.data(), tables.data(), out.data(), splits, dim, scores.window);
                else join_splits_f32(partial.data(), partial_out.data(), list.data(), place.data(), table.data(), tables.data(), out.data(), splits, dim, scores.window);
            });
        expect_close(what + " by rows, " + std::to_string(splits) + " splits", floats(out), plain, is_bf16 ? 5e-3f : 2e-5f);
    }
    if constexpr (is_bf16) {
        if (dim == 64 || dim == 128 || dim == 256) {
            int splits = longest + 1;
            auto out = unwritten<bf16>(plain.size());
            auto partial = random_values(size_t(t) * heads * splits * 2), partial_out = random_values(size_t(t) * heads * splits * dim);
            size_t bytes = 4 * ROW_WARPS * queries * (32 + 2 + dim);
            launch({unsigned(t), unsigned(kv_heads * ((group + queries - 1) / queries)), unsigned(splits)}, {ROW_WARPS * 32}, bytes, [&] {
                auto kernel = queries == 1 ? (dim == 64 ? attend_vectors_64_1 : dim == 128 ? attend_vectors_128_1 : attend_vectors_256_1)
                                           : (dim == 64 ? attend_vectors_64_4 : dim == 128 ? attend_vectors_128_4 : attend_vectors_256_4);
                kernel(q.data(), keys.data(), values.data(), list.data(), place.data(), table.data(), tables.data(), out.data(),
                       partial.data(), partial_out.data(), heads, kv_heads, dim, scores);
            });
            launch({unsigned(t), unsigned(heads)}, {64}, 0, [&] {
                join_splits_bf16(partial.data(), partial_out.data(), list.data(), place.data(), table.data(), tables.data(), out.data(), splits, dim, scores.window);
            });
            expect_close(what + " by vectors", floats(out), plain, 5e-3f);
        }
        if (dim % 16 == 0 && dim != 48) {
            auto out = unwritten<bf16>(plain.size());
            size_t bytes = (64 * (dim + 8) + 4 * 16 * 40) * 4 + (64 * (dim + 8) + 2 * 32 * (dim + 8) + 4 * 16 * 48) * 2;
            launch({unsigned(tiles.size() / 4), unsigned(heads / pack)}, {128}, bytes, [&] {
                auto kernel = dim == 16   ? attend_tiles_1
                              : dim == 32 ? attend_tiles_2
                              : dim == 64 ? attend_tiles_4
                              : dim == 80 ? attend_tiles_5
                              : dim == 96 ? attend_tiles_6
                              : dim == 128 ? attend_tiles_8
                                           : attend_tiles_16;
                kernel(q.data(), keys.data(), values.data(), tiles.data(), tables.data(), out.data(), heads, kv_heads, pack,
                       scores);
            });
            expect_close(what + " by tiles", floats(out), plain, 2e-2f);
        }
    }
    // A block's beginning to another.
    unsigned from = order[0], to = order[num_blocks - 1];
    auto plain_keys = keys, plain_values = values;
    for (int h = 0; h < kv_heads; h++)
        for (int p = 0; p < 7; p++)
            for (int d = 0; d < dim; d++) {
                plain_keys[cell(to, h, p, d)] = keys[cell(from, h, p, d)];
                plain_values[cell(to, h, p, d)] = values[cell(from, h, p, d)];
            }
    launch({unsigned(kv_heads)}, {32}, 0, [&] {
        if constexpr (is_bf16) copy_slots_bf16(keys.data(), values.data(), from, to, 7, dim);
        else copy_slots_f32(keys.data(), values.data(), from, to, 7, dim);
    });
    checks++;
    if (std::memcmp(keys.data(), plain_keys.data(), keys.size() * sizeof(T)) ||
        std::memcmp(values.data(), plain_values.data(), values.size() * sizeof(T))) {
        std::printf("FAILED copy_slots of %s\n", what.c_str());
        failures++;
    }
}

template <class T>
void attentions() {
    Scores plain = {0.3f, 0, 0, 0, nullptr, nullptr};
    attention<T>(4, 2, 8, {{0, 5}, {31, 2}, {40, 1}}, plain, false, false);
    attention<T>(4, 4, 16, {{0, 33}, {70, 3}}, plain, false, false);
    attention<T>(8, 1, 32, {{3, 70}, {0, 1}}, plain, false, false);
    attention<T>(6, 2, 48, {{130, 2}, {5, 9}}, plain, false, false);
    attention<T>(2, 1, 6, {{2, 3}}, plain, true, false);
    attention<T>(9, 1, 64, {{1, 40}}, plain, true, false);
    attention<T>(2, 2, 128, {{64, 1}, {190, 20}}, plain, false, true);
    attention<T>(2, 1, 256, {{20, 15}}, {0.06f, 5.0f, 0, 0, nullptr, nullptr}, false, false);
    attention<T>(4, 2, 16, {{0, 100}, {150, 1}, {9, 1}}, {0.3f, 0, 40, 0, nullptr, nullptr}, false, false);
    attention<T>(2, 2, 16, {{8190, 4}}, plain, false, false);
    attention<T>(4, 1, 64, {{700, 3}, {31, 1}}, plain, false, false);
    attention<T>(3, 3, 64, {{90, 3}}, plain, true, false);
    attention<T>(5, 1, 128, {{600, 2}, {3, 7}}, {0.2f, 0, 300, 0, nullptr, nullptr}, false, false);
    attention<T>(2, 2, 256, {{33, 2}}, plain, false, true);
    attention<T>(32, 4, 16, {{10, 20}}, plain, false, false);
    attention<T>(4, 2, 80, {{300, 3}, {0, 18}}, plain, false, false);
    attention<T>(3, 3, 96, {{600, 17}}, {0.2f, 0, 300, 0, nullptr, nullptr}, true, false);
    // Trees: within their part, from before it on, longer than a tile, and beyond a window.
    Values<unsigned> tree = {0, 1, 2, 2, 1, 2, 3, 0, 0, 1, 1, 2, 3, 0, 1, 2, 2, 1, 0}, twice = tree;
    twice.insert(twice.end(), tree.begin(), tree.end());
    attention<T>(4, 2, 16, {{3, 2}, {10, 30, tree}, {40, 1}}, plain, false, false);
    attention<T>(2, 2, 64, {{1, 1}, {45, 18, twice}}, plain, true, false);
    attention<T>(4, 1, 64, {{0, 1}, {60, 20, tree}}, plain, false, true);
    attention<T>(2, 1, 128, {{0, 1}, {505, 20, twice}}, {0.2f, 0, 30, 0, nullptr, nullptr}, false, false);
    attention<T>(1, 1, 32, {{9, 1}, {20, 38, twice}}, {0.2f, 4.0f, 2, 0, nullptr, nullptr}, true, false);
}

}  // namespace

int main(int count, char** arguments) {
    emulation::backwards = count > 1 && std::string(arguments[1]) == "backwards";
    norms();
    norms_of_sums();
    norms_before_the_cache<float>();
    norms_before_the_cache<bf16>();
    picked_rows();
    rotary();
    elementwise();
    products_of<1>();
    products_of<2>();
    products_of<3>();
    products_of<4>();
    largest();
    attentions<float>();
    attentions<bf16>();
    std::printf("%d of %d comparisons of CUDA kernels with plain versions failed\n", failures, checks);
    return failures ? 1 : 0;
}
