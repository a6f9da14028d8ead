//! Questions about one input, put to tasks by their labels or to the base model by letters, in one batch.

use std::{collections::HashSet, fmt::Write as _, sync::Arc, time::Instant};

use futures::future::try_join_all;

use super::super::{chat::message_ids, resolve};
use crate::{
    http::{
        App,
        access::Caller,
        classify::label_tokens,
        prepare::{Scheduling, Tokenized, tokenize},
        problem::{Code, Problem},
        scoring::{Call, Running, Scored},
        types::Usage,
    },
    prompt::{
        Version,
        calibration::{Calibration, log_sum_exp},
        chat::Message,
        label_scores::LabelTokens,
        template::Input,
    },
};

/// The template's field that a question's instructions go to.
const INSTRUCTIONS: &str = "instructions";
/// Options that can be told apart by one letter.
const LETTERS: usize = 26;

/// One question, whatever form it came in.
#[derive(Debug, Clone)]
pub struct Question {
    /// Where it stands in the request, for errors.
    pub at: String,
    /// The task that is asked, if not the request's `model`.
    pub task: Option<String>,
    pub instructions: Option<String>,
    /// What it may be answered with, in the order of its probabilities. `None`: whether it is true, in the order yes, no.
    pub options: Option<Vec<Choice>>,
    /// What yes and no mean, for the base model.
    pub meanings: [Option<String>; 2],
}

/// One thing that a question may be answered with.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Of a task, one of its labels.
    pub name: String,
    pub description: Option<String>,
}

/// A question's answer.
#[derive(Debug)]
pub struct Decided {
    /// Of each option, in the question's order; of a question without options, of yes and no.
    pub probabilities: Vec<f64>,
    pub usage: Usage,
}

/// The answers to all questions, and the version that gave the first.
#[derive(Debug)]
pub struct AllDecided {
    pub answers: Vec<Decided>,
    pub version: Arc<Version>,
}

/// Who asks, and how.
#[derive(Debug, Clone)]
pub struct Asking<'a> {
    pub app: &'a App,
    pub caller: Caller,
    /// The task or base model of questions that name none.
    pub model: &'a str,
    pub scheduling: Scheduling,
    pub started: Instant,
}

/// A question that the engine can take.
#[derive(Debug)]
struct Ready {
    call: Call,
    tokenized: Tokenized,
    continuations: Vec<Vec<u32>>,
    reading: Reading,
}

/// How log-probabilities become the probabilities of options.
#[derive(Debug, Clone)]
enum Reading {
    /// Labels, and the options' places among them.
    Labels { tokens: LabelTokens, names: Vec<String>, calibration: Calibration },
    /// A continuation for each option.
    Letters,
}

