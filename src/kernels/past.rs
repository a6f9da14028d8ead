//! Past key values: what the tuning kernels attend to at the positions of a learned prompt of key-values, in place of
//! keys and values that the forward pass would compute.

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
            bail!("past key values of {} layers were given, and layer {layer} attends", self.layers.len());
        };
        let first = |past: &Tensor, computed: &Tensor| {
            let (n, t) = (past.dim(0)?, computed.dim(0)?);
            if n > t || past.dims()[1..] != computed.dims()[1..] {
                bail!(
                    "past key values {:?} do not fit the computed {:?} of layer {layer}",
                    past.dims(),
                    computed.dims()
                );
            }
            let past = past.to_dtype(computed.dtype())?;
            if n == t { Ok(past) } else { Tensor::cat(&[past, computed.narrow(0, n, t - n)?], 0) }
        };
        Ok((first(keys, k)?, first(values, v)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::{AttentionParams, Kernels, layout::BatchLayout};

    fn random(shape: (usize, usize, usize)) -> Var {
        Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn past_key_values_are_read_in_place_of_computed_ones_and_get_their_gradient() {
        let (n, lengths) = (3, [4, 1, 2]);
        let (q, k, v) = (random((10, 4, 8)), random((10, 2, 8)), random((10, 2, 8)));
        let (keys, values_) = (random((n, 2, 8)), random((n, 2, 8)));
        let past = || PastKeyValues { layers: vec![(keys.as_tensor().clone(), values_.as_tensor().clone())] };
        let whole = |x: &Var, past: &Var| Tensor::cat(&[past.as_tensor(), &x.narrow(0, n, 7).unwrap()], 0).unwrap();

        let batch = BatchLayout::of_lengths(n, &lengths);
        let reference = crate::kernels::reference().tuning();
        let mut plain = reference.kernels(&batch, None, None).unwrap();
        let expected = attend(plain.as_mut(), &q, &whole(&k, &keys), &whole(&v, &values_));
        let all = [reference, crate::kernels::cpu().tuning()].map(|t| t.kernels(&batch, Some(past()), None).unwrap());
        let gradients = |y: &Tensor| {
            let read = y.narrow(0, n, 7).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&keys, &values_, &k].map(|x| values(read.get(x).unwrap()))
        };
        for mut kernels in all {
            let got = attend(kernels.as_mut(), &q, &k, &v);
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
    fn past_key_values_must_fit_the_layers() {
        let x = random((4, 2, 8)).as_tensor().clone();
        let past = |shape| {
            let x = random(shape).as_tensor().clone();
            PastKeyValues { layers: vec![(x.clone(), x)] }
        };
        assert!(past((4, 2, 8)).replace(0, &x, &x).is_ok());
        assert!(past((4, 2, 8)).replace(1, &x, &x).is_err());
        assert!(past((5, 2, 8)).replace(0, &x, &x).is_err());
        assert!(past((3, 1, 8)).replace(0, &x, &x).is_err());
    }
}
