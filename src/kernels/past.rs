//! Keys and values that are given, not computed: what the tuning kernels read where a prompt of
//! key-values is learned.

use candle_core::{Result, Tensor, bail};

/// Keys and values of the first packed rows in each layer, which all sequences share. They stand in
/// for what the forward pass computes at those rows, which nothing reads then, so the rows
/// themselves may be anything. Gradients flow to them.
#[derive(Debug, Clone)]
pub struct PastKeyValues {
    /// For each layer, both `[n, kv_heads, head_dim]`; keys as attention reads them, rotated.
    pub layers: Vec<(Tensor, Tensor)>,
}

impl PastKeyValues {
    /// Computed keys and values `[t, kv_heads, head_dim]` of a layer, the first n replaced.
    pub fn replace(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Some((keys, values)) = self.layers.get(layer) else {
            bail!("keys and values are given for {} layers, attention is in layer {layer}", self.layers.len());
        };
        let first = |given: &Tensor, computed: &Tensor| {
            let (n, t) = (given.dim(0)?, computed.dim(0)?);
            if n > t || given.dims()[1..] != computed.dims()[1..] {
                bail!("{:?} is given for {:?} in layer {layer}", given.dims(), computed.dims());
            }
            let given = given.to_dtype(computed.dtype())?;
            if n == t { Ok(given) } else { Tensor::cat(&[given, computed.narrow(0, n, t - n)?], 0) }
        };
        Ok((first(keys, k)?, first(values, v)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::{AttentionParams, Kernels, dense::DenseKernels, fused::FusedKernels};

    fn random(shape: (usize, usize, usize)) -> Var {
        Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn given_keys_and_values_are_read_in_place_of_computed_ones_and_get_their_gradient() {
        let (n, lengths) = (3, [4, 1, 2]);
        let (q, k, v) = (random((10, 4, 8)), random((10, 2, 8)), random((10, 2, 8)));
        let (keys, values_) = (random((n, 2, 8)), random((n, 2, 8)));
        let given = || PastKeyValues { layers: vec![(keys.as_tensor().clone(), values_.as_tensor().clone())] };
        let whole = |x: &Var, given: &Var| Tensor::cat(&[given.as_tensor(), &x.narrow(0, n, 7).unwrap()], 0).unwrap();

        let mut plain = DenseKernels::with_prefix(n, &lengths, &Device::Cpu).unwrap();
        let expected = attend(&mut plain, &q, &whole(&k, &keys), &whole(&v, &values_));
        let mut dense = DenseKernels::with_prefix(n, &lengths, &Device::Cpu).unwrap().with_past(given());
        let mut fused = FusedKernels::with_prefix(n, &lengths).with_past(given());
        let all: [&mut dyn Kernels; 2] = [&mut dense, &mut fused];
        let gradients = |y: &Tensor| {
            let read = y.narrow(0, n, 7).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&keys, &values_, &k].map(|x| values(read.get(x).unwrap()))
        };
        for kernels in all {
            let got = attend(kernels, &q, &k, &v);
            let close = |a: &[f32], b: &[f32]| {
                assert!(a.len() == b.len() && b.iter().any(|x| x.abs() > 1e-2));
                a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() < 1e-4, "{a} {b}"));
            };
            close(&values(&got), &values(&expected));
            let (got, expected) = (gradients(&got), gradients(&expected));
            got.iter().zip(&expected).for_each(|(a, b)| close(a, b));
            assert!(got[2][..n * 2 * 8].iter().all(|&x| x == 0.0), "what was computed at the prompt's rows is read");
        }
    }

    fn attend(kernels: &mut dyn Kernels, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let params = AttentionParams { window: Some(5), ..AttentionParams::scaled(0.35) };
        kernels.attention(0, q, k, v, &params).unwrap()
    }

    #[test]
    fn what_is_given_must_fit_the_layers() {
        let x = random((4, 2, 8)).as_tensor().clone();
        let given = |shape| {
            let x = random(shape).as_tensor().clone();
            PastKeyValues { layers: vec![(x.clone(), x)] }
        };
        assert!(given((4, 2, 8)).replace(0, &x, &x).is_ok());
        assert!(given((4, 2, 8)).replace(1, &x, &x).is_err());
        assert!(given((5, 2, 8)).replace(0, &x, &x).is_err());
        assert!(given((3, 1, 8)).replace(0, &x, &x).is_err());
    }
}
