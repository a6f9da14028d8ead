//! The sampling options of `softserve bench`: one for each row of the table that a load may name.

use clap::{Arg, ArgMatches, Args, Command, Error, FromArgMatches};

use crate::{bench::load::sampling_parameters, sampling::SamplingOptions};

/// What was typed of `--temperature`, `--top-p` and so on.
#[derive(Debug, Clone, Default)]
pub struct SamplingArgs(pub SamplingOptions);

impl Args for SamplingArgs {
    fn augment_args(command: Command) -> Command {
        command.args(sampling_parameters().map(|parameter| {
            let parse = move |text: &str| -> Result<SamplingOptions, String> {
                let mut options = SamplingOptions::default();
                options.set(parameter.option, text)?;
                Ok(options)
            };
            let help = format!("{} [{}]", parameter.doc.trim_end_matches('.'), parameter.range);
            let arg = Arg::new(parameter.option).long(parameter.option).value_name("N").help(help);
            arg.help_heading("Sampling").allow_negative_numbers(true).value_parser(parse)
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SamplingArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut typed = Self::default();
        typed.update_from_arg_matches(matches)?;
        Ok(typed)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for parameter in sampling_parameters() {
            if let Some(given) = matches.get_one::<SamplingOptions>(parameter.option) {
                self.0 = given.or(&self.0);
            }
        }
        Ok(())
    }
}
