//! `task.json` with its template and labels, beside good weights.
#![no_main]
#[path = "fit.rs"]
#[allow(dead_code)]
mod fit;

use libfuzzer_sys::fuzz_target;
use softserve::prompt::files::PromptFiles;

fuzz_target!(|data: &[u8]| {
    let task = Some(data.to_vec().into());
    fit::read(&PromptFiles { task, weights: Some(fit::weights()), ..PromptFiles::default() });
});
