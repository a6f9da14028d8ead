//! One suite for every backend: each operation against the reference in f32, on odd shapes, in f32 and bf16.

use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::{
    Activation, AttentionParams, Backend, BackendKind, Kernels, KvCache,
    cross::{CrossKeyValues, EncodedBatch},
    layout::{BLOCK_SIZE, BatchLayout, BlockId, KvShape, Segment, TokenTree},
    past::PastKeyValues,
    relative_position_bias::RelativePositionBias,
    weight::{Linear, Matrix},
};

mod fused;

/// The backends, the types their weights are in, and how far from the reference in f32 they may be.
fn subjects() -> Vec<(Arc<dyn Backend>, DType, f32)> {
    let backends = [super::cpu(), super::reference()].into_iter().chain(on_gpu());
    backends.into_iter().flat_map(|b| [(Arc::clone(&b), DType::F32, 1e-4), (b, DType::BF16, 6e-2)]).collect()
}

/// Our own and the reference backend on the first GPU. Without one there are none, unless `SOFTSERVE_TEST_GPU` says that
/// there has to be one.
fn on_gpu() -> Vec<Arc<dyn Backend>> {
    static OPENED: OnceLock<Vec<Arc<dyn Backend>>> = OnceLock::new();
    let open = || match super::gpu(0) {
        Ok(device) => [BackendKind::Own, BackendKind::Reference]
            .map(|kind| super::open(kind, &device, super::QuantisedProducts::Exact).unwrap())
            .into(),
        Err(error) if std::env::var_os("SOFTSERVE_TEST_GPU").is_some() => panic!("there is no GPU to test: {error}"),
        Err(_) => Vec::new(),
    };
    OPENED.get_or_init(open).clone()
}

/// Kernels of any device that take and give tensors of the CPU.
struct OnHost<'a>(Box<dyn Kernels + 'a>, Device);

impl OnHost<'_> {
    fn to(&self, x: &Tensor) -> Tensor {
        x.to_device(&self.1).unwrap()
    }

    fn from(&self, y: Result<Tensor>) -> Result<Tensor> {
        y?.to_device(&Device::Cpu)?.to_dtype(DType::F32)
    }
}

impl Kernels for OnHost<'_> {
    fn linear(&mut self, x: &Tensor, layers: &[&Linear], residual: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let (x, residual) = (self.to(x), residual.map(|x| self.to(x)));
        self.0.linear(&x, layers, residual.as_ref())?.into_iter().map(|y| self.from(Ok(y))).collect()
    }

    fn gated_linear(&mut self, activation: Activation, gate: &Linear, up: &Linear, x: &Tensor) -> Result<Tensor> {
        let y = self.0.gated_linear(activation, gate, up, &self.to(x));
        self.from(y)
    }

    fn score(&mut self, x: &Tensor, head: &Linear, softcap: Option<f64>, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let x = self.to(x);
        self.0.score(&x, head, softcap, ids)
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let y = self.0.rms_norm(&self.to(x), &self.to(weight), eps);
        self.from(y)
    }

    fn layer_norm(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let bias = bias.map(|x| self.to(x));
        let y = self.0.layer_norm(&self.to(x), &self.to(weight), bias.as_ref(), eps);
        self.from(y)
    }

    fn rope(&mut self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let y = self.0.rope(&self.to(x), &self.to(cos), &self.to(sin));
        self.from(y)
    }

    fn attention(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let y = self.0.attention(layer, &self.to(q), &self.to(k), &self.to(v), params);
        self.from(y)
    }

    fn rotary_attention(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        head_dim: usize,
        rotation: Option<(&Tensor, &Tensor)>,
        params: &AttentionParams,
    ) -> Result<Tensor> {
        let rotation = rotation.map(|(cos, sin)| (self.to(cos), self.to(sin)));
        let rotation = rotation.as_ref().map(|(cos, sin)| (cos, sin));
        let (q, k, v) = (self.to(q), self.to(k), self.to(v));
        let y = self.0.rotary_attention(layer, [&q, &k, &v], head_dim, rotation, params);
        self.from(y)
    }

    fn cross_attention(&mut self, layer: usize, q: &Tensor, params: &AttentionParams) -> Result<Tensor> {
        let y = self.0.cross_attention(layer, &self.to(q), params);
        self.from(y)
    }

    fn activate(&mut self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        let y = self.0.activate(activation, &self.to(x));
        self.from(y)
    }

    fn log_probabilities(&mut self, logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let y = self.0.log_probabilities(&self.to(logits), targets);
        self.from(y)
    }
}

