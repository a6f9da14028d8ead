//! Whatever `softserve convert` may be given, from its first bytes to the PEFT directory.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use softserve::convert;

fuzz_target!(|data: &[u8]| {
    if let Ok(found) = convert::parse(Bytes::copy_from_slice(data), 1 << 20) {
        let _ = found.to_peft(&convert::Target::default());
    }
});
