//! Intel's tile instructions (AMX), through `asm!`: Rust's own intrinsics for them are not stable.
//!
//! A tile register holds 16 rows of 64 bytes: 16 x 32 bf16 or 16 x 16 f32. All eight are always set
//! up that way, so the configuration is loaded once a thread. Values stay in tile registers from one
//! `asm!` to the next because nothing else in the program uses them.

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
pub fn configure() {
    thread_local!(static DONE: Cell<bool> = const { Cell::new(false) });
    if DONE.replace(true) {
        return;
    }
    let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
    config.bytes_per_row[..8].fill(64);
    config.rows[..8].fill(16);
    // SAFETY: callers come here only with `Isa::Amx`, which exists where `usable` said so; the
    // 64 bytes are a valid configuration.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags)) };
}

/// Bytes of a tile in memory.
const TILE_BYTES: usize = 1024;
/// Lines of a tile.
const TILE_LINES: usize = 16;
/// Tiles of each panel that are asked for ahead of their use, when they come from memory.
const AHEAD: usize = 2;

/// Asks for some lines from the address in a register on.
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

/// Adds `n` tiles of two rows of A by two panels of B to the sums in tiles 0 to 3, and asks for so
/// many lines of what comes next each time.
macro_rules! add_2x2 {
    ($lines:tt, $n:expr, $a:expr, $b:expr, $ahead:expr) => {{
        let (n, a, b, ahead) = ($n, $a, $b, $ahead);
        if n > 0 {
            asm!(
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
                a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _,
                b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
                p0 = inout(reg) ahead[0] => _, p1 = inout(reg) ahead[1] => _,
                n = inout(reg) n => _, s = in(reg) 64usize, t = const TILE_BYTES, l = const $lines * 64,
                options(nostack),
            );
        }
    }};
}

/// As [`add_2x2`], for one row tile and the sums in tiles 0 and 1.
macro_rules! add_1x2 {
    ($lines:tt, $n:expr, $a:expr, $b:expr, $ahead:expr) => {{
        let (n, a, b, ahead) = ($n, $a, $b, $ahead);
        if n > 0 {
            asm!(
                "2:",
                "tileloadd tmm4, [{a0} + {s}]",
                "tileloadd tmm6, [{b0} + {s}]",
                prefetch!($lines, "p0"),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {s}]",
                prefetch!($lines, "p1"),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a0}, {t}", "add {b0}, {t}", "add {b1}, {t}", "add {p0}, {l}", "add {p1}, {l}",
                "dec {n}", "jnz 2b",
                a0 = inout(reg) a => _,
                b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
                p0 = inout(reg) ahead[0] => _, p1 = inout(reg) ahead[1] => _,
                n = inout(reg) n => _, s = in(reg) 64usize, t = const TILE_BYTES, l = const $lines * 64,
                options(nostack),
            );
        }
    }};
}

/// What is asked of memory beside a block's own work.
#[derive(Debug, Clone, Copy)]
pub enum Ahead {
    /// The block's own panels, which come from memory, and the beginnings of these, which are next.
    Near([*const u32; 2]),
    /// The panels that are next, in so many parts, of which this block asks for one.
    Far { next: [*const u32; 2], part: usize, parts: usize },
}

/// `bytes` further.
fn further(p: [*const u32; 2], bytes: usize) -> [*const u32; 2] {
    p.map(|p| p.wrapping_byte_add(bytes))
}

/// `out` `[32][32]` = A (two row tiles) by B (two panels): all four are `tiles` tiles, one after
/// another.
///
/// # Safety
/// The thread is [`configure`]d; the pointers are valid for that many tiles, and `out` for 1024
/// values.
pub unsafe fn block_2x2(a: [*const u32; 2], b: [*const u32; 2], tiles: usize, out: *mut f32, ahead: Ahead) {
    // SAFETY: all that is read and written lies where the caller says; a prefetch is no access. The
    // loops end with their count at zero, and are not entered with it.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
        match ahead {
            Ahead::Near(next) => {
                let last = AHEAD.min(tiles);
                let first = tiles - last;
                add_2x2!(16, first, a, b, further(b, last * TILE_BYTES));
                let (a, b) = (further(a, first * TILE_BYTES), further(b, first * TILE_BYTES));
                add_2x2!(16, last, a, b, next);
            }
            Ahead::Far { next, part, parts } => {
                let lines = TILE_LINES.div_ceil(parts).next_power_of_two();
                match lines {
                    _ if part * lines >= TILE_LINES => add_2x2!(0, tiles, a, b, next),
                    1 | 2 => add_2x2!(2, tiles, a, b, further(next, part * tiles * 2 * 64)),
                    4 => add_2x2!(4, tiles, a, b, further(next, part * tiles * 4 * 64)),
                    8 => add_2x2!(8, tiles, a, b, further(next, part * tiles * 8 * 64)),
                    _ => add_2x2!(16, tiles, a, b, next),
                }
            }
        }
        asm!(
            "tilestored [{o} + {w}], tmm0",
            "tilestored [{o} + {w} + 64], tmm1",
            "tilestored [{o} + {w} + 2048], tmm2",
            "tilestored [{o} + {w} + 2112], tmm3",
            w = in(reg) 128usize, o = in(reg) out,
            options(nostack, preserves_flags),
        );
    }
}

