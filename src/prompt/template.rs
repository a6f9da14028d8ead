//! A task's template: how the fields of an input become the text that follows the learned prompt.

use std::{collections::BTreeMap, sync::Arc};

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig};

use super::soft::{Rendered, Soft};

/// The template of a task that has none: the input as it is.
pub const DEFAULT_TEMPLATE: &str = "{{ input }}";

/// The longest template source, in bytes.
pub const MAX_TEMPLATE_BYTES: usize = 64 * 1024;

/// The longest rendered text, in bytes.
pub const MAX_RENDERED_BYTES: usize = 4 * 1024 * 1024;

/// minijinja's budget for one rendering: about one unit an instruction or 64 bytes of data.
const FUEL: u64 = 500_000;

/// The template's name within its environment.
const NAME: &str = "template";

/// A parsed template over named fields. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PromptTemplate {
    source: String,
    fields: Vec<String>,
    environment: Arc<Environment<'static>>,
    /// Where it says itself where virtual tokens stand.
    soft: Option<Soft>,
}

/// What a request hands to the template.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The one field of the template.
    Text(String),
    /// Each field by name.
    Fields(BTreeMap<String, String>),
}

impl Input {
    /// The input with each of its texts changed.
    pub fn map(&self, change: impl Fn(&str) -> String) -> Self {
        match self {
            Self::Text(text) => Self::Text(change(text)),
            Self::Fields(fields) => {
                Self::Fields(fields.iter().map(|(name, text)| (name.clone(), change(text))).collect())
            }
        }
    }
}

/// Why a template cannot be parsed or an input cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("the template does not parse: {0}")]
    Syntax(String),
    #[error("the input does not fit the template: {0}")]
    Input(String),
}

impl PromptTemplate {
    /// Parses minijinja source. The template must use at least one field, and no filter, test or
    /// function that does not exist.
    pub fn parse(source: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let detail = format!("it has {} bytes; the maximum is {MAX_TEMPLATE_BYTES}", source.len());
            return Err(TemplateError::Syntax(detail));
        }
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.keep_trailing_newline(true).build().map_err(|e| TemplateError::Syntax(describe(&e)))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.remove_global("debug");
        let soft = Soft::is_called(source).then(|| Soft::add_to(&mut environment));
        environment.add_template_owned(NAME, source.to_owned()).map_err(|e| TemplateError::Syntax(describe(&e)))?;