/// A backend's serving kernels, for tensors of the CPU.
fn serving<'a>(
    backend: &'a dyn Backend,
    cache: &'a mut dyn KvCache,
    batch: &'a BatchLayout,
    encoded: &'a [&'a CrossKeyValues],
) -> OnHost<'a> {
    OnHost(backend.serving(cache, batch, encoded).unwrap(), backend.device().clone())
}

/// A backend's tuning kernels, for tensors of the CPU.
fn tuning(
    backend: &dyn Backend,
    batch: &BatchLayout,
    past: Option<PastKeyValues>,
    encoded: Option<EncodedBatch>,
) -> OnHost<'static> {
    let to =
        |(k, v): (Tensor, Tensor)| (k.to_device(backend.device()).unwrap(), v.to_device(backend.device()).unwrap());
    let past = past.map(|past| PastKeyValues { layers: past.layers.into_iter().map(to).collect() });
    let encoded = encoded
        .map(|encoded| EncodedBatch { layers: encoded.layers.into_iter().map(to).collect(), inputs: encoded.inputs });
    OnHost(backend.tuning().kernels(batch, past, encoded).unwrap(), backend.device().clone())
}

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let difference = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap();
    let size = expected.abs().unwrap().flatten_all().unwrap().max(D::Minus1).unwrap().to_scalar::<f32>().unwrap();
    let difference: f32 = difference.max(D::Minus1).unwrap().to_scalar().unwrap();
    assert!(difference <= tolerance * (1.0 + size), "{what}: {difference} of {size}");
}

/// A linear layer on a backend and the same on the reference.
fn layer(backend: &dyn Backend, dtype: DType, n: usize, k: usize, bias: bool) -> [Linear; 2] {
    let weight = (random((n, k)) * 0.3).unwrap();
    let bias = bias.then(|| random(n));
    let on = |backend: &dyn Backend, dtype| Linear {
        name: "layer".to_owned(),
        weight: backend.weight(Matrix::Values(weight.clone()), dtype).unwrap(),
        bias: bias.as_ref().map(|bias| bias.to_device(backend.device()).unwrap()),
    };
    [on(backend, dtype), on(&*super::reference(), DType::F32)]
}

/// Kernels for one sequence in which only products and norms are asked for.
fn kernels(backend: &dyn Backend, rows: usize) -> OnHost<'static> {
    tuning(backend, &BatchLayout::of_lengths(0, &[rows]), None, None)
}

