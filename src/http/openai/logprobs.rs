//! Log-probabilities in the two forms that OpenAI's API has.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::http::types::{TokenInfo, TokenLogprob};

/// Those of a completion: lists side by side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for a token that nothing comes before.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens at each position by their text; of two with one text the likelier. Null for tokens of an echoed prompt.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token begins in the answer's text, in characters.
    pub text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Of tokens, the first of which begins at a character of the text.
    pub fn new(tokens: &[TokenInfo], mut offset: usize) -> Self {
        let mut all = Self::default();
        for TokenInfo { token, top_logprobs } in tokens {
            all.text_offset.push(offset);
            offset += token.text.chars().count();
            all.tokens.push(token.text.clone());
            all.token_logprobs.push(Some(token.logprob));
            let mut top = BTreeMap::new();
            for likely in top_logprobs {
                top.entry(likely.text.clone()).or_insert(likely.logprob);
            }
            all.top_logprobs.push(Some(top));
        }
        all
    }

    /// Of the tokens of an echoed prompt, and then of the answer's.
    pub fn echoed(prompt: &[(String, Option<f32>)], tokens: &[TokenInfo]) -> Self {
        let mut all = Self::default();
        let mut offset = 0;
        for (text, logprob) in prompt {
            all.text_offset.push(offset);
            offset += text.chars().count();
            all.tokens.push(text.clone());
            all.token_logprobs.push(*logprob);
            all.top_logprobs.push(None);
        }
        let Self { tokens, token_logprobs, top_logprobs, text_offset } = Self::new(tokens, offset);
        all.tokens.extend(tokens);
        all.token_logprobs.extend(token_logprobs);
        all.top_logprobs.extend(top_logprobs);
        all.text_offset.extend(text_offset);
        all
    }
}

/// Those of a chat completion.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatToken>,
    /// Always null.
    pub refusal: Option<Vec<ChatToken>>,
}

/// One token of a chat completion.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatToken {
    #[serde(flatten)]
    pub token: ChatTokenLogprob,
    /// The likeliest tokens at this position, likeliest first.
    pub top_logprobs: Vec<ChatTokenLogprob>,
}

/// A token and how likely it was.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    pub token: String,
    pub logprob: f32,
    /// The text's UTF-8; null for a token that is a part of a character.
    pub bytes: Option<Vec<u8>>,
}

impl From<&TokenLogprob> for ChatTokenLogprob {
    fn from(token: &TokenLogprob) -> Self {
        let bytes = (!token.text.contains('\u{fffd}')).then(|| token.text.clone().into_bytes());
        Self { token: token.text.clone(), logprob: token.logprob, bytes }
    }
}

impl ChatLogprobs {
    /// Of tokens.
    pub fn new(tokens: &[TokenInfo]) -> Self {
        let one = |info: &TokenInfo| ChatToken {
            token: (&info.token).into(),
            top_logprobs: info.top_logprobs.iter().map(Into::into).collect(),
        };
        Self { content: tokens.iter().map(one).collect(), refusal: None }
    }
}
