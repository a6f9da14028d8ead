//! A GGUF model: its header, its config, its tokenizer and what is done to its tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use softserve::model::gguf;

fuzz_target!(|data: &[u8]| {
    let _ = gguf::check(data);
});
