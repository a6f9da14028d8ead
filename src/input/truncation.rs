//! An input that is too long, made to fit by shortening the one field that its task names. Template and learned prompt are never cut.

use std::collections::BTreeMap;

use crate::{
    packing::{InputToken, TokenBudget, text_len},
    prompt::{
        Version,
        spec::{Side, Truncation},
        template::Input,
    },
    sampling::SamplingOptions,
    tokenizer::{Tokenizer, TokenizerError},
};

/// The most tokens that a text of this version is shortened to: the task's limit, or what the model's context leaves for it beside an answer
/// of the task's usual length.
pub fn limit(budget: TokenBudget, version: &Version) -> usize {
    let answer = SamplingOptions::clone(&version.spec.defaults).or_default().max_tokens;
    let fits = match budget.shared {
        // A long answer gets half of the room at most.
        true => budget.output.saturating_sub(answer.min(budget.output / 2).max(1)),
        false => budget.input,
    };
    version.spec.limits.max_input_tokens.map_or(fits, |limit| limit.min(fits))
}

/// The positions of an input, whose field has as much text as fits into `limit` tokens; all of it, where that is so anyway. Positions
/// that are too many if the field is not to blame.
///
/// # Errors
/// `encode` fails.
pub(super) fn fit<E: From<TokenizerError>>(
    tokenizer: &Tokenizer,
    truncation: &Truncation,
    input: &Input,
    limit: usize,
    encode: impl Fn(&Input) -> Result<Vec<InputToken>, E>,
) -> Result<Vec<InputToken>, E> {
    let whole = encode(input)?;
    let text = match input {
        Input::Text(text) => Some(text),
        Input::Fields(fields) => fields.get(&truncation.field),
    };
    let Some(text) = text.filter(|_| text_len(&whole) > limit) else { return Ok(whole) };
    let ends = tokenizer.token_ends(text)?;
    let with = |kept: usize| {
        let part = match truncation.side {
            Side::Right => &text[..ends[kept - 1]],
            // As many tokens from the end.
            Side::Left => &text[ends.len().checked_sub(kept + 1).map_or(0, |before| ends[before])..],
        };
        match input {
            Input::Text(_) => Input::Text(part.to_owned()),
            Input::Fields(fields) => {
                let other = |(name, text): (&String, &String)| {
                    (name.clone(), if *name == truncation.field { part.to_owned() } else { text.clone() })
                };
                Input::Fields(fields.iter().map(other).collect::<BTreeMap<_, _>>())
            }
        }
    };
    // The most tokens of the field that fit; at least one stays.
    let (mut fits, mut least, mut most) = (None, 1, ends.len().saturating_sub(1));
    while least <= most {
        let middle = least.midpoint(most);
        let positions = encode(&with(middle))?;
        if text_len(&positions) <= limit {
            fits = Some(positions);
            least = middle + 1;
        } else {
            most = middle - 1;
        }
    }
    Ok(fits.unwrap_or(whole))
}

impl Tokenizer {
    /// Where each token of a text by itself ends, in bytes: only ends of characters, each once and in order.
    ///
    /// # Errors
    /// The text cannot be tokenized.
    fn token_ends(&self, text: &str) -> Result<Vec<usize>, TokenizerError> {
        let mut ends: Vec<usize> = self.offsets(text)?.into_iter().map(|(_, end)| end).collect();
        ends.retain(|&end| end > 0 && text.is_char_boundary(end));
        ends.sort_unstable();
        ends.dedup();
        Ok(ends)
    }
}