/// The first 16 rows of `out` `[32][32]` = A (one row tile) by B (two panels); `next` is what comes from
/// memory after B.
///
/// # Safety
/// As [`block_2x2`].
pub unsafe fn block_1x2(a: *const u32, b: [*const u32; 2], tiles: usize, out: *mut f32, next: [*const u32; 2]) {
    // SAFETY: as `block_2x2`.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
        let last = AHEAD.min(tiles);
        let first = tiles - last;
        add_1x2!(16, first, a, b, further(b, last * TILE_BYTES));
        let (a, b) = (a.wrapping_byte_add(first * TILE_BYTES), further(b, first * TILE_BYTES));
        add_1x2!(16, last, a, b, next);
        asm!(
            "tilestored [{o} + {w}], tmm0",
            "tilestored [{o} + {w} + 64], tmm1",
            w = in(reg) 128usize, o = in(reg) out,
            options(nostack, preserves_flags),
        );
    }
}

/// Scores of 16 queries against the 32 positions of a block: `out` is `[16][32]`. `q` is `[dim_tiles][16][16 pairs]`, `k` `[dim_tiles * 16 pairs][32 positions]`.
///
/// # Safety
/// The thread is [`configure`]d, and the pointers are valid for these shapes.
pub unsafe fn scores(q: *const u32, k: *const u32, dim_tiles: usize, out: *mut f32) {
    // SAFETY: as `block_2x2`.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{q} + {s}]",
            "tileloadd tmm6, [{k} + {w}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{k} + {w} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {q}, 1024", "add {k}, 2048",
            "dec {n}", "jnz 2b",
            "tilestored [{o} + {w}], tmm0",
            "tilestored [{o} + {w} + 64], tmm1",
            q = inout(reg) q => _, k = inout(reg) k => _, n = inout(reg) dim_tiles => _,
            s = in(reg) 64usize, w = in(reg) 128usize, o = in(reg) out,
            options(nostack),
        );
    }
}

/// Clears the four sums of [`add_values`].
///
/// # Safety
/// The thread is [`configure`]d.
pub unsafe fn clear_values() {
    // SAFETY: as the caller says; no memory is touched.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
    }
}

/// Adds the values of a block's 32 positions, weighted by 16 rows `p` `[16][16 pairs]`, to the sums of 64
/// dimensions. `v` is `[16 pairs of positions][dims]`, at the first of these.
///
/// # Safety
/// The thread is [`configure`]d and has called [`clear_values`]; the pointers are valid for these shapes.
pub unsafe fn add_values(p: *const u32, v: *const u32, dims: usize) {
    // SAFETY: as the caller says.
    unsafe {
        asm!(
            "tileloadd tmm4, [{p} + {ps}]",
            "tileloadd tmm5, [{v} + {vs}]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm6, [{v} + {vs} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "tileloadd tmm5, [{v} + {vs} + 128]",
            "tdpbf16ps tmm2, tmm4, tmm5",
            "tileloadd tmm6, [{v} + {vs} + 192]",
            "tdpbf16ps tmm3, tmm4, tmm6",
            p = in(reg) p, ps = in(reg) 64usize, v = in(reg) v, vs = in(reg) dims * 4,
            options(nostack, preserves_flags),
        );
    }
}

/// As [`add_values`], for 32 dimensions.
///
/// # Safety
/// As [`add_values`].
pub unsafe fn add_values_32(p: *const u32, v: *const u32, dims: usize) {
    // SAFETY: as the caller says.
    unsafe {
        asm!(
            "tileloadd tmm4, [{p} + {ps}]",
            "tileloadd tmm5, [{v} + {vs}]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm6, [{v} + {vs} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            p = in(reg) p, ps = in(reg) 64usize, v = in(reg) v, vs = in(reg) dims * 4,
            options(nostack, preserves_flags),
        );
    }
}

/// Writes the sums of [`add_values`] to 16 rows of `out`, `[16][64]`.
///
/// # Safety
/// The thread is [`configure`]d and `out` is valid for 1024 values.
pub unsafe fn store_values(out: *mut f32) {
    // SAFETY: as the caller says.
    unsafe {
        asm!(
            "tilestored [{o} + {s}], tmm0",
            "tilestored [{o} + {s} + 64], tmm1",
            "tilestored [{o} + {s} + 128], tmm2",
            "tilestored [{o} + {s} + 192], tmm3",
            o = in(reg) out, s = in(reg) 256usize,
            options(nostack, preserves_flags),
        );
    }
}
