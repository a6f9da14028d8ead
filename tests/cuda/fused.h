// Kernels that do in one launch what others do in several: held to a plain version, and to the others bit by bit, since
// their sums run in the same order.
#pragma once
#include "compare.h"

namespace {

// As src/kernels/cuda/module.rs has it.
unsigned threads_for(int width) { return std::clamp((width + 127) / 128 * 32, 32, 1024); }

// Rows by a root-mean-square norm, in double precision.
Values<float> plain_rms_norm(const Values<float>& x, const Values<float>& weight, float eps) {
    size_t width = weight.size();
    Values<float> y(x.size());
    for (size_t at = 0; at < x.size(); at += width) {
        double square = 0;
        for (size_t i = 0; i < width; i++) square += double(x[at + i]) * x[at + i] / double(width);
        for (size_t i = 0; i < width; i++) y[at + i] = float(x[at + i] / std::sqrt(square + eps) * weight[i]);
    }
    return y;
}

void norms_of_sums() {
    for (auto [rows, width, threads] :
         {std::tuple{3, 64, 64}, {1, 7, 32}, {5, 1000, 256}, {2, 33, 64}, {2, 1028, 64}, {1, 4096, 1024}}) {
        size_t count = size_t(rows) * width;
        auto run = [&, rows = rows, threads = threads](auto kernel) { launch({unsigned(rows)}, {unsigned(threads)}, 128, kernel); };
        auto x = random_values(count), residual = random_values(count), after = random_values(width);
        auto weight = random_values(width), bias = random_values(width);
        for (int variant = 0; variant < 4; variant++) {
            bool has_after = variant & 1, rounds = variant & 2;
            std::string what = std::string(has_after ? "add_rms_norm after a norm" : "add_rms_norm") + " of " + std::to_string(width);
            auto sum = unwritten<float>(count), out = sum, normed = sum, apart = sum;
            auto rounded = unwritten<bf16>(count), rounded_apart = rounded;
            run([&] {
                add_rms_norm(x.data(), has_after ? after.data() : nullptr, residual.data(), weight.data(), sum.data(),
                             out.data(), rounds ? rounded.data() : nullptr, width, 1e-3f, 1e-5f);
            });
            if (has_after) run([&] { rms_norm(x.data(), after.data(), normed.data(), nullptr, width, 1e-3f); });
            Values<float> added(count), plain_added = has_after ? plain_rms_norm(x, after, 1e-3f) : x;
            for (size_t i = 0; i < count; i++) {
                added[i] = residual[i] + (has_after ? normed[i] : x[i]);
                plain_added[i] += residual[i];
            }
            run([&] { rms_norm(added.data(), weight.data(), apart.data(), rounded_apart.data(), width, 1e-5f); });
            expect_equal(what + ": sum", sum, added);
            expect_equal(what + ": norm", out, apart);
            if (rounds) expect_equal(what + ": norm in bf16", floats(rounded), floats(rounded_apart));
            expect_close(what + ": plain sum", sum, plain_added, 1e-5f);
            expect_close(what + ": plain norm", out, plain_rms_norm(plain_added, weight, 1e-5f), 2e-5f);
        }
        for (bool has_bias : {false, true}) {
            const float* of = has_bias ? bias.data() : nullptr;
            auto sum = unwritten<float>(count), out = sum, apart = sum;
            auto rounded = unwritten<bf16>(count), rounded_apart = rounded;
            run([&] {
                add_layer_norm(x.data(), residual.data(), weight.data(), of, sum.data(), out.data(), rounded.data(), width, 1e-5f);
            });
            Values<float> added(count);
            for (size_t i = 0; i < count; i++) added[i] = residual[i] + x[i];
            run([&] { layer_norm(added.data(), weight.data(), of, apart.data(), rounded_apart.data(), width, 1e-5f); });
            expect_equal("add_layer_norm: sum", sum, added);
            expect_equal("add_layer_norm: norm", out, apart);
            expect_equal("add_layer_norm: norm in bf16", floats(rounded), floats(rounded_apart));
        }
    }
}

// Of a step of `t` rows: norms of each head, a rotation by `half` (0 is none), and the writing to a cache of three blocks.
template <class T>
void norms_before_the_cache() {
    for (auto [t, heads, kv_heads, dim, half] :
         {std::tuple{3, 4, 2, 8, 4}, {2, 3, 1, 6, 2}, {1, 5, 5, 128, 64}, {2, 2, 1, 132, 0}, {3, 2, 1, 130, 65}, {1, 1, 1, 256, 128},
          {2, 9, 2, 64, 8}, {40, 3, 3, 20, 10}, {5, 8, 2, 128, 32}}) {
        std::string what = "norm_rotate_and_write of " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " +
                           std::to_string(dim);
        int queries = heads * dim, width = kv_heads * dim, stride = queries + 2 * width + 3;
        auto product = random_values(size_t(t) * stride), q_weight = random_values(dim), k_weight = random_values(dim);
        auto cos = random_values(size_t(t) * half), sin = random_values(size_t(t) * half);
        Values<unsigned> slot(96);
        for (unsigned i = 0; i < slot.size(); i++) slot[i] = i;
        std::shuffle(slot.begin(), slot.end(), generator);
        slot.resize(t);
        auto keys = unwritten<T>(size_t(96) * width), values = keys, keys_apart = keys, values_apart = keys;
        auto q_out = unwritten<float>(size_t(t) * queries), q_apart = q_out;
        const float *q = product.data(), *k = q + queries, *v = k + width;
        launch({unsigned(t), unsigned(heads + kv_heads + 1) / 2}, {64}, 2 * dim * sizeof(float), [&] {
            if constexpr (std::is_same_v<T, bf16>)
                norm_rotate_and_write_bf16(q, k, v, stride, stride, stride, q_weight.data(), k_weight.data(), 1e-6f, 1e-3f, cos.data(),
                                           sin.data(), half, slot.data(), q_out.data(), keys.data(), values.data(), heads, kv_heads, dim);
            else
                norm_rotate_and_write_f32(q, k, v, stride, stride, stride, q_weight.data(), k_weight.data(), 1e-6f, 1e-3f, cos.data(),
                                          sin.data(), half, slot.data(), q_out.data(), keys.data(), values.data(), heads, kv_heads, dim);
        });
        // One after another: a norm of queries, one of keys, and rotate_and_write.
        auto part = [&, t = t, stride = stride](const float* from, int width) {
            Values<float> rows;
            for (int r = 0; r < t; r++) rows.insert(rows.end(), from + size_t(r) * stride, from + size_t(r) * stride + width);
            return rows;
        };
        auto q_rows = part(q, queries), k_rows = part(k, width);
        auto q_normed = unwritten<float>(q_rows.size()), k_normed = unwritten<float>(k_rows.size());
        launch({unsigned(t * heads)}, {threads_for(dim)}, 128,
               [&] { rms_norm(q_rows.data(), q_weight.data(), q_normed.data(), nullptr, dim, 1e-6f); });
        launch({unsigned(t * kv_heads)}, {threads_for(dim)}, 128,
               [&] { rms_norm(k_rows.data(), k_weight.data(), k_normed.data(), nullptr, dim, 1e-3f); });
        launch({unsigned(t), 2}, {64}, 0, [&] {
            if constexpr (std::is_same_v<T, bf16>)
                rotate_and_write_bf16(q_normed.data(), k_normed.data(), v, queries, width, stride, cos.data(), sin.data(), half,
                                      slot.data(), q_apart.data(), keys_apart.data(), values_apart.data(), heads, kv_heads, dim);
            else
                rotate_and_write_f32(q_normed.data(), k_normed.data(), v, queries, width, stride, cos.data(), sin.data(), half,
                                     slot.data(), q_apart.data(), keys_apart.data(), values_apart.data(), heads, kv_heads, dim);
        });
        // Without a rotation that kernel leaves queries where they are.
        expect_equal(what + ": queries", q_out, half > 0 ? q_apart : q_normed);
        checks++;
        if (std::memcmp(keys.data(), keys_apart.data(), keys.size() * sizeof(T)) ||
            std::memcmp(values.data(), values_apart.data(), values.size() * sizeof(T))) {
            std::printf("FAILED %s: keys or values are not, to the bit, those of one operation after another\n", what.c_str());
            failures++;
        }
        // And a plain version of the keys.
        auto plain = plain_rms_norm(k_rows, k_weight, 1e-3f);
        Values<float> found, expected;
        for (int r = 0; r < t; r++)
            for (int i = 0; i < width; i++) {
                int d = i % dim;
                const float *x = plain.data() + size_t(r) * width + i, *c = cos.data() + r * half, *s = sin.data() + r * half;
                expected.push_back(d < half ? x[0] * c[d] - x[half] * s[d] : d < 2 * half ? x[0] * c[d - half] + x[-half] * s[d - half] : x[0]);
                found.push_back(to_float(keys[((size_t(slot[r] / 32) * kv_heads + i / dim) * 32 + slot[r] % 32) * dim + d]));
            }
        expect_close(what + ": plain keys", found, expected, std::is_same_v<T, bf16> ? 8e-3f : 2e-5f);
    }
}

void picked_rows() {
    for (int words : {1, 33, 200}) {
        auto x = random_values(size_t(4) * words);
        // One id of a row that is not there.
        Values<unsigned> ids = {3, 0, 4, 3}, bits(x.size()), out(ids.size() * words, 7);
        std::memcpy(bits.data(), x.data(), x.size() * sizeof(float));
        launch({unsigned(ids.size()), 2}, {32}, 0, [&] { pick_rows(bits.data(), ids.data(), out.data(), 4, words); });
        Values<unsigned> expected;
        for (unsigned id : ids)
            for (int i = 0; i < words; i++) expected.push_back(id < 4 ? bits[size_t(id) * words + i] : ~0u);
        checks++;
        if (out != expected) {
            std::printf("FAILED pick_rows of %d words\n", words);
            failures++;
        }
    }
}

}  // namespace