        let globals: Vec<String> = environment.globals().map(|(name, _)| name.to_owned()).collect();
        let mut fields: Vec<String> = match environment.get_template(NAME) {
            Ok(template) => template.undeclared_variables(false).into_iter().collect(),
            Err(e) => return Err(TemplateError::Syntax(describe(&e))),
        };
        fields.retain(|field| !globals.contains(field));
        fields.sort();
        if fields.is_empty() {
            let detail = "it uses no field, so no input could change its text; write {{ input }} where the input goes";
            return Err(TemplateError::Syntax(detail.to_owned()));
        }
        let template = Self { source: source.to_owned(), fields, environment: Arc::new(environment), soft };
        template.check_names()?;
        Ok(template)
    }

    /// The source it was parsed from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it calls `soft()`, which says where virtual tokens stand. Otherwise they come before all text.
    pub fn places_virtual_tokens(&self) -> bool {
        self.soft.is_some()
    }

    /// The fixed beginning: what every text of this template begins with, whatever the input is. It ends before the
    /// template's first tag that is no call of `soft`, so it may be shorter than it could be.
    pub fn fixed_beginning(&self) -> Rendered {
        let (fixed, rest) = self.source.split_at(self.fixed_len());
        // A minus takes the white space before the tag away.
        let is_trimmed = rest.get(2..).is_some_and(|rest| rest.starts_with('-'));
        match &self.soft {
            Some(soft) => {
                let rendered = self.environment.render_str(fixed, ()).unwrap_or_default();
                soft.part(if is_trimmed { rendered.trim_end() } else { &rendered })
            }
            None => Rendered::text(if is_trimmed { fixed.trim_end() } else { fixed }.to_owned()),
        }
    }

    /// Where the first tag begins that is no call of `soft`; 0 where there is none.
    fn fixed_len(&self) -> usize {
        let mut at = 0;
        loop {
            let rest = &self.source[at..];
            let Some(tag) = ["{{", "{%", "{#"].iter().filter_map(|tag| rest.find(tag)).min() else { return 0 };
            let Some((inside, _)) = rest[tag..].strip_prefix("{{").and_then(|rest| rest.split_once("}}")) else {
                return at + tag;
            };
            let call = inside.trim_matches(['-', '+']).trim();
            let arguments = call.strip_prefix("soft").and_then(|call| call.trim_start().strip_prefix('('));
            let is_soft = arguments
                .and_then(|rest| rest.strip_suffix(')'))
                .is_some_and(|numbers| numbers.chars().all(|c| c.is_ascii_digit() || c == ',' || c == ' '));
            if self.soft.is_none() || !is_soft {
                return at + tag;
            }
            at += tag + 4 + inside.len();
        }
    }

    /// The names of the fields it uses, sorted; never empty.
    pub fn fields(&self) -> &[String] {
        &self.fields
    }

    /// The text of an input, with the places of virtual tokens if the template says them. A plain text goes to the
    /// template's only field, whatever it is called; fields must be exactly the template's.
    pub fn render(&self, input: &Input) -> Result<Rendered, TemplateError> {
        let values = match input {
            Input::Text(text) => self.text_value(text)?,
            Input::Fields(fields) => self.field_values(fields)?,
        };
        let text = self.execute(values).map_err(|e| TemplateError::Input(describe(&e)))?;
        if text.len() > MAX_RENDERED_BYTES {
            let detail = format!("it renders to {} bytes; the maximum is {MAX_RENDERED_BYTES}", text.len());
            return Err(TemplateError::Input(detail));
        }
        Ok(self.part(text))
    }

    fn part(&self, text: String) -> Rendered {
        match &self.soft {
            Some(soft) => soft.part(&text),
            None => Rendered::text(text),
        }
    }

    /// The template with a text in each field, to see what its places are; nothing if it does not take such a text.
    pub fn sample(&self) -> Option<Rendered> {
        Some(self.part(self.execute(self.sample_fields()).ok()?))
    }

    fn sample_fields(&self) -> Value {
        context(self.fields.iter().map(|field| (field.as_str(), "text")))
    }

    fn text_value(&self, text: &str) -> Result<Value, TemplateError> {
        let [field] = self.fields.as_slice() else {
            let detail = format!(
                "input is one text and the template has the fields {}; send an object with each of them",
                quoted(&self.fields)
            );
            return Err(TemplateError::Input(detail));
        };
        if text.trim().is_empty() {
            return Err(TemplateError::Input("input is empty".to_owned()));
        }
        Ok(context([(field.as_str(), text)]))
    }

    fn field_values(&self, fields: &BTreeMap<String, String>) -> Result<Value, TemplateError> {
        let missing: Vec<&String> = self.fields.iter().filter(|f| !fields.contains_key(*f)).collect();
        let unknown: Vec<String> =
            fields.keys().filter(|f| !self.fields.contains(f)).map(|f| f.chars().take(80).collect()).collect();
        let mut faults = Vec::new();
        if !missing.is_empty() {
            faults.push(format!("missing {}", quoted(&missing)));
        }
        if !unknown.is_empty() {
            faults.push(format!("unknown {}", quoted(&unknown)));
        }
        if !faults.is_empty() {
            let detail = format!("{}; its fields are {}", faults.join(", "), quoted(&self.fields));
            return Err(TemplateError::Input(detail));
        }
        if fields.values().all(|text| text.trim().is_empty()) {
            return Err(TemplateError::Input("input is empty".to_owned()));
        }
        Ok(context(fields.iter().map(|(name, text)| (name.as_str(), text.as_str()))))
    }

    fn execute(&self, values: Value) -> Result<String, minijinja::Error> {
        self.environment.get_template(NAME)?.render(values)
    }

    /// Names of filters and tests are looked up when they run, so a trial run finds the wrong ones.
    /// Other errors may come from the trial's values and are no fault of the template.
    fn check_names(&self) -> Result<(), TemplateError> {
        match self.execute(self.sample_fields()) {
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::UnknownFilter
                        | ErrorKind::UnknownTest
                        | ErrorKind::UnknownFunction
                        | ErrorKind::TemplateNotFound
                        | ErrorKind::OutOfFuel
                ) =>
            {
                Err(TemplateError::Syntax(describe(&e)))
            }
            _ => Ok(()),
        }
    }
}

fn context<'a>(fields: impl IntoIterator<Item = (&'a str, &'a str)>) -> Value {
    fields.into_iter().map(|(name, text)| (Value::from(name), Value::from(text))).collect::<BTreeMap<_, _>>().into()
}

pub(super) fn describe(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return "rendering takes too many steps or too much memory".to_owned();
    }
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
    match error.detail() {
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    }
}

