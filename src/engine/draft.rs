//! Prompt lookup (Saxena 2023): the next tokens are guessed from what followed the same tokens earlier in the sequence, and
//! one forward pass checks all guesses. What is generated does not change: a guess only says which rows are computed at once.

use super::request::InputToken;

/// How many tokens must be the same as earlier ones for what followed those to be a guess; more are tried first.
const MATCHES: [usize; 2] = [3, 2];

/// The most steps without a guess after guesses that were all wrong, as a power of two.
const MAX_REST: u32 = 5;

/// The guesses of one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drafting {
    /// The longest that the sequence gets: guesses beyond it would be of no use.
    max_len: usize,
    /// Guesses at the end of the sequence's tokens while a step is computed.
    pub(super) guessed: usize,
    /// Guesses of the last step that were right.
    pub(super) right: usize,
    /// Steps in a row whose guesses were all wrong.
    misses: u32,
    /// Steps to go without a guess.
    rest: u32,
}

impl Drafting {
    /// For a sequence that ends at `max_len` tokens.
    pub fn new(max_len: usize) -> Self {
        Self { max_len, ..Self::default() }
    }

    /// The tokens that are guessed to come after `tokens`, at most `most`. After guesses that were wrong there are none for a while.
    pub(super) fn guess(&mut self, tokens: &[InputToken], most: usize) -> Vec<InputToken> {
        if self.rest > 0 {
            self.rest -= 1;
            return Vec::new();
        }
        // The last token is chosen by the row before it.
        let useful = self.max_len.saturating_sub(tokens.len() + 1);
        lookup(tokens, most.min(useful)).to_vec()
    }

    /// Takes notice of how many of the guesses were right.
    pub(super) fn learn(&mut self, right: usize) {
        (self.guessed, self.right) = (0, right);
        if right > 0 {
            self.misses = 0;
        } else {
            self.misses = (self.misses + 1).min(MAX_REST);
            self.rest = (1 << self.misses) - 1;
        }
    }
}

/// What followed the latest earlier occurrence of the last tokens, at most `most` tokens of the vocabulary.
pub fn lookup(tokens: &[InputToken], most: usize) -> &[InputToken] {
    if most == 0 {
        return &[];
    }
    for length in MATCHES {
        let Some(before) = tokens.len().checked_sub(length + 1) else { continue };
        let last = &tokens[tokens.len() - length..];
        if last.iter().any(|token| token.vocab().is_none()) {
            continue;
        }
        let Some(found) = (0..=before).rev().find(|&i| tokens[i..i + length] == *last) else { continue };
        let following = &tokens[found + length..];
        let words = following.iter().take(most).take_while(|token| token.vocab().is_some()).count();
        if words > 0 {
            return &following[..words];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(ids: &[u32]) -> Vec<InputToken> {
        ids.iter().map(|&id| InputToken::Vocab(id)).collect()
    }

    #[test]
    fn what_followed_the_same_tokens_is_the_guess_and_the_latest_counts() {
        for (tokens, most, guess) in [
            (&[1, 2, 3, 4, 5, 1, 2, 3][..], 4, &[4, 5, 1, 2][..]),
            (&[1, 2, 3, 4, 5, 1, 2, 3], 2, &[4, 5]),
            (&[7, 1, 2, 8, 1, 2, 9, 1, 2], 3, &[9, 1, 2]),
            // Three that are the same go before two that are later.
            (&[5, 1, 2, 6, 4, 1, 2, 9, 5, 1, 2], 1, &[6]),
            (&[4, 4, 4, 4], 3, &[4]),
            (&[1, 2, 3], 3, &[]),
            (&[1, 2], 3, &[]),
            (&[], 3, &[]),
            (&[1, 2, 1, 2], 0, &[]),
        ] {
            assert_eq!(lookup(&text(tokens), most), text(guess), "{tokens:?}");
        }
    }

    #[test]
    fn virtual_tokens_are_neither_looked_up_nor_guessed() {
        let row = InputToken::Virtual;
        assert_eq!(lookup(&[row(0), row(1), row(0), row(1)], 2), []);
        let tokens = [text(&[1, 2, 3]), vec![row(0)], text(&[1, 2])].concat();
        assert_eq!(lookup(&tokens, 4), text(&[3]));
        let tokens = [text(&[1, 2]), vec![row(0)], text(&[1, 2])].concat();
        assert_eq!(lookup(&tokens, 4), []);
    }

    #[test]
    fn wrong_guesses_are_followed_by_longer_and_longer_rests() {
        let tokens = text(&[1, 2, 3, 1, 2]);
        let mut drafting = Drafting::new(100);
        let mut rests = Vec::new();
        for _ in 0..7 {
            let mut rest = 0;
            while drafting.guess(&tokens, 3).is_empty() {
                rest += 1;
            }
            rests.push(rest);
            drafting.learn(0);
        }
        assert_eq!(rests, [0, 1, 3, 7, 15, 31, 31]);
        drafting.rest = 0;
        drafting.learn(2);
        assert!(!drafting.guess(&tokens, 3).is_empty());
        // The last token needs no guess after it.
        assert_eq!(Drafting::new(7).guess(&tokens, 3).len(), 1);
        assert_eq!(Drafting::new(6).guess(&tokens, 3).len(), 0);
    }
}
