//! Training data in every form that `softserve tune` reads.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use softserve::examples::Dataset;

fuzz_target!(|data: &[u8]| {
    for name in ["data.jsonl", "data.csv", "data.tsv"] {
        let _ = Dataset::parse(Path::new(name), data, None);
    }
});
