//! A torch file whose pickle is anything and whose storage is 64 bytes: a zip that is damaged
//! itself would seldom come as far as its pickle. No checksum is wrong, so that none hides a fault.
#![no_main]

use libfuzzer_sys::fuzz_target;
use softserve::convert;

fuzz_target!(|data: &[u8]| {
    let entries = [("archive/data.pkl", data), ("archive/data/0", &[0; 64][..])];
    if let Ok(found) = convert::parse(stored(&entries).into(), 1 << 20) {
        let _ = found.to_peft(&convert::Target::default());
    }
});

/// A zip of stored entries (PKWARE's APPNOTE, 4.3).
fn stored(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut zip, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let offset = zip.len() as u32;
        let mut fields = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        fields.extend(crc32(content).to_le_bytes());
        fields.extend((content.len() as u32).to_le_bytes().repeat(2));
        fields.extend((name.len() as u16).to_le_bytes());
        fields.extend([0, 0]);
        zip.extend(b"PK\x03\x04");
        zip.extend(&fields);
        zip.extend(name.as_bytes());
        zip.extend(*content);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&fields);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (offset, len) = (zip.len() as u32, directory.len() as u32);
    zip.extend(directory);
    zip.extend(b"PK\x05\x06\x00\x00\x00\x00");
    zip.extend((entries.len() as u16).to_le_bytes().repeat(2));
    zip.extend(len.to_le_bytes());
    zip.extend(offset.to_le_bytes());
    zip.extend([0, 0]);
    zip
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}
