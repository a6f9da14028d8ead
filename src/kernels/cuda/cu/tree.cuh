// The tree of tokens that a sequence may end with, as TokenTree of src/kernels/layout.rs has it.
#pragma once
#include "common.cuh"

// `ends` and `depths` have a number for each row of the tree, whose first row is row `start` of its sequence.
struct Tree {
    int start;
    const unsigned* ends;
    const unsigned* depths;
};

// The tree of a sequence by its block table: the word before the table says where in `tables` the tree is, and 0 that there
// is none. A tree is its start, its number of rows, ends and depths.
__device__ __forceinline__ Tree tree_of(const unsigned* tables, unsigned table) {
    unsigned at = tables[table - 1];
    if (at == 0) return {0x7fffffff, nullptr, nullptr};
    const unsigned* tree = tables + at;
    return {int(tree[0]), tree + 2, tree + 2 + tree[1]};
}

// The position of a row of a sequence.
__device__ __forceinline__ int position_of(const Tree& tree, int row) {
    return row < tree.start ? row : tree.start + int(tree.depths[row - tree.start]);
}

// The first row that the window of a row at this position has; where it has rows of the tree, the tree's first.
__device__ __forceinline__ int first_row(const Tree& tree, int window, int position) {
    return window > 0 ? min(tree.start, max(0, position + 1 - window)) : 0;
}

// Whether a row of the tree is no ancestor of row `query`, or beyond its window. Rows before the tree are never hidden.
__device__ __forceinline__ bool is_hidden(const Tree& tree, int window, int query, int position, int key) {
    if (key < tree.start) return false;
    int node = key - tree.start;
    if (query - tree.start >= int(tree.ends[node])) return true;
    return window > 0 && position - tree.start - int(tree.depths[node]) >= window;
}