fn quoted(names: &[impl AsRef<str>]) -> String {
    names.iter().map(|n| format!("{:?}", n.as_ref())).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::soft::{Piece, Place};
    use super::*;

    fn render(source: &str, input: &Input) -> Result<String, TemplateError> {
        PromptTemplate::parse(source).expect("parses").render(input).map(|rendered| rendered.text_with(None))
    }

    fn text(text: &str) -> Input {
        Input::Text(text.to_owned())
    }

    fn fields(fields: &[(&str, &str)]) -> Input {
        Input::Fields(fields.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn the_default_template_gives_the_input_back_byte_for_byte() {
        for input in ["a <b> & \"c\" 'd'", "line\n", "\n\n x \t", "{{ input }}", "é😀"] {
            assert_eq!(render(DEFAULT_TEMPLATE, &text(input)).as_deref(), Ok(input));
        }
    }

    #[test]
    fn every_text_begins_with_the_fixed_beginning() {
        for (source, fixed) in [
            ("{{ input }}", ""),
            ("Review: {{ input }}\nLabel:", "Review: "),
            ("Review: \n{{- input }}", "Review:"),
            ("a { b {# why #} c {{ input }}", "a { b "),
            ("a \r\n{% if input %}b {% endif %}{{ input }}", "a \r\n"),
            ("{% raw %}a{% endraw %}{{ input }}", ""),
        ] {
            let template = PromptTemplate::parse(source).expect("parses");
            assert_eq!(template.fixed_beginning().text_with(None), fixed, "{source}");
            for input in ["x", " x", "\nx"] {
                let rendered = template.render(&text(input)).expect("renders").text_with(None);
                assert!(rendered.starts_with(fixed), "{source}");
            }
        }
    }

    #[test]
    fn the_fixed_beginning_goes_on_through_places_of_virtual_tokens() {
        let piece = |text: &str| Piece::Text(text.to_owned());
        let range = |start, end| Piece::Virtual(Place::Range(start..end));
        for (source, fixed) in [
            ("{{ soft() }}{{ input }}", vec![Piece::Virtual(Place::All)]),
            (
                "a {{ soft(0, 2) }} b {{soft(2,4)}}{{ input }}",
                vec![piece("a "), range(0, 2), piece(" b "), range(2, 4)],
            ),
            ("a {{- soft(0, 2) -}} b \n{{- input }}", vec![piece("a"), range(0, 2), piece("b")]),
            ("a {{ soft(0, input | length) }}{{ input }}", vec![piece("a ")]),
        ] {
            let template = PromptTemplate::parse(source).expect("parses");
            assert!(template.places_virtual_tokens());
            assert_eq!(template.fields(), ["input"]);
            assert_eq!(template.fixed_beginning().pieces, fixed, "{source}");
        }
    }

    #[test]
    fn a_field_may_be_called_soft() {
        let template = PromptTemplate::parse("{{ soft }}").expect("parses");
        assert!(!template.places_virtual_tokens());
        assert_eq!(template.fields(), ["soft"]);
    }

    #[test]
    fn a_trailing_newline_of_the_template_stays() {
        assert_eq!(render("{{ input }}\nLabel:\n", &text("x")).as_deref(), Ok("x\nLabel:\n"));
    }

    #[test]
    fn a_text_goes_to_the_only_field_whatever_its_name() {
        assert_eq!(render("Q: {{ question }} {{ question }}", &text("why")).as_deref(), Ok("Q: why why"));
    }

    #[test]
    fn fields_are_sorted_and_leave_out_what_the_template_defines() {
        let source = "{% set x = b %}{% for i in range(2) %}{{ x }}{{ i }}{{ loop.index }}{% endfor %}{{ a.c }}{{ namespace() }}";
        assert_eq!(PromptTemplate::parse(source).expect("parses").fields(), ["a", "b"]);
    }

    #[test]
    fn a_text_for_two_fields_names_both() {
        let error = render("{{ a }}{{ b }}", &text("x")).expect_err("two fields");
        assert!(error.to_string().contains(r#"the fields "a", "b""#), "{error}");
    }

    #[test]
    fn missing_and_unknown_fields_are_listed_with_what_exists() {
        let error = render("{{ a }}{{ b }}", &fields(&[("a", "1"), ("c", "2")])).expect_err("wrong fields");
        assert_eq!(
            error.to_string(),
            r#"the input does not fit the template: missing "b", unknown "c"; its fields are "a", "b""#
        );
    }

    #[test]
    fn an_empty_input_is_refused_and_one_full_field_is_enough() {
        for input in [text(""), text(" \n\t")] {
            assert_eq!(render("{{ input }}", &input), Err(TemplateError::Input("input is empty".into())));
        }
        assert!(render("{{ a }}{{ b }}", &fields(&[("a", ""), ("b", " ")])).is_err());
        assert_eq!(render("{{ a }}{{ b }}", &fields(&[("a", ""), ("b", "x")])).as_deref(), Ok("x"));
    }

    #[test]
    fn a_template_without_fields_or_with_unknown_names_is_refused() {
        for bad in ["", "constant", "{{ range(3) }}", "{{ input", "{{ input | nope }}", "{% include input %}"] {
            assert!(matches!(PromptTemplate::parse(bad), Err(TemplateError::Syntax(_))), "{bad}");
        }
        assert!(PromptTemplate::parse(&format!("{{{{ input }}}}{}", "x".repeat(MAX_TEMPLATE_BYTES))).is_err());
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ input }}{% endfor %}{% endfor %}";
        assert!(PromptTemplate::parse(endless).is_err());
        let long = "{{ input }}{% if input == 'go' %}{{ 'x' * 100000000000 }}{% endif %}";
        assert!(matches!(render(long, &text("go")), Err(TemplateError::Input(_))));
    }

    #[test]
    fn a_rendered_text_has_a_bound() {
        let error = render("{{ input }}{{ input }}", &text(&"x".repeat(MAX_RENDERED_BYTES))).expect_err("too long");
        assert!(error.to_string().contains("renders to"), "{error}");
    }
}
