//! A prompt's weights, checked against a model.
#![no_main]
#[path = "fit.rs"]
#[allow(dead_code)]
mod fit;

use libfuzzer_sys::fuzz_target;
use softserve::prompt::files::PromptFiles;

fuzz_target!(|data: &[u8]| {
    fit::read(&PromptFiles { weights: Some(data.to_vec().into()), ..PromptFiles::default() });
});
