//! A tensor that is learned, by name and shape.

/// One of the tensors that are learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LearnedTensor {
    pub name: String,
    pub shape: Vec<usize>,
}

impl LearnedTensor {
    pub(super) fn new(name: &str, shape: &[usize]) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec() }
    }

    /// How many values it has; never 0.
    #[expect(clippy::len_without_is_empty, reason = "none is empty")]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}
