//! Places of virtual tokens in a template: what `soft()` leaves in a rendered text, and how it is read back.

use std::ops::Range;

use minijinja::{Environment, Error, ErrorKind};

/// The name of the function.
const FUNCTION: &str = "soft";

/// Begins and ends what a call leaves in the text, around a number that nobody can guess: no input can write it.
const OPEN: char = '\u{e000}';
const CLOSE: char = '\u{e001}';

/// The virtual tokens of one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `soft()`: all of them.
    All,
    /// `soft(start, end)`: those from `start` up to but not including `end`.
    Range(Range<u32>),
}

/// A part of a rendered template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    Virtual(Place),
}

/// A rendered template: text, and the places of virtual tokens in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// In order; texts are not empty and no two stand side by side.
    pub pieces: Vec<Piece>,
}

/// Why places cannot be filled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    #[error("soft({}, {}) asks for virtual tokens that do not exist: the learned prompt has {found}, numbered from 0", range.start, range.end)]
    Outside { range: Range<u32>, found: usize },
    #[error("soft() places virtual token {0} twice: each has one place")]
    Twice(u32),
    #[error(
        "soft() does not place virtual token {token} of {found}: call soft() once, or soft(start, end) for ranges that \
         hold each of them once"
    )]
    Missing { token: usize, found: usize },
    #[error(
        "soft() places rows of embeddings; a prompt of keys and values comes before all text: leave soft() out of the template"
    )]
    KeyValues,
    #[error("the model's tokenizer does not keep the places that soft() says: leave soft() out of the template")]
    Lost,
}

impl Rendered {
    /// A text without places.
    pub fn text(text: String) -> Self {
        Self { pieces: if text.is_empty() { Vec::new() } else { vec![Piece::Text(text)] } }
    }

    /// The text, with this character, or nothing, in each place.
    pub fn text_with(&self, place: Option<char>) -> String {
        let mut text = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(piece) => text.push_str(piece),
                Piece::Virtual(_) => text.extend(place),
            }
        }
        text
    }

    /// The virtual tokens of each place, in order, of a prompt of `num_virtual_tokens`.
    pub fn ranges(&self, num_virtual_tokens: usize) -> Vec<Range<u32>> {
        let all = 0..u32::try_from(num_virtual_tokens).unwrap_or(u32::MAX);
        let range = |piece: &Piece| match piece {
            Piece::Text(_) => None,
            Piece::Virtual(Place::All) => Some(all.clone()),
            Piece::Virtual(Place::Range(range)) => Some(range.clone()),
        };
        self.pieces.iter().filter_map(range).collect()
    }

    /// As [`ranges`](Self::ranges), where each virtual token must have exactly one place.
    ///
    /// # Errors
    /// One has none or two, or does not exist.
    pub fn places(&self, num_virtual_tokens: usize) -> Result<Vec<Range<u32>>, PlaceError> {
        let mut is_placed = vec![false; num_virtual_tokens];
        let places = self.ranges(num_virtual_tokens);
        for range in &places {
            let Some(placed) = is_placed.get_mut(range.start as usize..range.end as usize) else {
                return Err(PlaceError::Outside { range: range.clone(), found: num_virtual_tokens });
            };
            if let Some(twice) = placed.iter().position(|&is| is) {
                return Err(PlaceError::Twice(range.start + twice as u32));
            }
            placed.fill(true);
        }
        match is_placed.iter().position(|&is| !is) {
            Some(token) => Err(PlaceError::Missing { token, found: num_virtual_tokens }),
            None => Ok(places),
        }
    }
}

/// The function `soft` of one template's environment.
#[derive(Debug, Clone)]
pub(super) struct Soft {
    /// What begins each place in the text.
    mark: String,
}

impl Soft {
    /// Whether a template calls the function, by its source.
    pub fn is_called(source: &str) -> bool {
        source.match_indices(FUNCTION).any(|(at, name)| {
            let before = source[..at].chars().next_back();
            let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
            !before.is_some_and(is_word) && source[at + name.len()..].trim_start().starts_with('(')
        })
    }

