//! AdamW over one small tensor, on the host. The prompt is a few thousand numbers: what matters is
//! that its whole state can be saved and compared bit for bit.

/// AdamW (Loshchilov & Hutter 2019), its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Decoupled from the gradient; scaled by the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// Running means of the gradient and of its square.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl Moments {
    /// For `n` values, before the first step.
    pub fn zeros(n: usize) -> Self {
        Self { first: vec![0.0; n], second: vec![0.0; n] }
    }
}

impl AdamW {
    /// One update of `values` by `gradient`; `step` counts from 1.
    pub fn update(&self, values: &mut [f32], gradient: &[f32], moments: &mut Moments, step: usize, rate: f64) {
        let bias1 = 1.0 - self.beta1.powi(step as i32);
        let bias2 = 1.0 - self.beta2.powi(step as i32);
        let state = moments.first.iter_mut().zip(&mut moments.second);
        for ((value, &g), (m, v)) in values.iter_mut().zip(gradient).zip(state) {
            let g = f64::from(g);
            let (new_m, new_v) = (
                self.beta1 * f64::from(*m) + (1.0 - self.beta1) * g,
                self.beta2 * f64::from(*v) + (1.0 - self.beta2) * g * g,
            );
            (*m, *v) = (new_m as f32, new_v as f32);
            let update = (new_m / bias1) / ((new_v / bias2).sqrt() + self.epsilon);
            let x = f64::from(*value);
            *value = (x - rate * self.weight_decay * x - rate * update) as f32;
        }
    }
}

/// Scales a gradient down to a Euclidean norm of at most `limit`; returns the norm it had.
pub fn clip(gradient: &mut [f32], limit: f64) -> f64 {
    let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    if norm > limit {
        let scale = (limit / norm) as f32;
        gradient.iter_mut().for_each(|g| *g *= scale);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_equal_those_of_pytorch() {
        // torch.optim.AdamW([1, -2], lr=0.1, weight_decay=0.01), gradients [0.5, -1], [0.25, 2].
        let mut values = [1.0, -2.0];
        let mut moments = Moments::zeros(2);
        let adam = AdamW { weight_decay: 0.01, ..AdamW::default() };
        adam.update(&mut values, &[0.5, -1.0], &mut moments, 1, 0.1);
        adam.update(&mut values, &[0.25, 2.0], &mut moments, 2, 0.1);
        for (got, expected) in values.iter().zip(PYTORCH) {
            assert!((got - expected).abs() < 1e-6, "{values:?}");
        }
    }

    const PYTORCH: [f32; 2] = [0.804_883_06, -1.932_712_4];

    #[test]
    fn a_gradient_is_clipped_by_its_norm_and_a_small_one_is_left_alone() {
        let mut large = [3.0, 4.0];
        assert_eq!(clip(&mut large, 1.0), 5.0);
        assert!((large[0] - 0.6).abs() < 1e-7 && (large[1] - 0.8).abs() < 1e-7);
        let mut small = [0.3, 0.4];
        clip(&mut small, 1.0);
        assert_eq!(small, [0.3, 0.4]);
    }
}