impl Asking<'_> {
    /// Asks all questions about one input, computed together.
    ///
    /// # Errors
    /// A question cannot be asked, or is not answered.
    pub async fn ask(&self, input: &[Message], questions: &[Question]) -> Result<AllDecided, Problem> {
        let mut ready = Vec::with_capacity(questions.len());
        for question in questions {
            ready.push(self.prepare(input, question).await?);
        }
        let version = match ready.first() {
            Some(first) => Arc::clone(&first.call.version),
            None => return Err(Problem::field("questions", "found none, expected at least one")),
        };
        let mut answers = Vec::with_capacity(ready.len());
        // All at once; where the queue has no room for all, in several rounds, since a call must not be refused for its own sake.
        while !ready.is_empty() {
            let requests = ready.iter().map(|ready| {
                let Ready { call, tokenized, continuations, .. } = ready;
                call.request(self.app, tokenized, tokenized.tokens.len(), continuations.clone())
            });
            let submitted = self.app.engine.submit_all(requests.collect());
            let mut round = Vec::with_capacity(submitted.len());
            for (ready, submitted) in ready.iter().zip(submitted) {
                match ready.call.running(ready.tokenized.text_ids(), submitted) {
                    Ok(running) => round.push(running),
                    Err(problem) if problem.code == Code::Overloaded && !round.is_empty() => break,
                    Err(problem) => return Err(problem),
                }
            }
            let scored = try_join_all(round.into_iter().map(Running::finish)).await?;
            answers.extend(ready.drain(..scored.len()).zip(scored).map(|(ready, scored)| ready.reading.read(scored)));
        }
        Ok(AllDecided { answers, version })
    }

    async fn prepare(&self, input: &[Message], question: &Question) -> Result<Ready, Problem> {
        let model = question.task.as_deref().unwrap_or(self.model);
        let version = resolve(self.app, &self.caller, model).await?;
        let call = Call { caller: self.caller.clone(), version, scheduling: self.scheduling, started: self.started };
        match call.version.learned_prompt() {
            Some(_) => self.of_task(call, input, question).await,
            None => self.of_base(call, input, question).await,
        }
    }

    /// Of a task: its learned prompt is the instruction.
    async fn of_task(&self, call: Call, input: &[Message], question: &Question) -> Result<Ready, Problem> {
        let version = &call.version;
        let all = label_tokens(self.app, version, None)?;
        let (tokens, names) = match &question.options {
            Some(options) => {
                let names: Vec<String> = options.iter().map(|option| option.name.clone()).collect();
                if let Some(twice) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
                    let detail = format!("found two values that are the label {:?}, expected each label once", twice.1);
                    return Err(Problem::field(&question.at, detail));
                }
                (label_tokens(self.app, version, Some(&names))?, names)
            }
            None => {
                let names = yes_and_no(version, &all, &question.at)?;
                (all, names)
            }
        };
        let takes_instructions = version.template.fields().iter().any(|field| field == INSTRUCTIONS);
        let tokenized = match input {
            [only] if takes_instructions && version.chat.is_none() => {
                let fields = version.template.fields().iter().map(|field| {
                    let text = match field == INSTRUCTIONS {
                        true => question.instructions.clone().unwrap_or_default(),
                        false => only.content.clone(),
                    };
                    (field.clone(), text)
                });
                tokenize(self.app, version, Input::Fields(fields.collect())).await?
            }
            _ => message_ids(self.app, version, input.to_vec(), "input").await?,
        };
        let calibration = version.spec.calibration.clone().unwrap_or_else(Calibration::none);
        let continuations = tokens.continuations();
        let reading = Reading::Labels { tokens, names, calibration };
        Ok(Ready { call, tokenized, continuations, reading })
    }

    /// Of the base model: in words and letters.
    async fn of_base(&self, call: Call, input: &[Message], question: &Question) -> Result<Ready, Problem> {
        let choice = |name: &str, description: &Option<String>| Choice {
            name: name.to_owned(),
            description: description.clone(),
        };
        let [yes, no] = &question.meanings;
        let options = question.options.clone().unwrap_or_else(|| vec![choice("Yes", yes), choice("No", no)]);
        let codes = codes(options.len());
        let mut words = String::new();
        if let Some(instructions) = &question.instructions {
            words += instructions;
            words.push('\n');
        }
        for (code, Choice { name, description }) in codes.iter().zip(&options) {
            // Writing to a text does not fail.
            let _ = match description {
                Some(description) => writeln!(words, "{code}. {name}: {description}"),
                None => writeln!(words, "{code}. {name}"),
            };
        }
        let version = &call.version;
        let (tokenized, before) = if version.chat.is_some() {
            let mut messages = input.to_vec();
            let asked = format!("{words}Answer with one of the letters only.");
            match messages.last_mut().filter(|last| last.role == "user") {
                Some(last) => last.content = format!("{}\n\n{asked}", last.content),
                None => messages.push(Message { role: "user".to_owned(), content: asked, name: None }),
            }
            (message_ids(self.app, version, messages, "input").await?, "")
        } else {
            let said: Vec<&str> = input.iter().map(|message| message.content.as_str()).collect();
            let text = format!("{}\n\n{words}Answer:", said.join("\n\n"));
            (tokenize(self.app, version, Input::Text(text)).await?, " ")
        };
        let ids = |code: &String| self.app.tokenizer.tokenize_continuation(&format!("{before}{code}"));
        let continuations = codes.iter().map(ids).collect::<Result<Vec<_>, _>>()?;
        let distinct: HashSet<&Vec<u32>> = continuations.iter().filter(|ids| !ids.is_empty()).collect();
        if distinct.len() < codes.len() {
            let detail = "the model's tokenizer has no tokens for the letters that a question is put in: ask a task";
            return Err(Problem::field(&question.at, detail));
        }
        Ok(Ready { call, tokenized, continuations, reading: Reading::Letters })
    }
}