#[test]
fn linear_layers_with_bias_and_residual_alone_and_together() {
    let reference = super::reference();
    for (backend, dtype, tolerance) in subjects() {
        for (rows, k, n) in [(1, 32, 16), (2, 64, 7), (3, 33, 17), (3, 48, 6), (4, 1032, 9), (37, 96, 5), (64, 64, 130)]
        {
            let what = format!("{} {dtype:?} {rows} {k} {n}", backend.name());
            let x = random((rows, k));
            let layers: Vec<[Linear; 2]> =
                [(n, false), (n + 1, true), (n, true)].map(|(n, bias)| layer(&*backend, dtype, n, k, bias)).into();
            // Of an MLP of the first two layers, and of one of the last.
            let down = [n, 0, n].map(|inner| layer(&*backend, dtype, n, inner.max(1), inner > 0));
            let residual = random((rows, n));
            let mut plain = kernels(&*reference, rows);
            // Serving's products need no cache.
            let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 16, dtype };
            let mut cache = backend.kv_cache(shape, 1).unwrap();
            let batch = BatchLayout::default();
            let serving = serving(&*backend, &mut *cache, &batch, &[]);
            for mut own in [serving, kernels(&*backend, rows)] {
                let ours: Vec<&Linear> = layers.iter().map(|l| &l[0]).collect();
                let theirs: Vec<&Linear> = layers.iter().map(|l| &l[1]).collect();
                let found = own.linear(&x, &ours, None).unwrap();
                let expected = plain.linear(&x, &theirs, None).unwrap();
                assert_eq!(found.len(), 3);
                for (found, expected) in found.iter().zip(&expected) {
                    assert_close(found, expected, tolerance, &what);
                }
                let added = own.linear(&x, &ours[2..], Some(&residual)).unwrap();
                assert_close(&added[0], &(&expected[2] + &residual).unwrap(), tolerance, &what);
                for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                    for (a, b) in [(0, 0), (2, 2)] {
                        let found = own.gated_linear(activation, ours[a], ours[b], &x).unwrap();
                        let expected = plain.gated_linear(activation, theirs[a], theirs[b], &x).unwrap();
                        assert_close(&found, &expected, 2.0 * tolerance, &format!("{what} {activation:?}"));
                        let found =
                            own.gated_mlp(activation, [ours[a], ours[b]], &down[a][0], &x, added.first()).unwrap();
                        let down = &down[a][1];
                        let expected =
                            plain.gated_mlp(activation, [theirs[a], theirs[b]], down, &x, added.first()).unwrap();
                        assert_close(&found, &expected, 4.0 * tolerance, &format!("{what} {activation:?}, an MLP"));
                    }
                }
                assert!(own.linear(&random((rows, k + 1)), &ours, None).is_err(), "{what}: an input that does not fit");
            }
        }
    }
}

#[test]
fn scores_are_the_log_probabilities_of_whole_rows_of_logits() {
    let reference = super::reference();
    for (backend, dtype, tolerance) in subjects() {
        for (rows, k, n) in [(1, 32, 16), (3, 40, 700), (70, 64, 1033)] {
            let x = random((rows, k));
            let [own, plain] = layer(&*backend, dtype, n, k, rows == 3);
            let ids: Vec<Vec<u32>> =
                (0..rows as u32).map(|i| (0..i % 5).map(|j| (i * 31 + j * 257) % n as u32).collect()).collect();
            for softcap in [None, Some(3.0)] {
                let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 16, dtype };
                let mut cache = backend.kv_cache(shape, 1).unwrap();
                let batch = BatchLayout::default();
                let mut serving = serving(&*backend, &mut *cache, &batch, &[]);
                let found = serving.score(&x, &own, softcap, &ids).unwrap();
                let logits = plain.forward(&x, &mut kernels(&*reference, rows)).unwrap();
                let logits = super::capped(&logits, softcap).unwrap();
                let log_probs = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap().to_vec2::<f32>().unwrap();
                for (row, (ids, found)) in log_probs.iter().zip(ids.iter().zip(&found)) {
                    assert_eq!(ids.len(), found.len());
                    for (id, found) in ids.iter().zip(found) {
                        let difference = (found - row[*id as usize]).abs();
                        assert!(difference <= tolerance * 4.0, "{} {dtype:?} {rows}: {difference}", backend.name());
                    }
                }
                let beyond = vec![vec![n as u32]; rows];
                let beyond = serving.score(&x, &own, softcap, &beyond).unwrap();
                assert!(beyond.iter().flatten().all(|x| *x == f32::NEG_INFINITY));
            }
        }
    }
}

#[test]
fn rows_of_a_weight_and_the_whole_of_it_come_back() {
    for (backend, dtype, tolerance) in subjects() {
        let values = random((21, 40));
        let weight = backend.weight(Matrix::Values(values.clone()), dtype).unwrap();
        let ids = Tensor::new(&[20u32, 0, 7, 7], &Device::Cpu).unwrap();
        let host = |x: Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        assert_close(&host(weight.rows(&ids).unwrap()), &values.index_select(&ids, 0).unwrap(), tolerance, "rows");
        assert_close(&host(weight.to_tensor().unwrap()), &values, tolerance, "all");
        assert!(weight.rows(&Tensor::new(&[21u32], &Device::Cpu).unwrap()).is_err(), "there is no such row");
    }
}

