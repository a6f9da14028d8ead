//! The CPU kernels by themselves, on the shapes of a small model. Each group answers one question;
//! items are multiplications and additions (two a product), bytes are weights, so the figures to
//! compare are the rates.
//!
//! - `product`: how fast is a product with a frozen matrix, for one row, a batch of decodes, a prefill?
//! - `instructions`: what does each instruction set give?
//! - `attention`: what does a decode step's, and a prefill's, attention cost?
//! - `memory`: what can the memory give at most? (A read of more than any cache holds.)
//!
//! `cargo bench --bench kernels`

#![expect(clippy::expect_used, reason = "a benchmark that cannot start has nothing to measure")]

use candle_core::DType;
use divan::{
    Bencher,
    counter::{BytesCount, ItemsCount},
};
use softserve::kernels::{
    AttentionParams,
    cpu::{
        Isa, PackedMatrix, Precision, attention,
        kv_cache::CpuKvCache,
        matmul::{Product, multiply},
        pool,
    },
    layout::{BLOCK_SIZE, KvShape, Segment},
};

fn main() {
    divan::main();
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect()
}

fn matrix(precision: Precision, n: usize, k: usize) -> PackedMatrix {
    let values = values(n * k);
    match precision {
        Precision::F32 => PackedMatrix::from_f32(&values, n, k),
        Precision::Bf16 => PackedMatrix::from_f32_rounded(&values, n, k),
    }
    .expect("memory for a matrix")
}

const N: usize = 1536;
const K: usize = 2048;

/// Several matrices in turn, so that no cache of a core holds the weights.
fn products(bencher: Bencher, isa: Isa, precision: Precision, rows: usize) {
    let matrices: Vec<_> = (0..24).map(|_| matrix(precision, N, K)).collect();
    let x = values(rows * K);
    let bytes: usize = matrices.iter().map(PackedMatrix::num_bytes).sum();
    bencher.counter(ItemsCount::new(24 * 2 * rows * N * K)).counter(BytesCount::new(bytes)).bench(|| {
        for weight in &matrices {
            let product = Product { weight, bias: None, residual: None };
            divan::black_box(multiply(isa, pool::global(), &x, rows, &[product]));
        }
    });
}

#[divan::bench(args = [1, 8, 32, 64, 512], sample_count = 20)]
fn product_f32(bencher: Bencher, rows: usize) {
    products(bencher, Isa::best(), Precision::F32, rows);
}

#[divan::bench(args = [1, 8, 32, 64, 512], sample_count = 20)]
fn product_bf16(bencher: Bencher, rows: usize) {
    products(bencher, Isa::best(), Precision::Bf16, rows);
}

fn names() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

#[divan::bench(args = names(), sample_count = 5)]
fn instructions_bf16_32_rows(bencher: Bencher, name: &str) {
    let isa = Isa::available().into_iter().find(|i| i.name() == name).expect("one of those available");
    products(bencher, isa, Precision::Bf16, 32);
}

/// `sequences` of `positions`, the last `rows` of each to be computed; 9 heads on 3 of 64. All blocks but
/// the last are those of one of so many `prompts`.
fn attention(bencher: Bencher, precision: Precision, [sequences, prompts]: [usize; 2], positions: usize, rows: usize) {
    const HEADS: usize = 9;
    const LAYERS: usize = 30;
    let dtype = if precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
    let shape = KvShape { num_layers: LAYERS, num_kv_heads: 3, head_dim: 64, dtype };
    let blocks = positions.div_ceil(BLOCK_SIZE);
    let mut cache = CpuKvCache::new(shape, sequences * blocks).expect("memory for a cache");
    let segment = |i: usize, start: usize, rows: usize| {
        let block = |b: usize| if b + 1 < blocks && start > 0 { i % prompts * blocks + b } else { i * blocks + b };
        Segment::new(rows, start, (0..blocks).map(|b| block(b) as u32).collect())
    };
    let params = AttentionParams::scaled(0.125);
    let mut run = |start: usize, rows: usize| {
        let segments: Vec<_> = (0..sequences).map(|i| segment(i, start, rows)).collect();
        let (q, k) = (values(sequences * rows * HEADS * 64), values(sequences * rows * 3 * 64));
        for layer in 0..LAYERS {
            let rows = attention::Rows { q: &q, k: &k, v: &k, heads: HEADS, params: &params };
            divan::black_box(attention::attend(Isa::best(), pool::global(), &mut cache, layer, &segments, rows));
        }
    };
    run(0, positions);
    bencher.bench_local(|| run(positions - rows, rows));
}

#[divan::bench(args = [Precision::F32, Precision::Bf16], sample_count = 20)]
fn attention_decode_32_of_100(bencher: Bencher, precision: Precision) {
    attention(bencher, precision, [32, 32], 100, 1);
}

#[divan::bench(args = [Precision::F32, Precision::Bf16], sample_count = 20)]
fn attention_decode_32_of_100_with_8_prompts(bencher: Bencher, precision: Precision) {
    attention(bencher, precision, [32, 8], 100, 1);
}

#[divan::bench(args = [Precision::F32, Precision::Bf16], sample_count = 10)]
fn attention_prefill_512(bencher: Bencher, precision: Precision) {
    attention(bencher, precision, [1, 1], 512, 512);
}

#[divan::bench(sample_count = 10)]
fn memory(bencher: Bencher) {
    const WORDS: usize = 192 << 20;
    let words = vec![1u64; WORDS];
    let parts = pool::global().threads() * 16;
    bencher.counter(BytesCount::new(WORDS * 8)).bench(|| {
        let sum = std::sync::atomic::AtomicU64::new(0);
        pool::global().run(parts, &|i| {
            let part = &words[WORDS / parts * i..][..WORDS / parts];
            sum.fetch_add(part.iter().sum(), std::sync::atomic::Ordering::Relaxed);
        });
        sum
    });
}