impl Reading {
    fn read(self, scored: Scored) -> Decided {
        let probabilities = match self {
            Self::Labels { tokens, names, calibration } => {
                let scores = tokens.scores(&scored.log_probs, &calibration).probabilities;
                let of = |name: &String| scores.iter().find(|(label, _)| label == name).map_or(0.0, |(_, p)| *p);
                names.iter().map(of).collect()
            }
            Self::Letters => {
                let sum = |tokens: &Vec<f32>| tokens.iter().map(|&x| f64::from(x)).sum::<f64>();
                let logs: Vec<f64> = scored.log_probs.iter().map(sum).collect();
                let all = log_sum_exp(logs.iter().copied());
                logs.into_iter().map(|log| (log - all).exp()).collect()
            }
        };
        Decided { probabilities, usage: scored.usage }
    }
}

/// The labels that mean yes and no: what `true_label` of task.json says, or the names themselves.
fn yes_and_no(version: &Version, labels: &LabelTokens, at: &str) -> Result<Vec<String>, Problem> {
    let names: Vec<&str> = labels.names().collect();
    let [first, second] = names.as_slice() else {
        let detail = format!(
            "found a question of the type \"predicate\" for the task {} with {} labels, expected a task with two: ask it with the \
             type \"choice\"",
            version.task,
            names.len()
        );
        return Err(Problem::field(at, detail));
    };
    let is = |name: &str, words: [&str; 2]| words.iter().any(|word| name.eq_ignore_ascii_case(word));
    let means_yes = |yes: &str, no: &str| match &version.spec.true_label {
        Some(label) => label == yes,
        None => is(yes, ["true", "yes"]) && is(no, ["false", "no"]),
    };
    match (means_yes(first, second), means_yes(second, first)) {
        (true, _) => Ok(vec![(*first).to_owned(), (*second).to_owned()]),
        (_, true) => Ok(vec![(*second).to_owned(), (*first).to_owned()]),
        _ => {
            let detail = format!(
                "which of the labels {first:?} and {second:?} of the task {} means yes is not known: name it with \"true_label\" \
                 in its task.json, or ask with the type \"choice\"",
                version.task
            );
            Err(Problem::field(at, detail))
        }
    }
}

/// As many codes as there are options, of which none begins with another: letters, or pairs of letters.
fn codes(options: usize) -> Vec<String> {
    let letter = |i: usize| char::from(b'A' + (i % LETTERS) as u8);
    let code = |i: usize| match options <= LETTERS {
        true => letter(i).to_string(),
        false => [letter(i / LETTERS), letter(i)].iter().collect(),
    };
    (0..options).map(code).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_letters_or_pairs_of_them() {
        assert_eq!(codes(3), ["A", "B", "C"]);
        assert_eq!(codes(26).last().map(String::as_str), Some("Z"));
        let many = codes(255);
        assert_eq!((many[0].as_str(), many[26].as_str(), many[254].as_str()), ("AA", "BA", "JU"));
        assert_eq!(many.iter().collect::<HashSet<_>>().len(), 255);
    }
}
