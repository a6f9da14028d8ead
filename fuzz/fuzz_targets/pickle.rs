//! The pickle machine by itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use softserve::convert::pickle::Pickle;

fuzz_target!(|data: &[u8]| {
    if let Ok(pickle) = Pickle::read(data) {
        assert!(pickle.len <= data.len());
    }
});
