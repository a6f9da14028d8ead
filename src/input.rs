//! From the fields of an input to the positions that the model reads: template, truncation, tokenizer, and the places of
//! virtual tokens. Serving, tuning and evaluation all ask here.

pub mod truncation;

use std::ops::Range;

use crate::{
    packing::{InputToken, PromptShape},
    prompt::{
        Version,
        chat::{ChatTemplate, EdgeTokens, Message},
        soft::{Piece, PlaceError, Rendered},
        spec::{SpecialTokens, Truncation},
        template::{Input, PromptTemplate, TemplateError},
    },
    tokenizer::{PLACE, Tokenizer, TokenizerError},
};

/// How the inputs of one task become positions.
#[derive(Debug, Clone, Copy)]
pub struct InputEncoder<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: &'a PromptTemplate,
    /// What special tokens in the texts of an input are.
    pub special_tokens: SpecialTokens,
    pub truncate: Option<&'a Truncation>,
    /// The learned prompt that comes with the text. Without one, the places of virtual tokens stay empty.
    pub shape: PromptShape,
}

/// Why an input has no positions.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the input does not fit the template: {0}")]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl<'a> InputEncoder<'a> {
    /// As a version says.
    pub fn of(version: &'a Version, tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            template: &version.template,
            special_tokens: version.spec.special_tokens.unwrap_or_default(),
            truncate: version.spec.truncate.as_ref(),
            shape: PromptShape::of(version.learned_prompt().map(AsRef::as_ref)),
        }
    }

    /// The positions of an input: `[learned prompt][text]`, unless the template says where virtual tokens stand. If the task
    /// names a field to shorten, it is shortened until the text has at most `limit` tokens, where that can be.
    ///
    /// # Errors
    /// The input does not fit the template.
    pub fn encode(&self, input: &Input, limit: usize) -> Result<Vec<InputToken>, InputError> {
        self.encode_after("", input, limit)
    }

    /// As [`encode`](Self::encode), with an instruction, or other texts, before the text.
    ///
    /// # Errors
    /// The input does not fit the template.
    pub fn encode_after(&self, instruction: &str, input: &Input, limit: usize) -> Result<Vec<InputToken>, InputError> {
        let tokens_of = |input: &Input| -> Result<Vec<InputToken>, InputError> {
            let mut rendered = self.template.render(&self.safe(input))?;
            if !instruction.is_empty() {
                rendered.pieces.insert(0, Piece::Text(instruction.to_owned()));
            }
            self.whole(rendered, true)
        };
        match self.truncate {
            Some(truncate) => truncation::fit(self.tokenizer, truncate, input, limit, tokens_of),
            None => tokens_of(input),
        }
    }

    /// The text of an input as it can stand before another one, in [`encode_after`](Self::encode_after): special tokens in it
    /// are what the task says, and places of virtual tokens are empty.
    ///
    /// # Errors
    /// The input does not fit the template.
    pub fn text(&self, input: &Input) -> Result<String, InputError> {
        Ok(self.template.render(&self.safe(input))?.text_with(None))
    }

    /// The positions of a conversation. Special tokens are those that its template writes.
    ///
    /// # Errors
    /// The template does not take these messages.
    pub fn encode_conversation(
        &self,
        chat: &ChatTemplate,
        messages: &[Message],
        edges: &EdgeTokens,
    ) -> Result<Vec<InputToken>, InputError> {
        let safe = |message: &Message| Message { content: self.safe_text(&message.content), ..message.clone() };
        let messages: Vec<Message> = messages.iter().map(safe).collect();
        self.whole(chat.render(&messages, edges)?, false)
    }

    /// The fixed beginning: the positions that every input of the template begins with, without the last token of text,
    /// which other texts may join to their own. Empty where the template begins with a field.
    ///
    /// # Errors
    /// The template's text cannot be tokenized.
    pub fn fixed_beginning(&self) -> Result<Vec<InputToken>, InputError> {
        let beginning = self.template.fixed_beginning();
        if beginning.pieces.is_empty() {
            return Ok(Vec::new());
        }
        let places = if self.fills_places() { beginning.ranges(self.shape.num_virtual_tokens()) } else { Vec::new() };
        let followed_by = |probe: &str| {
            let mut rendered = beginning.clone();
            rendered.pieces.push(Piece::Text(probe.to_owned()));
            self.positions(&rendered, &places, true)
        };
        let mut fixed = followed_by("")?;
        for probe in ["a", "A", " a", "1", ".", "\n", "é", "中"] {
            let longer = followed_by(probe)?;
            let common = fixed.iter().zip(&longer).take_while(|(a, b)| a == b).count();
            fixed.truncate(common);
        }
        if matches!(fixed.last(), Some(InputToken::Vocab(_))) {
            fixed.pop();
        }
        Ok(fixed)
    }

    /// Whether virtual tokens stand where the template says.
    fn fills_places(&self) -> bool {
        self.template.places_virtual_tokens() && self.shape.num_virtual_tokens() > 0
    }

    /// The tokenizer, which knows places if there are some.
    fn tokenizer(&self) -> &'a Tokenizer {
        if self.fills_places() { &self.tokenizer.placing().tokenizer } else { self.tokenizer }
    }

    fn safe(&self, input: &Input) -> Input {
        input.map(|text| self.safe_text(text))
    }

    /// A text of an input, which cannot be a place, nor a special token where those are text.
    pub fn safe_text(&self, text: &str) -> String {
        match self.special_tokens {
            SpecialTokens::Text => self.tokenizer().escape(text),
            SpecialTokens::Special if self.fills_places() => text.replace(PLACE, "\u{fffd}"),
            SpecialTokens::Special => text.to_owned(),
        }
    }

    /// The positions of a whole text, in which each virtual token has its place.
    fn whole(&self, rendered: Rendered, adds_special_tokens: bool) -> Result<Vec<InputToken>, InputError> {
        let places = match self.shape {
            _ if !self.fills_places() => Vec::new(),
            PromptShape::KeyValues(_) => return Err(PlaceError::KeyValues.into()),
            shape => rendered.places(shape.num_virtual_tokens())?,
        };
        self.positions(&rendered, &places, adds_special_tokens)
    }

    fn positions(
        &self,
        rendered: &Rendered,
        places: &[Range<u32>],
        adds_special_tokens: bool,
    ) -> Result<Vec<InputToken>, InputError> {
        let text = rendered.text_with(if self.fills_places() { Some(PLACE) } else { None });
        let tokenizer = self.tokenizer();
        let ids = match (adds_special_tokens, self.special_tokens) {
            (true, SpecialTokens::Special) => tokenizer.tokenize(&text)?,
            (true, SpecialTokens::Text) => tokenizer.tokenize_escaped(&text)?,
            (false, _) => tokenizer.tokenize_conversation(&text)?,
        };
        if !self.fills_places() {
            return Ok(self.shape.followed_by(&ids));
        }
        let place = self.tokenizer.placing().place;
        let mut places_left = places.iter();
        let mut tokens = Vec::with_capacity(ids.len() + self.shape.num_virtual_tokens());
        for id in ids {
            match (id == place).then(|| places_left.next()) {
                None => tokens.push(InputToken::Vocab(id)),
                Some(Some(range)) => tokens.extend(range.clone().map(InputToken::Virtual)),
                Some(None) => return Err(PlaceError::Lost.into()),
            }
        }
        if places_left.next().is_some() { Err(PlaceError::Lost.into()) } else { Ok(tokens) }
    }
}
