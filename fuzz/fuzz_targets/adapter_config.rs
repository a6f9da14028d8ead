//! PEFT's configuration beside good weights.
#![no_main]
#[path = "fit.rs"]
#[allow(dead_code)]
mod fit;

use libfuzzer_sys::fuzz_target;
use softserve::prompt::files::PromptFiles;

fuzz_target!(|data: &[u8]| {
    let adapter_config = Some(data.to_vec().into());
    fit::read(&PromptFiles { adapter_config, weights: Some(fit::weights()), ..PromptFiles::default() });
});
