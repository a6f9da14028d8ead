//! One tensor out of a foreign file: a name, a number format, and its values in C order.

use bytes::Bytes;
use half::{bf16, f16};
use safetensors::Dtype;
use serde::Serialize;

/// A tensor as stored. `data` is `shape` in C order, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// The name in the file; empty where the file holds a bare tensor.
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

/// Smallest, mean and largest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub min: f64,
    pub mean: f64,
    pub max: f64,
}

impl RawTensor {
    /// `name F32 [5, 64]`, for a list.
    pub fn describe(&self) -> String {
        let name = if self.name.is_empty() { "a tensor" } else { &self.name };
        let name: String = name.chars().take(80).flat_map(char::escape_debug).collect();
        format!("{name} {:?} {:?}", self.dtype, &self.shape[..self.shape.len().min(8)])
    }

    /// Whether a prompt may be stored so.
    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
    }

    /// Rows and columns, where axes of size 1 in front do not count; `None` if it is no matrix.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        match self.shape[..] {
            [ref front @ .., rows, columns] if front.iter().all(|&n| n == 1) => Some((rows, columns)),
            _ => None,
        }
    }

    /// All values; empty for integers.
    pub fn values(&self) -> Vec<f32> {
        fn each<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            data.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
        }
        match self.dtype {
            Dtype::F16 => each(&self.data, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => each(&self.data, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F32 => each(&self.data, f32::from_le_bytes),
            Dtype::F64 => each(&self.data, |b| f64::from_le_bytes(b) as f32),
            _ => Vec::new(),
        }
    }

    /// The Euclidean norm of each row; empty if it is no matrix of floats.
    pub fn row_norms(&self) -> Vec<f64> {
        match self.matrix() {
            Some((_, columns)) if columns > 0 => self.values().chunks(columns).map(norm).collect(),
            _ => Vec::new(),
        }
    }
}

/// The Euclidean norm.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

impl Summary {
    /// Of a list; `None` if it is empty.
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        Some(Self {
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// A view into stored values, counted in items. Nothing of it is to be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;

impl View {
    /// A whole array whose first index goes fastest.
    pub fn fortran(shape: Vec<u64>) -> Self {
        let mut step = 1_u64;
        let mut before = |n: &u64| {
            let stride = step;
            step = step.saturating_mul(*n);
            stride
        };
        let strides = shape.iter().map(&mut before).collect();
        Self { offset: 0, shape, strides }
    }

    /// Cuts the view out of `storage`, in C order. A view that lies in order is not copied; for one
    /// that does not, at most `limit` bytes are allocated.
    pub fn cut(&self, storage: &Bytes, item: usize, limit: u64) -> Result<(Vec<usize>, Bytes), String> {
        if self.shape.len() > MAX_RANK || self.shape.len() != self.strides.len() {
            return Err(format!("a tensor has {} dimensions and {} strides", self.shape.len(), self.strides.len()));
        }
        let too_large = || format!("a tensor of shape {:?} is too large", self.shape);
        let product = |n: &[u64]| n.iter().try_fold(1_u64, |all, n| all.checked_mul(*n));
        let count = product(&self.shape).ok_or_else(too_large)?;
        let bytes = count.checked_mul(item as u64).filter(|n| *n <= limit).ok_or_else(too_large)?;
        let shape = self.shape.iter().map(|&n| n as usize).collect();
        if count == 0 {
            return Ok((shape, Bytes::new()));
        }
        let mut reach = self.shape.iter().zip(&self.strides).map(|(n, stride)| (n - 1).checked_mul(*stride));
        let last = reach.try_fold(self.offset, |all, n| all.checked_add(n?));
        let stored = (storage.len() / item) as u64;
        if last.is_none_or(|last| last >= stored) {
            return Err(format!(
                "a tensor of shape {:?}, strides {:?} and offset {} goes beyond its {stored} stored values",
                self.shape, self.strides, self.offset
            ));
        }
        let start = self.offset as usize * item;
        if self.is_in_order() {
            return Ok((shape, storage.slice(start..start + bytes as usize)));
        }
        let mut out = Vec::with_capacity(bytes as usize);
        for i in 0..count {
            let mut left = i;
            let mut at = self.offset;
            for (n, stride) in self.shape.iter().zip(&self.strides).rev() {
                at += left % n * stride;
                left /= n;
            }
            let at = at as usize * item;
            out.extend_from_slice(&storage[at..at + item]);
        }
        Ok((shape, out.into()))
    }

    fn is_in_order(&self) -> bool {
        let mut step = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(n, stride)| {
            let fits = *n == 1 || *stride == step;
            step *= n;
            fits
        })
    }
}

/// Bytes of one value; `None` for what is no whole number of bytes.
pub fn item_size(dtype: Dtype) -> Option<usize> {
    Some(dtype.bitsize()).filter(|bits| *bits >= 8 && bits % 8 == 0).map(|bits| bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(offset: u64, shape: &[u64], strides: &[u64]) -> View {
        View { offset, shape: shape.to_vec(), strides: strides.to_vec() }
    }

    #[test]
    fn a_view_is_cut_in_c_order() {
        let storage = Bytes::from_static(&[0, 1, 2, 3, 4, 5]);
        let cut = |view: View| view.cut(&storage, 1, 100).map(|(_, bytes)| bytes.to_vec());
        assert_eq!(cut(view(0, &[2, 3], &[3, 1])), Ok(vec![0, 1, 2, 3, 4, 5]));
        assert_eq!(cut(view(0, &[3, 2], &[1, 3])), Ok(vec![0, 3, 1, 4, 2, 5]));
        assert_eq!(cut(View::fortran(vec![3, 2])), Ok(vec![0, 3, 1, 4, 2, 5]));
        assert_eq!(cut(view(2, &[1, 2], &[9, 1])), Ok(vec![2, 3]));
        assert_eq!(cut(view(0, &[2, 0], &[0, 1])), Ok(vec![]));
        assert_eq!(view(1, &[2], &[1]).cut(&storage, 2, 100).map(|(_, b)| b.to_vec()), Ok(vec![2, 3, 4, 5]));
    }

    #[test]
    fn a_view_beyond_its_storage_or_over_the_limit_is_refused() {
        let storage = Bytes::from_static(&[0; 6]);
        for bad in [
            view(1, &[2, 3], &[3, 1]),
            view(0, &[2, 3], &[4, 1]),
            view(u64::MAX, &[1], &[1]),
            view(0, &[2], &[u64::MAX]),
            view(0, &[u64::MAX, 2], &[0, 0]),
            view(0, &[1000, 1000], &[0, 0]),
            view(0, &[1; 9], &[1; 9]),
            view(0, &[1], &[]),
        ] {
            assert!(bad.cut(&storage, 1, 1000).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn norms_are_those_of_the_rows_whatever_the_number_format() {
        let rows = [3.0_f32, 4.0, 0.0, -1.0];
        let tensor =
            |dtype, data: Vec<u8>| RawTensor { name: "x".into(), dtype, shape: vec![1, 2, 2], data: data.into() };
        let formats = [
            tensor(Dtype::F32, rows.iter().flat_map(|x| x.to_le_bytes()).collect()),
            tensor(Dtype::F64, rows.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect()),
            tensor(Dtype::F16, rows.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()),
            tensor(Dtype::BF16, rows.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()),
        ];
        for stored in formats {
            assert_eq!(stored.row_norms(), [5.0, 1.0], "{:?}", stored.dtype);
        }
    }
}
