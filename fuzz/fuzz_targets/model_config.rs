//! A model's `config.json`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use softserve::model::ModelConfig;

fuzz_target!(|data: &[u8]| {
    let _ = ModelConfig::from_json(data);
});