#[test]
fn a_type_that_a_backend_does_not_compute_with_is_refused_by_name() {
    let error = |backend: &dyn Backend, dtype| {
        backend.weight(Matrix::Values(random((2, 2))), dtype).map(drop).unwrap_err().to_string()
    };
    assert!(error(&*super::cpu(), DType::F64).contains("not in f64"));
    assert!(error(&*super::reference(), DType::U8).contains("not in u8"));
}

#[test]
fn norms_rope_activations_and_log_probabilities() {
    let reference = super::reference();
    for (backend, dtype, _) in subjects() {
        let what = format!("{} {dtype:?}", backend.name());
        for (rows, heads, dim) in [(5, 3, 8), (1, 1, 64), (70, 2, 40)] {
            let (mut own, mut plain) = (kernels(&*backend, rows), kernels(&*reference, rows));
            let (x, w, b) = (random((rows, dim)), random(dim), random(dim));
            let (found, expected) = (own.rms_norm(&x, &w, 1e-5), plain.rms_norm(&x, &w, 1e-5));
            assert_close(&found.unwrap(), &expected.unwrap(), 1e-4, &what);
            for b in [None, Some(&b)] {
                let (found, expected) = (own.layer_norm(&x, &w, b, 1e-5), plain.layer_norm(&x, &w, b, 1e-5));
                assert_close(&found.unwrap(), &expected.unwrap(), 1e-4, &what);
            }
            for half in [dim / 2, dim / 8] {
                let (x, cos, sin) = (random((rows, heads, dim)), random((rows, half)), random((rows, half)));
                let (found, expected) = (own.rope(&x, &cos, &sin), plain.rope(&x, &cos, &sin));
                assert_close(&found.unwrap(), &expected.unwrap(), 1e-5, &what);
            }
            for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                let (found, expected) = (own.activate(activation, &x), plain.activate(activation, &x));
                assert_close(&found.unwrap(), &expected.unwrap(), 1e-5, &what);
            }
            let targets: Vec<u32> = (0..rows as u32).map(|i| (i * 7) % dim as u32).collect();
            let (found, expected) = (own.log_probabilities(&x, &targets), plain.log_probabilities(&x, &targets));
            assert_close(&found.unwrap(), &expected.unwrap(), 1e-5, &what);
        }
    }
}

/// Every option of causal attention, for so many heads.
fn options(heads: usize, dim: usize) -> Vec<AttentionParams> {
    let plain = AttentionParams::scaled((dim as f32).powf(-0.5));
    let slopes: Arc<[f32]> = (1..=heads as i32).map(|i| 0.7f32.powi(i)).collect();
    let bias = RelativePositionBias::new(heads, 9, |head, distance| (head as f32 + 0.3 * distance as f32).sin());
    vec![
        AttentionParams { window: Some(24), ..plain.clone() },
        AttentionParams { window: Some(1), softcap: Some(3.0), ..plain.clone() },
        AttentionParams { alibi_slopes: Some(slopes), window: Some(33), ..plain.clone() },
        AttentionParams { relative_position_bias: Some(bias.into()), scale: 0.3, ..plain.clone() },
        plain,
    ]
}

