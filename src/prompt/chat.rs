//! A chat template: how the messages of a conversation become the text that follows the learned prompt, as
//! `apply_chat_template` of transformers renders it.

use std::{io::Write, sync::Arc};

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig, value::Kwargs};
use serde::Serialize as _;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::{
    soft::{Rendered, Soft},
    template::{MAX_RENDERED_BYTES, MAX_TEMPLATE_BYTES, TemplateError, describe},
};

/// minijinja's budget for one rendering: about one unit an instruction or 64 bytes of data.
const FUEL: u64 = 2_000_000;

/// The template's name within its environment.
const NAME: &str = "chat_template";

/// A parsed chat template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Where it says itself where virtual tokens stand.
    soft: Option<Soft>,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else a template knows.
    pub role: String,
    pub content: String,
    pub name: Option<String>,
}

impl Message {
    fn value(&self) -> Value {
        let pairs = [("role", Some(&self.role)), ("content", Some(&self.content)), ("name", self.name.as_ref())];
        Value::from_pairs(pairs.into_iter().filter_map(|(key, text)| Some((key, Value::from(text?.as_str())))))
    }
}

/// The texts of the tokens that begin and end a text, which templates write; empty where a model has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EdgeTokens {
    pub bos: String,
    pub eos: String,
}

impl ChatTemplate {
    /// Parses Jinja source, in which blocks are trimmed as transformers trims them.
    ///
    /// # Errors
    /// It is too long or is not Jinja.
    pub fn parse(source: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let detail = format!("it has {} bytes; the maximum is {MAX_TEMPLATE_BYTES}", source.len());
            return Err(TemplateError::Syntax(detail));
        }
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Syntax(describe(&e)))?);
        environment.set_fuel(Some(FUEL));
        environment.remove_global("debug");
        // Methods of Python's texts, lists and dictionaries, which templates call.
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |reason: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_function("strftime_now", |format: String| today(&format));
        let soft = Soft::is_called(source).then(|| Soft::add_to(&mut environment));
        environment.add_template_owned(NAME, source.to_owned()).map_err(|e| TemplateError::Syntax(describe(&e)))?;
        Ok(Self { environment: Arc::new(environment), soft })
    }

    /// Whether it calls `soft()`, which says where virtual tokens stand. Otherwise they come before all text.
    pub fn places_virtual_tokens(&self) -> bool {
        self.soft.is_some()
    }

    /// The text of a conversation, up to where the assistant's next message begins, with the places of virtual tokens
    /// if the template says them.
    ///
    /// # Errors
    /// The template does not take these messages, or the text is too long.
    pub fn render(&self, messages: &[Message], tokens: &EdgeTokens) -> Result<Rendered, TemplateError> {
        let values = context! {
            messages => messages.iter().map(Message::value).collect::<Value>(),
            add_generation_prompt => true,
            bos_token => tokens.bos.as_str(),
            eos_token => tokens.eos.as_str(),
        };
        let text = self.environment.get_template(NAME).and_then(|template| template.render(values));
        let text = text.map_err(|e| TemplateError::Input(describe(&e)))?;
        if text.len() > MAX_RENDERED_BYTES {
            let detail = format!("it renders to {} bytes; the maximum is {MAX_RENDERED_BYTES}", text.len());
            return Err(TemplateError::Input(detail));
        }
        Ok(match &self.soft {
            Some(soft) => soft.part(&text),
            None => Rendered::text(text),
        })
    }
}

/// JSON as Python writes it: a space after commas and colons, nothing escaped for HTML; in lines, if an indent is given.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, Spaced)),
    };
    let failed = |reason: String| Error::new(ErrorKind::InvalidOperation, reason);
    written.map_err(|error| failed(error.to_string()))?;
    Ok(Value::from(String::from_utf8(json).map_err(|error| failed(error.to_string()))?))
}

/// JSON in one line, with a space after commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The present date in a format of strftime's, of which templates use the parts of a date.
fn today(format: &str) -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
    date(format, seconds / (24 * 60 * 60))
}

/// A date in a format of strftime's, `days` after 1970-01-01 (the civil calendar by Howard Hinnant's algorithm).
fn date(format: &str, days: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let name = MONTHS[(month as usize).clamp(1, 12) - 1];
    format
        .replace("%Y", &year.to_string())
        .replace("%m", &format!("{month:02}"))
        .replace("%d", &format!("{day:02}"))
        .replace("%B", name)
        .replace("%b", &name[..3])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.to_owned(), content: content.to_owned(), name: None }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
        let tokens = EdgeTokens { bos: "<s>".to_owned(), eos: "</s>".to_owned() };
        ChatTemplate::parse(source).expect("parses").render(messages, &tokens).map(|rendered| rendered.text_with(None))
    }

    #[test]
    fn a_template_of_the_chatml_family_renders_as_in_transformers() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n\
                      You are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(
            render(source, &[message("user", "Hi <b>")]).as_deref(),
            Ok(
                "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
            )
        );
    }

    #[test]
    fn blocks_are_trimmed_and_pythons_methods_and_helpers_are_there() {
        let source = "{{ bos_token }}\n{%- set ns = namespace(n=0) %}\n{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n[{{ \
                      m.content.strip().upper() }}|{{ m.content.split(' ')|length }}|{{ m | tojson }}]\n{% endfor %}\n{{ ns.n }}";
        assert_eq!(
            render(source, &[message("user", " a b "), message("assistant", "<c>")]).as_deref(),
            Ok(
                "<s>[A B|4|{\"role\": \"user\", \"content\": \" a b \"}]\n[<C>|1|{\"role\": \"assistant\", \"content\": \"<c>\"}]\n2"
            )
        );
    }

    #[test]
    fn a_template_that_refuses_a_conversation_says_why() {
        let source =
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x";
        let error = render(source, &[message("system", "a")]).expect_err("refused");
        assert!(error.to_string().contains("System role not supported"), "{error}");
        assert!(ChatTemplate::parse("{% for %}").is_err());
        assert!(
            render("{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", &[]).is_err()
        );
    }

    #[test]
    fn dates_are_those_of_the_civil_calendar() {
        assert_eq!(date("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(date("%Y-%m-%d", 11_016), "2000-02-29");
        assert_eq!(date("%d %B %Y", 20_783), "26 November 2026");
        assert_eq!(date("%Y-%m-%d", 19_723), "2024-01-01");
    }
}
