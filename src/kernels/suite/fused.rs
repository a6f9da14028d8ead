//! Operations that a backend may do in one launch: against the reference, which does one after another.

use super::*;
use crate::kernels::{
    layout::RowIndices,
    norm::{Norm, NormKind, QkNorms},
};

fn on(device: &Device, norm: &Norm) -> Norm {
    let to = |x: &Tensor| x.to_device(device).unwrap();
    let kind = match &norm.kind {
        NormKind::Rms => NormKind::Rms,
        NormKind::Layer(bias) => NormKind::Layer(bias.as_ref().map(to)),
    };
    Norm { weight: to(&norm.weight), kind, eps: norm.eps }
}

fn host(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    host(x).flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_sum_and_its_norm_are_those_of_one_operation_after_another() {
    for (rows, width) in [(1, 64), (3, 7), (9, 100)] {
        let batch = BatchLayout { segments: vec![Segment::new(rows, 0, vec![0])], ..Default::default() };
        let rms = |eps| Norm { weight: random(width), kind: NormKind::Rms, eps };
        let layer = |bias| Norm { weight: random(width), kind: NormKind::Layer(bias), eps: 1e-5 };
        let cases = [
            (None, rms(1e-5)),
            (Some(rms(1e-3)), rms(1e-5)),
            (None, layer(Some(random(width)))),
            (None, layer(None)),
            (Some(layer(None)), rms(1e-5)),
            (Some(rms(1e-5)), layer(None)),
        ];
        let (x, residual) = (random((rows, width)), random((rows, width)));
        for (backend, dtype, _) in subjects() {
            let shape = KvShape { num_layers: 1, num_kv_heads: 1, head_dim: 8, dtype };
            let mut cache = backend.kv_cache(shape, 1).unwrap();
            let mut kernels = backend.serving(&mut *cache, &batch, &[]).unwrap();
            let to = |x: &Tensor| x.to_device(backend.device()).unwrap();
            for (after, of_sum) in &cases {
                let what = format!("{} {dtype:?} {width} {after:?} {of_sum:?}", backend.name());
                let (after, of_sum) = (after.as_ref().map(|n| on(backend.device(), n)), on(backend.device(), of_sum));
                let (sum, normed) = kernels.add_norm(&to(&x), after.as_ref(), &to(&residual), &of_sum).unwrap();
                let mut branch = to(&x);
                if let Some(after) = &after {
                    branch = kernels.norm(&branch, after).unwrap();
                }
                let expected = (to(&residual) + branch).unwrap();
                let of_expected = kernels.norm(&expected, &of_sum).unwrap();
                assert_close(&host(&sum), &host(&expected), 1e-5, &what);
                assert_close(&host(&normed), &host(&of_expected), 1e-4, &what);
                if backend.device().is_cpu() {
                    assert_eq!((bits(&sum), bits(&normed)), (bits(&expected), bits(&of_expected)), "{what}");
                }
            }
            let narrow = to(&random((rows, width + 1)));
            assert!(kernels.add_norm(&to(&x), None, &narrow, &on(backend.device(), &cases[0].1)).is_err());
        }
    }
}

#[test]
fn normed_and_rotated_queries_and_keys_attend_as_prepared_ones() {
    for (heads, kv_heads, dim, half) in [(4, 2, 16, 8), (3, 1, 20, 5), (6, 2, 64, 32), (2, 2, 130, 0)] {
        let rows = 21;
        let (q, k, v) = (random((rows, heads * dim)), random((rows, kv_heads * dim)), random((rows, kv_heads * dim)));
        let (cos, sin) = (random((rows, half.max(1))), random((rows, half.max(1))));
        let params = AttentionParams::scaled(0.2);
        for by_head in [true, false] {
            let norm = |heads: usize, eps| {
                let width = if by_head { dim } else { heads * dim };
                Norm { weight: random(width), kind: NormKind::Rms, eps }
            };
            let norms = QkNorms { queries: norm(heads, 1e-5), keys: norm(kv_heads, 1e-3), by_head };
            let mut plain = kernels(&*crate::kernels::reference(), rows);
            let split = |x: &Tensor, heads: usize| x.reshape((rows, heads, dim)).unwrap();
            let mut prepared = |x: &Tensor, heads: usize, norm: &Norm| {
                let x = if by_head { split(x, heads) } else { x.clone() };
                let x = split(&plain.rms_norm(&x, &norm.weight, norm.eps).unwrap(), heads);
                if half == 0 { x } else { plain.rope(&x, &cos, &sin).unwrap() }
            };
            let (of_q, of_k) = (prepared(&q, heads, &norms.queries), prepared(&k, kv_heads, &norms.keys));
            let expected = plain.attention(0, &of_q, &of_k, &split(&v, kv_heads), &params).unwrap();
            for (backend, dtype, tolerance) in subjects() {
                let shape = KvShape { num_layers: 1, num_kv_heads: kv_heads, head_dim: dim, dtype };
                let mut cache = backend.kv_cache(shape, 2).unwrap();
                let batch = BatchLayout { segments: vec![Segment::new(rows, 0, vec![1])], ..Default::default() };
                let mut kernels = backend.serving(&mut *cache, &batch, &[]).unwrap();
                let to = |x: &Tensor| x.to_device(backend.device()).unwrap();
                let own = QkNorms {
                    queries: on(backend.device(), &norms.queries),
                    keys: on(backend.device(), &norms.keys),
                    by_head,
                };
                let (q, k, v, cos, sin) = (to(&q), to(&k), to(&v), to(&cos), to(&sin));
                let rotation = (half > 0).then_some((&cos, &sin));
                let found = kernels.normed_rotary_attention(0, [&q, &k, &v], dim, &own, rotation, &params).unwrap();
                let what = format!("{} {dtype:?} {heads}/{kv_heads} of {dim} by head: {by_head}", backend.name());
                assert_close(&host(&found), &expected, tolerance, &what);
            }
        }
    }
}

#[test]
fn positions_and_wanted_rows_are_those_of_the_layout() {
    let tree = Arc::new(TokenTree::new(36, vec![0, 1, 1]));
    let branching = Segment { tree: Some(tree), ..Segment::new(4, 35, vec![2, 0]) };
    for wanted in [vec![0, 4], vec![0, 1, 2, 3, 4, 5], vec![5, 4, 3]] {
        let segments = vec![branching.clone(), Segment::new(2, 7, vec![1])];
        let batch = BatchLayout { segments, wanted: wanted.clone(), ..Default::default() };
        for (backend, dtype, _) in subjects() {
            let shape = KvShape { num_layers: 1, num_kv_heads: 2, head_dim: 8, dtype };
            let mut cache = backend.kv_cache(shape, 3).unwrap();
            let mut kernels = backend.serving(&mut *cache, &batch, &[]).unwrap();
            let RowIndices { positions, wanted: rows } = kernels.row_indices(&batch, 4, backend.device()).unwrap();
            assert_eq!(positions.to_vec1::<u32>().unwrap(), batch.positions());
            let table = random((40, 6));
            for dtype in [DType::F32, DType::BF16] {
                let table = table.to_dtype(dtype).unwrap().to_device(backend.device()).unwrap();
                let found = kernels.pick(&table, &positions).unwrap();
                let index = Tensor::new(batch.positions(), &Device::Cpu).unwrap();
                assert_eq!(bits(&found), bits(&host(&table).index_select(&index, 0).unwrap()), "{}", backend.name());
            }
            match rows {
                Some(rows) => assert_eq!(rows.to_vec1::<u32>().unwrap(), wanted),
                None => assert_eq!(wanted, [0, 1, 2, 3, 4, 5]),
            }
        }
    }
}
