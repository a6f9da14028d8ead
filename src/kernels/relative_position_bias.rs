//! What is added to a score for the distance of its key, by a table of each head (T5's relative
//! position bias, Raffel et al. 2020).

/// `[heads, 2 * farthest + 1]`: one number for each head and each distance from `-farthest` to
/// `farthest`. Keys that are farther away get what the farthest gets.
#[derive(Debug, Clone, PartialEq)]
pub struct RelativePositionBias {
    values: Vec<f32>,
    farthest: usize,
}

impl RelativePositionBias {
    /// The table of a function of the head and of how many positions the key lies after the query.
    pub fn new(heads: usize, farthest: usize, of: impl Fn(usize, isize) -> f32) -> Self {
        let most = farthest as isize;
        let values = (0..heads).flat_map(|head| (-most..=most).map(move |distance| (head, distance)));
        Self { values: values.map(|(head, distance)| of(head, distance)).collect(), farthest }
    }

    /// How many heads it has.
    pub fn heads(&self) -> usize {
        self.values.len() / (2 * self.farthest + 1)
    }

    /// Distances from which on the farthest one's number is taken.
    pub fn farthest(&self) -> usize {
        self.farthest
    }

    /// All numbers, `[heads, 2 * farthest + 1]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// What a head adds for a key at position `key` and a query at `query`.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn at(&self, head: usize, query: usize, key: usize) -> f32 {
        let farthest = self.farthest;
        let place = match key >= query {
            true => farthest + (key - query).min(farthest),
            false => farthest - (query - key).min(farthest),
        };
        self.values[head * (2 * farthest + 1) + place]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_distance_has_its_number_and_farther_ones_have_the_last() {
        let bias = RelativePositionBias::new(2, 3, |head, distance| (head * 100) as f32 + distance as f32);
        assert_eq!(bias.heads(), 2);
        for (query, key, expected) in [(5, 5, 0.0), (5, 3, -2.0), (5, 7, 2.0), (9, 0, -3.0), (0, 9, 3.0)] {
            assert_eq!(bias.at(0, query, key), expected);
            assert_eq!(bias.at(1, query, key), 100.0 + expected);
        }
    }
}
