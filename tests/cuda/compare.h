// Random values and comparisons for the tests of kernels; included after the kernels.
#pragma once
#include <algorithm>
#include <random>
#include <string>

namespace {

using emulation::launch;
std::mt19937 generator(7);
int failures = 0, checks = 0;

// Exactly as long as its values, so that the address sanitizer sees an access beyond them.
template <class T>
using Values = std::vector<T>;

Values<float> random_values(size_t count, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    Values<float> values(count);
    for (float& x : values) x = normal(generator);
    return values;
}
template <class T>
Values<T> as(const Values<float>& x) {
    Values<T> y;
    for (float v : x) y.push_back(from_float<T>(v));
    return y;
}
template <class T>
Values<float> floats(const Values<T>& x) {
    Values<float> y;
    for (T v : x) y.push_back(to_float(v));
    return y;
}
// What a kernel has to overwrite.
template <class T>
Values<T> unwritten(size_t count) {
    return Values<T>(count, from_float<T>(NAN));
}

void expect_close(const std::string& what, const Values<float>& found, const Values<float>& expected, float tolerance) {
    checks++;
    for (size_t i = 0; i < expected.size(); i++) {
        float error = std::fabs(found[i] - expected[i]);
        if (!(error <= tolerance * (1.0f + std::fabs(expected[i])))) {
            std::printf("FAILED %s: value %zu of %zu is %g, expected %g\n", what.c_str(), i, expected.size(), found[i],
                        expected[i]);
            failures++;
            return;
        }
    }
}

void expect_equal(const std::string& what, const Values<float>& found, const Values<float>& expected) {
    checks++;
    for (size_t i = 0; i < expected.size(); i++) {
        if (std::memcmp(&found[i], &expected[i], sizeof(float))) {
            std::printf("FAILED %s: value %zu of %zu is %.9g and not, to the bit, %.9g\n", what.c_str(), i, expected.size(),
                        found[i], expected[i]);
            failures++;
            return;
        }
    }
}

}  // namespace