    /// Adds the function to an environment.
    pub fn add_to(environment: &mut Environment<'static>) -> Self {
        let mark = format!("{OPEN}{:032x}:", rand::random::<u128>());
        let begin = mark.clone();
        let call = move |start: Option<u32>, end: Option<u32>| -> Result<String, Error> {
            let wrong = |detail: String| Err(Error::new(ErrorKind::InvalidOperation, detail));
            match (start, end) {
                (None, None) => Ok(format!("{begin}{CLOSE}")),
                (Some(start), Some(end)) if start < end => Ok(format!("{begin}{start}:{end}{CLOSE}")),
                (Some(start), Some(end)) => {
                    wrong(format!("found soft({start}, {end}), expected an end that is greater than the start"))
                }
                _ => wrong("found soft() with one number, expected none or two, as in soft(0, 8)".to_owned()),
            }
        };
        environment.add_function(FUNCTION, call);
        Self { mark }
    }

    /// What was rendered, parted at the places.
    pub fn part(&self, rendered: &str) -> Rendered {
        let mut pieces = Vec::new();
        let push_text = |pieces: &mut Vec<Piece>, text: &str| match pieces.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Text(before)) => before.push_str(text),
            _ => pieces.push(Piece::Text(text.to_owned())),
        };
        let mut parts = rendered.split(self.mark.as_str());
        push_text(&mut pieces, parts.next().unwrap_or_default());
        for part in parts {
            let place = part.split_once(CLOSE).and_then(|(numbers, rest)| Some((Self::place(numbers)?, rest)));
            match place {
                Some((place, rest)) => {
                    pieces.push(Piece::Virtual(place));
                    push_text(&mut pieces, rest);
                }
                // A filter cut the mark. Its tokens have no place then, and that is an error for whoever fills the places.
                None => push_text(&mut pieces, part),
            }
        }
        Rendered { pieces }
    }

    fn place(numbers: &str) -> Option<Place> {
        if numbers.is_empty() {
            return Some(Place::All);
        }
        let (start, end) = numbers.split_once(':')?;
        Some(Place::Range(start.parse().ok()?..end.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(source: &str) -> Result<Rendered, Error> {
        let mut environment = Environment::new();
        let soft = Soft::add_to(&mut environment);
        Ok(soft.part(&environment.render_str(source, ())?))
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.to_owned())
    }

    #[test]
    fn places_are_where_the_template_calls_the_function() {
        let pieces = |source| rendered(source).expect("renders").pieces;
        assert_eq!(pieces("a {{ soft() }} b"), [text("a "), Piece::Virtual(Place::All), text(" b")]);
        let two = [Piece::Virtual(Place::Range(2..5)), text("é"), Piece::Virtual(Place::Range(0..2))];
        assert_eq!(pieces("{{ soft(2, 5) }}é{{ soft(0, 2) }}"), two);
        assert_eq!(pieces("only text"), [text("only text")]);
        assert_eq!(pieces(""), []);
    }

    #[test]
    fn every_virtual_token_has_one_place() {
        let places = |source, n| rendered(source).expect("renders").places(n);
        assert_eq!(places("x{{ soft() }}", 3).expect("all").first(), Some(&(0..3)));
        assert_eq!(places("{{ soft(1, 3) }}x{{ soft(0, 1) }}", 3), Ok(vec![1..3, 0..1]));
        assert_eq!(places("{{ soft(0, 4) }}", 3), Err(PlaceError::Outside { range: 0..4, found: 3 }));
        assert_eq!(places("{{ soft() }}{{ soft(2, 3) }}", 3), Err(PlaceError::Twice(2)));
        assert_eq!(places("{{ soft(0, 2) }}", 3), Err(PlaceError::Missing { token: 2, found: 3 }));
        // A filter that changes the mark loses the place.
        assert_eq!(places("{{ soft() | upper }}", 3), Err(PlaceError::Missing { token: 0, found: 3 }));
    }

    #[test]
    fn wrong_calls_are_errors() {
        for source in
            ["{{ soft(1) }}", "{{ soft(3, 3) }}", "{{ soft(4, 2) }}", "{{ soft(-1, 2) }}", "{{ soft('a', 2) }}"]
        {
            assert!(rendered(source).is_err(), "{source}");
        }
    }

    #[test]
    fn a_call_is_told_from_a_field_and_a_word() {
        for source in ["{{ soft() }}", "{{soft (0, 8)}}", "{% for i in [1] %}{{ soft() }}{% endfor %}"] {
            assert!(Soft::is_called(source), "{source}");
        }
        for source in ["{{ soft }}", "{{ microsoft(1) }}", "{{ x.soft() }}", "soft drinks", "{{ softly() }}"] {
            assert!(!Soft::is_called(source), "{source}");
        }
    }
}
