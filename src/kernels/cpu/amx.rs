//! Micro-kernels for Intel's tile instructions (AMX), through `asm!`: Rust's own intrinsics for them are not stable.
//!
//! A tile register holds 16 rows of 64 bytes: 16 x 32 bf16 or 16 x 16 f32. All eight are always set
//! up that way, so the configuration is loaded once a thread. Each `asm!` declares the tiles that it writes as
//! clobbered and stores its sums itself: no value is left in a tile from one to the next.

use std::{arch::asm, cell::Cell, sync::OnceLock};

/// Whether the processor has AMX with bf16 and the system lets this process use it. Asks for the
/// permission.
pub fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
        features & AMX_BF16 != 0 && features & AMX_TILE != 0 && permitted()
    })
}

/// Asks Linux to save the tiles of this process's threads when it switches between them; until it
/// agrees, a tile instruction is a fault.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The layout that `ldtilecfg` reads.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// Gives all eight tiles of this thread 16 rows of 64 bytes. To be called before the others.
///
/// # Safety
/// The processor has AMX and the system lets this process use it: [`usable`] has said so.
pub unsafe fn configure() {
    thread_local!(static DONE: Cell<bool> = const { Cell::new(false) });
    if DONE.replace(true) {
        return;
    }
    let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
    config.bytes_per_row[..8].fill(64);
    config.rows[..8].fill(16);
    // SAFETY: the caller says that the instruction is there; the 64 bytes are a valid configuration.
    unsafe {
        asm!(
            "ldtilecfg [{}]",
            in(reg) &raw const config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// Bytes of a tile in memory.
const TILE_BYTES: usize = 1024;
/// Cache lines of a tile.
const TILE_LINES: usize = 16;
/// How many tiles of each micro-panel are prefetched ahead of their use, when they come from memory.
const AHEAD: usize = 2;

/// Prefetches a number of cache lines from the address in a register on.
macro_rules! prefetch {
    (0, $p:literal) => {
        ""
    };
    (2, $p:literal) => {
        concat!("prefetcht0 [{", $p, "}]\n prefetcht0 [{", $p, "} + 64]")
    };
    (4, $p:literal) => {
        concat!(prefetch!(2, $p), "\n prefetcht0 [{", $p, "} + 128]\n prefetcht0 [{", $p, "} + 192]")
    };
    (8, $p:literal) => {
        concat!(
            prefetch!(4, $p),
            "\n prefetcht0 [{",
            $p,
            "} + 256]\n prefetcht0 [{",
            $p,
            "} + 320]",
            "\n prefetcht0 [{",
            $p,
            "} + 384]\n prefetcht0 [{",
            $p,
            "} + 448]"
        )
    };
    (16, $p:literal) => {
        concat!(
            prefetch!(8, $p),
            "\n prefetcht0 [{",
            $p,
            "} + 512]\n prefetcht0 [{",
            $p,
            "} + 576]",
            "\n prefetcht0 [{",
            $p,
            "} + 640]\n prefetcht0 [{",
            $p,
            "} + 704]",
            "\n prefetcht0 [{",
            $p,
            "} + 768]\n prefetcht0 [{",
            $p,
            "} + 832]",
            "\n prefetcht0 [{",
            $p,
            "} + 896]\n prefetcht0 [{",
            $p,
            "} + 960]"
        )
    };
}

/// The product of two row tiles of A and two micro-panels of B, summed in tiles 0 to 3 and stored. `$n` tiles along
/// `k` are multiplied while `$lines` cache lines from `$ahead` on are prefetched with each, then `$m` while those from
/// `$then` on are.
macro_rules! product_2x2 {
    ($lines:tt, $a:expr, $b:expr, $out:expr, $n:expr, $ahead:expr, $m:expr, $then:expr) => {{
        let (a, b, ahead, then): ([*const u32; 2], [*const u32; 2], [*const u32; 2], [*const u32; 2]) =
            ($a, $b, $ahead, $then);
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "test {n}, {n}", "jz 3f",
            "2:",
            "tileloadd tmm6, [{b0} + {s}]",
            "tileloadd tmm4, [{a0} + {s}]",
            prefetch!($lines, "p0"),
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{b1} + {s}]",
            prefetch!($lines, "p1"),
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, {t}", "add {a1}, {t}", "add {b0}, {t}", "add {b1}, {t}", "add {p0}, {l}", "add {p1}, {l}",
            "dec {n}", "jnz 2b",
            // The second part, once.
            "3:",
            "mov {p0}, {q0}", "mov {p1}, {q1}", "mov {n}, {m}", "xor {m:e}, {m:e}",
            "test {n}, {n}", "jnz 2b",
            "add {s}, {s}",
            "tilestored [{o} + {s}], tmm0",
            "tilestored [{o} + {s} + 64], tmm1",
            "tilestored [{o} + {s} + 2048], tmm2",
            "tilestored [{o} + {s} + 2112], tmm3",
            a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            p0 = inout(reg) ahead[0] => _, p1 = inout(reg) ahead[1] => _,
            q0 = in(reg) then[0], q1 = in(reg) then[1],
            n = inout(reg) $n => _, m = inout(reg) $m => _, s = inout(reg) 64usize => _, o = in(reg) $out,
            t = const TILE_BYTES, l = const $lines * 64,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }};
}

/// What a product prefetches.
#[derive(Debug, Clone, Copy)]
pub enum Prefetch {
    /// Its own micro-panels, which come from memory, and the beginnings of these, which are next.
    Own([*const u32; 2]),
    /// The micro-panels that are next: part `part` of `parts` of them.
    Next { next: [*const u32; 2], part: usize, parts: usize },
}

/// The addresses `bytes` further.
fn further(p: [*const u32; 2], bytes: usize) -> [*const u32; 2] {
    p.map(|p| p.wrapping_byte_add(bytes))
}

/// `out` `[32][32]` = A (two row tiles) by B (two micro-panels): all four are `tiles` tiles, one after
/// another.
///
/// # Safety
/// The thread is [`configure`]d; the pointers are valid for that many tiles, and `out` for 1024
/// values.
pub unsafe fn block_2x2(a: [*const u32; 2], b: [*const u32; 2], tiles: usize, out: *mut f32, prefetch: Prefetch) {
    // SAFETY: all that is read and written lies where the caller says; a prefetch is no access. The
    // loops end with their count at zero, and are not entered with it.
    unsafe {
        match prefetch {
            Prefetch::Own(next) => {
                let last = AHEAD.min(tiles);
                product_2x2!(16, a, b, out, tiles - last, further(b, last * TILE_BYTES), last, next);
            }
            Prefetch::Next { next, part, parts } => {
                let lines = TILE_LINES.div_ceil(parts).next_power_of_two();
                match lines {
                    _ if part * lines >= TILE_LINES => product_2x2!(0, a, b, out, tiles, next, 0usize, next),
                    1 | 2 => product_2x2!(2, a, b, out, tiles, further(next, part * tiles * 2 * 64), 0usize, next),
                    4 => product_2x2!(4, a, b, out, tiles, further(next, part * tiles * 4 * 64), 0usize, next),
                    8 => product_2x2!(8, a, b, out, tiles, further(next, part * tiles * 8 * 64), 0usize, next),
                    _ => product_2x2!(16, a, b, out, tiles, next, 0usize, next),
                }
            }
        }
    }
}

/// The first 16 rows of `out` `[32][32]` = A (one row tile) by B (two micro-panels); `next` is what comes from
/// memory after B.
///
/// # Safety
/// As [`block_2x2`].
pub unsafe fn block_1x2(a: *const u32, b: [*const u32; 2], tiles: usize, out: *mut f32, next: [*const u32; 2]) {
    let last = AHEAD.min(tiles);
    let ahead = further(b, last * TILE_BYTES);
    // SAFETY: as `block_2x2`.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            "test {n}, {n}", "jz 3f",
            "2:",
            "tileloadd tmm4, [{a0} + {s}]",
            "tileloadd tmm6, [{b0} + {s}]",
            prefetch!(16, "p0"),
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {s}]",
            prefetch!(16, "p1"),
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a0}, {t}", "add {b0}, {t}", "add {b1}, {t}", "add {p0}, {t}", "add {p1}, {t}",
            "dec {n}", "jnz 2b",
            // The last tiles, once.
            "3:",
            "mov {p0}, {q0}", "mov {p1}, {q1}", "mov {n}, {m}", "xor {m:e}, {m:e}",
            "test {n}, {n}", "jnz 2b",
            "add {s}, {s}",
            "tilestored [{o} + {s}], tmm0",
            "tilestored [{o} + {s} + 64], tmm1",
            a0 = inout(reg) a => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            p0 = inout(reg) ahead[0] => _, p1 = inout(reg) ahead[1] => _,
            q0 = in(reg) next[0], q1 = in(reg) next[1],
            n = inout(reg) tiles - last => _, m = inout(reg) last => _, s = inout(reg) 64usize => _, o = in(reg) out,
            t = const TILE_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Scores of 16 queries against the 32 positions of a block: `out` is `[16][32]`. `q` is `[dim_tiles][16][16 pairs]`,
/// `k` `[dim_tiles * 16 pairs][32 positions]`.
///
/// # Safety
/// The thread is [`configure`]d, and the pointers are valid for these shapes.
pub unsafe fn scores(q: *const u32, k: *const u32, dim_tiles: usize, out: *mut f32) {
    // SAFETY: as `block_2x2`.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            "test {n}, {n}", "jz 3f",
            "2:",
            "tileloadd tmm4, [{q} + {s}]",
            "tileloadd tmm6, [{k} + {w}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{k} + {w} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {q}, 1024", "add {k}, 2048",
            "dec {n}", "jnz 2b",
            "3:",
            "tilestored [{o} + {w}], tmm0",
            "tilestored [{o} + {w} + 64], tmm1",
            q = inout(reg) q => _, k = inout(reg) k => _, n = inout(reg) dim_tiles => _,
            s = in(reg) 64usize, w = in(reg) 128usize, o = in(reg) out,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The values of a range of blocks, as [`weigh_values`] reads them.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a> {
    /// From where the offsets count: the first of the 64 (or 32) dimensions that are summed.
    pub base: *const u32,
    /// Where each block's `[16 pairs of positions][dims]` begins, in words of four bytes.
    pub offsets: &'a [usize],
    pub dims: usize,
    /// How many cache lines of the next block are prefetched with each block.
    pub lines: usize,
    /// What is prefetched with the last block; null for nothing.
    pub next: *const u32,
}

/// The sum of the blocks' values, weighted by 16 rows: `out` `[16][64]` for 64 dimensions, of which the first 32 are
/// computed unless there are `WIDE` ones. `p` is `[blocks][16][16 pairs]`, the weights.
///
/// # Safety
/// The thread is [`configure`]d, and the pointers are valid for these shapes.
pub unsafe fn weigh_values<const WIDE: bool>(p: *const u32, values: Values, out: *mut f32) {
    let Values { base, offsets, dims, lines, next } = values;
    macro_rules! weigh {
        ([$($zero:literal),*] [$($add:literal),*] [$($store:literal),*]) => {
            asm!(
                $($zero,)*
                "test {n}, {n}", "jz 6f",
                "2:",
                // Prefetches the next block's values, or what is next after all blocks.
                "test {lines}, {lines}", "jz 5f",
                "mov {v}, {next}",
                "cmp {n}, 1", "je 3f",
                "mov {v}, [{at} + 8]", "lea {v}, [{base} + {v} * 4]",
                "3:",
                "test {v}, {v}", "jz 5f",
                "mov {c}, {lines}",
                "4:",
                "prefetcht0 [{v}]",
                "add {v}, 64",
                "dec {c}", "jnz 4b",
                "5:",
                "mov {v}, [{at}]", "lea {v}, [{base} + {v} * 4]",
                "tileloadd tmm4, [{p} + {ps}]",
                $($add,)*
                "add {p}, 1024", "add {at}, 8",
                "dec {n}", "jnz 2b",
                "6:",
                "mov {c:e}, 256",
                $($store,)*
                p = inout(reg) p => _, ps = in(reg) 64usize, vs = in(reg) dims * 4,
                base = in(reg) base, at = inout(reg) offsets.as_ptr() => _, n = inout(reg) offsets.len() => _,
                lines = in(reg) lines, next = in(reg) next, v = out(reg) _, c = out(reg) _, o = in(reg) out,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack),
            )
        };
    }
    // SAFETY: as `block_2x2`. An offset after the last one is not read.
    unsafe {
        match WIDE {
            true => weigh!(
                ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"]
                ["tileloadd tmm5, [{v} + {vs}]", "tdpbf16ps tmm0, tmm4, tmm5",
                 "tileloadd tmm6, [{v} + {vs} + 64]", "tdpbf16ps tmm1, tmm4, tmm6",
                 "tileloadd tmm5, [{v} + {vs} + 128]", "tdpbf16ps tmm2, tmm4, tmm5",
                 "tileloadd tmm6, [{v} + {vs} + 192]", "tdpbf16ps tmm3, tmm4, tmm6"]
                ["tilestored [{o} + {c}], tmm0", "tilestored [{o} + {c} + 64], tmm1",
                 "tilestored [{o} + {c} + 128], tmm2", "tilestored [{o} + {c} + 192], tmm3"]
            ),
            false => weigh!(
                ["tilezero tmm0", "tilezero tmm1"]
                ["tileloadd tmm5, [{v} + {vs}]", "tdpbf16ps tmm0, tmm4, tmm5",
                 "tileloadd tmm6, [{v} + {vs} + 64]", "tdpbf16ps tmm1, tmm4, tmm6"]
                ["tilestored [{o} + {c}], tmm0", "tilestored [{o} + {c} + 64], tmm1"]
            ),
        }
    }
}