/// Attention over whole sequences, `chunk` rows of each at a time, through blocks that lie scattered.
fn served(
    backend: &dyn Backend,
    dtype: DType,
    lengths: &[usize],
    [q, k, v]: [&Tensor; 3],
    params: &AttentionParams,
    chunk: usize,
) -> Tensor {
    let (_, num_kv_heads, head_dim) = k.dims3().unwrap();
    let mut cache = backend.kv_cache(KvShape { num_layers: 2, num_kv_heads, head_dim, dtype }, 32).unwrap();
    let mut next = 0;
    let table = |length: &usize| {
        let blocks = length.div_ceil(BLOCK_SIZE) as u32;
        next += blocks;
        (next - blocks..next).map(|b| (b * 13) % 32).collect::<Vec<_>>()
    };
    let tables: Vec<Vec<BlockId>> = lengths.iter().map(table).collect();
    let starts: Vec<usize> = lengths.iter().scan(0, |s, l| Some(std::mem::replace(s, *s + l))).collect();
    let mut outputs: Vec<Vec<Tensor>> = vec![Vec::new(); lengths.len()];
    for done in (0..*lengths.iter().max().unwrap()).step_by(chunk) {
        let (mut batch, mut index, mut owners) = (BatchLayout::default(), Vec::new(), Vec::new());
        for (i, length) in lengths.iter().enumerate().filter(|(_, length)| **length > done) {
            let rows = chunk.min(length - done);
            batch.segments.push(Segment::new(rows, done, tables[i].clone()));
            index.extend((0..rows).map(|j| (starts[i] + done + j) as u32));
            owners.push(i);
        }
        let index = Tensor::new(index, &Device::Cpu).unwrap();
        let [q, k, v] = [q, k, v].map(|x| x.index_select(&index, 0).unwrap());
        let out = serving(backend, &mut *cache, &batch, &[]).attention(1, &q, &k, &v, params).unwrap();
        for (i, rows) in owners.into_iter().zip(batch.rows()) {
            outputs[i].push(out.narrow(0, rows.start, rows.len()).unwrap());
        }
    }
    Tensor::cat(&outputs.concat(), 0).unwrap()
}

#[test]
fn attention_over_the_cache_in_any_chunks_is_that_of_whole_sequences() {
    let lengths = [1, 31, 32, 33, 70];
    let batch = BatchLayout::of_lengths(0, &lengths);
    let rows = batch.num_rows();
    for (heads, kv_heads, dim) in [(6, 2, 20), (7, 1, 96), (4, 4, 16), (6, 2, 64), (3, 3, 64), (5, 1, 128), (2, 1, 256)]
    {
        let (q, k, v) = (random((rows, heads, dim)), random((rows, kv_heads, dim)), random((rows, kv_heads, dim)));
        for params in options(heads, dim) {
            let mut plain = tuning(&*super::reference(), &batch, None, None);
            let expected = plain.attention(1, &q, &k, &v, &params).unwrap();
            for (backend, dtype, tolerance) in subjects() {
                for chunk in [100, 7] {
                    let found = served(&*backend, dtype, &lengths, [&q, &k, &v], &params, chunk);
                    assert_close(&found, &expected, tolerance, &format!("{} {dtype:?} {params:?}", backend.name()));
                }
            }
        }
    }
}

/// Attention of a sequence of `start` rows and a tree, `chunk` rows at a time, beside a sequence of one row.
fn served_tree(
    backend: &dyn Backend,
    dtype: DType,
    (start, depths): (usize, &[u32]),
    [q, k, v]: [&Tensor; 3],
    params: &AttentionParams,
    chunk: usize,
) -> Tensor {
    let (rows, num_kv_heads, head_dim) = k.dims3().unwrap();
    let mut cache = backend.kv_cache(KvShape { num_layers: 1, num_kv_heads, head_dim, dtype }, 32).unwrap();
    let blocks: Vec<BlockId> = (0..rows.div_ceil(BLOCK_SIZE) as u32).map(|b| 1 + (b * 13) % 31).collect();
    let tree = Some(Arc::new(TokenTree::new(start, depths.to_vec())));
    let mut outputs = Vec::new();
    for done in (0..rows).step_by(chunk) {
        let rows = chunk.min(rows - done);
        let segment = Segment { tree: tree.clone(), ..Segment::new(rows, done, blocks.clone()) };
        let batch = BatchLayout { segments: vec![Segment::new(1, 0, vec![0]), segment], ..Default::default() };
        let index: Vec<u32> = std::iter::once(0).chain((done..done + rows).map(|row| row as u32)).collect();
        let index = Tensor::new(index, &Device::Cpu).unwrap();
        let [q, k, v] = [q, k, v].map(|x| x.index_select(&index, 0).unwrap());
        let out = serving(backend, &mut *cache, &batch, &[]).attention(0, &q, &k, &v, params).unwrap();
        outputs.push(out.narrow(0, 1, rows).unwrap());
    }
    Tensor::cat(&outputs, 0).unwrap()
}

