//! The errors of tuning in the command line's words: which option a number came from, and which would help.

use crate::tune::{Setting, TuneError, checkpoint::CheckpointError, init::InitError};

/// The error with the options that it is about.
pub(super) fn explain(error: TuneError) -> anyhow::Error {
    let message = match &error {
        TuneError::OutOfRange { setting, found, expected } => {
            format!("{} is {found}, expected {expected}", option(*setting))
        }
        TuneError::Template(reason) => format!("--template: {reason}"),
        TuneError::Place(reason) => format!("--template: {reason}"),
        _ => match advice(&error) {
            Some(advice) => format!("{error}; {advice}"),
            None => return error.into(),
        },
    };
    anyhow::Error::msg(message)
}

/// The option that sets a number.
fn option(setting: Setting) -> &'static str {
    match setting {
        Setting::VirtualTokens => "--virtual-tokens",
        Setting::LearningRate => "--lr",
        Setting::Warmup => "--warmup",
        Setting::WeightDecay => "--weight-decay",
        Setting::Clip => "--clip",
        Setting::WordDropout => "--word-dropout",
        Setting::Noise => "--noise",
        Setting::BatchSize => "--batch-size",
        Setting::Accumulate => "--accumulate",
        Setting::EvalEvery => "--eval-every",
        Setting::EncoderHidden => "--encoder-hidden",
        Setting::Steps => "--steps",
        Setting::Epochs => "--epochs",
        Setting::Folds => "--folds",
        Setting::Truncate => "--truncate",
    }
}

/// What can be typed against an error.
fn advice(error: &TuneError) -> Option<&'static str> {
    Some(match error {
        TuneError::DeeperDecoder { .. } => "use --type prompt or --type p-tuning",
        TuneError::Managed { .. } => "choose another --output, then upload it with `softserve push`",
        TuneError::Diverged { .. } => "choose a lower --lr",
        TuneError::NoRate { .. } => "check the data, or set --lr",
        TuneError::NoGain { .. } => "check the data, or try another --lr, more --steps or --type prefix",
        TuneError::Interrupted { .. } => {
            "to continue, add --resume to the same options, or --finish to write the best prompt so far"
        }
        TuneError::Checkpoint(CheckpointError::Missing(_) | CheckpointError::Damaged { .. }) => {
            "start without --resume"
        }
        TuneError::Checkpoint(CheckpointError::OtherRun { .. }) => "use the same values, or start without --resume",
        TuneError::Init(InitError::OtherKind { .. }) => {
            "start from a task of the same kind, or choose another --type or --init"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_number_out_of_range_is_told_by_its_option() {
        let error = TuneError::OutOfRange {
            setting: Setting::BatchSize,
            found: "0".to_owned(),
            expected: "1 or more".to_owned(),
        };
        assert!(error.to_string().starts_with("the batch size is 0"), "{error}");
        assert_eq!(explain(error).to_string(), "--batch-size is 0, expected 1 or more");
    }

    #[test]
    fn an_error_keeps_its_facts_and_gets_the_option_that_helps() {
        let missing = explain(CheckpointError::Missing(PathBuf::from("x")).into()).to_string();
        assert_eq!(missing, "there is no checkpoint at x; start without --resume");
        let diverged = explain(TuneError::Diverged { rate: 3.0, step: 7 }).to_string();
        assert!(diverged.contains("step 7") && diverged.ends_with("choose a lower --lr"), "{diverged}");
        assert_eq!(explain(TuneError::EngineFailed).to_string(), TuneError::EngineFailed.to_string());
    }
}