#[test]
fn each_path_of_a_tree_attends_as_a_sequence_of_its_own() {
    let depths: Vec<u32> = [0, 1, 2, 2, 1, 2, 3, 0, 0, 1].into_iter().cycle().take(70).collect();
    for start in [0usize, 3, 45] {
        let rows = start + depths.len();
        let tree = Arc::new(TokenTree::new(start, depths.clone()));
        let segment = Segment { tree: Some(tree), ..Segment::new(rows, 0, Vec::new()) };
        for (heads, kv_heads, dim) in [(6, 2, 20), (4, 4, 16), (6, 2, 64), (5, 1, 128)] {
            let (q, k, v) = (random((rows, heads, dim)), random((rows, kv_heads, dim)), random((rows, kv_heads, dim)));
            let small = AttentionParams { window: Some(2), ..AttentionParams::scaled(0.2) };
            for params in options(heads, dim).into_iter().chain([small]) {
                let seen = |row| (0..=row as u32).filter(|&key| segment.sees(row, key as usize)).collect::<Vec<_>>();
                let expected: Vec<Tensor> = (0..rows)
                    .map(|row| {
                        let path = Tensor::new(seen(row), &Device::Cpu).unwrap();
                        let [q, k, v] = [&q, &k, &v].map(|x| x.index_select(&path, 0).unwrap());
                        let last = q.dims()[0] - 1;
                        let mut plain = kernels(&*super::reference(), last + 1);
                        plain.attention(0, &q, &k, &v, &params).unwrap().narrow(0, last, 1).unwrap()
                    })
                    .collect();
                let expected = Tensor::cat(&expected, 0).unwrap();
                for (backend, dtype, tolerance) in subjects() {
                    for chunk in [200, 20, 7] {
                        let tree = (start, &depths[..]);
                        let found = served_tree(&*backend, dtype, tree, [&q, &k, &v], &params, chunk);
                        let what = format!("{} {dtype:?} {start} {chunk} {params:?}", backend.name());
                        assert_close(&found, &expected, tolerance, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn projections_side_by_side_with_a_rotation_attend_as_each_by_itself() {
    let (heads, kv_heads, dim, width) = (4, 2, 16, 24);
    for rows in [3, 40] {
        let (x, cos, sin) = (random((rows, width)), random((rows, dim / 2)), random((rows, dim / 2)));
        for (backend, dtype, tolerance) in subjects() {
            for bias in [false, true] {
                let layers = [heads, kv_heads, kv_heads].map(|heads| layer(&*backend, dtype, heads * dim, width, bias));
                let weights = layers.iter().map(|l| l[0].weight.clone()).collect();
                let joined = backend.side_by_side(weights).unwrap();
                let own: Vec<Linear> =
                    layers.iter().zip(joined).map(|([own, _], weight)| Linear { weight, ..own.clone() }).collect();
                let shape = KvShape { num_layers: 1, num_kv_heads: kv_heads, head_dim: dim, dtype };
                let mut cache = backend.kv_cache(shape, 3).unwrap();
                let segments = vec![Segment::new(rows, 0, vec![2, 0])];
                let batch = BatchLayout { segments, ..Default::default() };
                // On the device from the products to attention, as in a model: results may be parts of one tensor.
                let to = |x: &Tensor| x.to_device(backend.device()).unwrap();
                let mut kernels = backend.serving(&mut *cache, &batch, &[]).unwrap();
                let products = kernels.linear(&to(&x), &own.iter().collect::<Vec<_>>(), None).unwrap();
                let [q, k, v] = [0, 1, 2].map(|i| &products[i]);
                let params = AttentionParams::scaled(0.25);
                let (c, s) = (to(&cos), to(&sin));
                let found = kernels.rotary_attention(0, [q, k, v], dim, Some((&c, &s)), &params).unwrap();
                let found = found.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();

                let mut plain = self::kernels(&*super::reference(), rows);
                let theirs: Vec<&Linear> = layers.iter().map(|l| &l[1]).collect();
                let products = plain.linear(&x, &theirs, None).unwrap();
                let [q, k, v] = [(0, heads), (1, kv_heads), (2, kv_heads)]
                    .map(|(i, heads)| products[i].reshape((rows, heads, dim)).unwrap());
                let (q, k) = (plain.rope(&q, &cos, &sin).unwrap(), plain.rope(&k, &cos, &sin).unwrap());
                let expected = plain.attention(0, &q, &k, &v, &params).unwrap();
                assert_close(
                    &found,
                    &expected,
                    2.0 * tolerance,
                    &format!("{} {dtype:?} {rows} {bias}", backend.name()),
                );
            }
        }
    }
}

#[test]
fn keys_and_values_that_are_written_or_copied_are_attended_to_as_computed_ones() {
    let (heads, kv_heads, dim, prefix, rows) = (4, 2, 20, 37, 8);
    let total = prefix + rows;
    let (q, k, v) = (random((total, heads, dim)), random((total, kv_heads, dim)), random((total, kv_heads, dim)));
    let params = AttentionParams::scaled(0.3);
    let mut plain = kernels(&*super::reference(), total);
    let expected = plain.attention(0, &q, &k, &v, &params).unwrap().narrow(0, prefix, rows).unwrap();
    for (backend, dtype, tolerance) in subjects() {
        let shape = KvShape { num_layers: 2, num_kv_heads: kv_heads, head_dim: dim, dtype };
        let mut cache = backend.kv_cache(shape, 5).unwrap();
        assert_eq!((cache.shape(), cache.num_blocks()), (&shape, 5));
        let first = |x: &Tensor| x.narrow(0, 0, prefix).unwrap().transpose(0, 1).unwrap();
        cache.write(1, &[4, 1], 0, &first(&k), &first(&v)).unwrap();
        cache.copy(1, 3, prefix - BLOCK_SIZE).unwrap();
        let segments = vec![Segment::new(rows, prefix, vec![4, 3])];
        let batch = BatchLayout { segments, ..Default::default() };
        let rest = |x: &Tensor| x.narrow(0, prefix, rows).unwrap();
        let mut own = serving(&*backend, &mut *cache, &batch, &[]);
        let found = own.attention(1, &rest(&q), &rest(&k), &rest(&v), &params).unwrap();
        assert_close(&found, &expected, tolerance, &backend.name());
        drop(own);
        refuses_what_does_not_fit(&mut *cache, &first(&k));
    }
}

fn refuses_what_does_not_fit(cache: &mut dyn KvCache, keys: &Tensor) {
    for (layer, blocks, start) in [(2, [0, 1], 0), (0, [0, 5], 0), (0, [0, 1], 28)] {
        assert!(cache.write(layer, &blocks, start, keys, keys).is_err(), "{layer} {blocks:?} {start}");
    }
    assert!(cache.write(0, &[0, 1], 0, keys, &keys.narrow(1, 0, 9).unwrap()).is_err());
    assert!(cache.copy(0, 0, 1).is_err() && cache.copy(0, 5, 1).is_err() && cache.copy(5, 0, 1).is_err());
}

#[test]
fn attention_of_an_encoder_and_to_its_output() {
    let lengths = [5, 1, 12];
    let batch = BatchLayout::of_lengths(0, &lengths);
    for (heads, kv_heads, dim) in [(6, 2, 20), (4, 4, 16)] {
        let rows = batch.num_rows();
        let (q, k, v) = (random((rows, heads, dim)), random((rows, kv_heads, dim)), random((rows, kv_heads, dim)));
        let encoded = EncodedBatch { layers: vec![(k.clone(), v.clone())], inputs: vec![6..18, 0..5, 5..6] };
        let params = AttentionParams { causal: false, ..options(heads, dim)[3].clone() };
        let cross = AttentionParams { causal: false, ..AttentionParams::scaled(0.3) };
        let mut plain = tuning(&*super::reference(), &batch, None, Some(encoded.clone()));
        let expected =
            [plain.attention(0, &q, &k, &v, &params).unwrap(), plain.cross_attention(0, &q, &cross).unwrap()];
        for (backend, dtype, _) in subjects() {
            let shape = KvShape { num_layers: 1, num_kv_heads: kv_heads, head_dim: dim, dtype };
            let mut cache = backend.kv_cache(shape, 0).unwrap();
            let to = |x: &Tensor| x.to_device(backend.device()).unwrap();
            let layers: Vec<_> = encoded.layers.iter().map(|(k, v)| (to(k), to(v))).collect();
            let of =
                |input: &std::ops::Range<usize>| CrossKeyValues::of_rows(&layers, input.start, input.len()).unwrap();
            let kept: Vec<_> = encoded.inputs.iter().map(of).collect();
            let kept: Vec<_> = kept.iter().collect();
            let mut own = serving(&*backend, &mut *cache, &batch, &kept);
            assert_close(&own.attention(0, &q, &k, &v, &params).unwrap(), &expected[0], 1e-4, &backend.name());
            assert_close(&own.cross_attention(0, &q, &cross).unwrap(), &expected[1], 1e-4, &backend.name());
            assert!(own.cross_attention(1, &q, &cross).is_err(), "there is one layer");
            drop(own);
            let mut none = serving(&*backend, &mut *cache, &batch, &[]);
            assert!(none.cross_attention(0, &q, &cross).is_err(), "there is no encoder's output");
        }
    }
}

#[test]
fn gradients_through_products_attention_and_past_key_values() {
    let (heads, kv_heads, dim, shared, lengths) = (4, 2, 8, 3, [4, 1, 2]);
    let batch = BatchLayout::of_lengths(shared, &lengths);
    let rows = batch.num_rows();
    let x = Var::from_tensor(&random((rows, 24))).unwrap();
    let [past_k, past_v] = [0, 1].map(|_| Var::from_tensor(&random((shared, kv_heads, dim))).unwrap());
    let weights = random((rows - shared, heads * dim));
    for (backend, dtype, tolerance) in subjects() {
        let projections = [heads, kv_heads, kv_heads].map(|heads| layer(&*backend, dtype, heads * dim, 24, true));
        let run = |backend: &dyn Backend, which: usize| {
            let past = PastKeyValues { layers: vec![(past_k.as_tensor().clone(), past_v.as_tensor().clone())] };
            let mut kernels = tuning(backend, &batch, Some(past), None);
            let layers: Vec<&Linear> = projections.iter().map(|l| &l[which]).collect();
            let [q, k, v] = kernels.linear(x.as_tensor(), &layers, None).unwrap().try_into().unwrap();
            let split = |y: &Tensor, heads: usize| y.reshape((rows, heads, dim)).unwrap();
            let params = &options(heads, dim)[0];
            let y = kernels.attention(0, &split(&q, heads), &split(&k, kv_heads), &split(&v, kv_heads), params);
            let y = y.unwrap().narrow(0, shared, rows - shared).unwrap();
            let gradients = (&y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |var: &Var| gradients.get(var.as_tensor()).expect("a gradient").clone();
            [y, of(&x), of(&past_k), of(&past_v)]
        };
        let (found, expected) = (run(&*backend, 0), run(&*super::reference(), 1));
        for (found, expected) in found.iter().zip(&expected) {
            assert_close(found, expected, 2.0 * tolerance, &format!("{} {dtype:?}", backend.name()));
        }
    }
}

#[test]
fn what_another_backend_made_is_refused() {
    let (cpu, reference) = (super::cpu(), super::reference());
    let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 8, dtype: DType::F32 };
    let batch = BatchLayout::default();
    for (own, other) in [(&cpu, &reference), (&reference, &cpu)] {
        let mut cache = other.kv_cache(shape, 1).unwrap();
        assert!(own.serving(&mut *cache, &batch, &[]).is_err());
    }
    let [_, foreign] = layer(&*cpu, DType::F32, 4, 8, false);
    assert!(kernels(&*cpu, 1).linear(&random((1, 8)), &[&foreign], None).is_err());
}
