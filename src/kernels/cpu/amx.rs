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
/// How far ahead weights are asked for, in bytes: the processor by itself looks no further than the
/// end of a page.
const AHEAD: usize = 4 * TILE_BYTES;

/// Asks for the lines of the tile that is [`AHEAD`] of the one at register `$b`.
macro_rules! prefetch_tile {
    ($b:literal) => {
        concat!(
            "prefetcht0 [{",
            $b,
            "} + {d}]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 64]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 128]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 192]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 256]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 320]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 384]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 448]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 512]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 576]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 640]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 704]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 768]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 832]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 896]\n",
            "prefetcht0 [{",
            $b,
            "} + {d} + 960]",
        )
    };
}

/// The loop of [`block_2x2`], with what is to be done for each tile of `b0` and `b1` besides.
macro_rules! loop_2x2 {
    ($a0:ident, $a1:ident, $b0:ident, $b1:ident, $tiles:ident, $out:ident, $for_b0:expr, $for_b1:expr) => {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "test {n}, {n}", "jz 3f",
            "2:",
            "tileloadd tmm6, [{b0} + {s}]",
            "tileloadd tmm4, [{a0} + {s}]",
            $for_b0,
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{b1} + {s}]",
            $for_b1,
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, {t}", "add {a1}, {t}", "add {b0}, {t}", "add {b1}, {t}",
            "dec {n}", "jnz 2b",
            "3:",
            "tilestored [{o} + {w}], tmm0",
            "tilestored [{o} + {w} + 64], tmm1",
            "tilestored [{o} + {w} + 2048], tmm2",
            "tilestored [{o} + {w} + 2112], tmm3",
            "/* {d} */",
            a0 = inout(reg) $a0 => _, a1 = inout(reg) $a1 => _,
            b0 = inout(reg) $b0 => _, b1 = inout(reg) $b1 => _,
            n = inout(reg) $tiles => _,
            s = in(reg) 64usize, t = const TILE_BYTES, d = const AHEAD, w = in(reg) 128usize, o = in(reg) $out,
            options(nostack),
        )
    };
}

/// `out` `[32][32]` = A (two row tiles) by B (two panels): `a0`, `a1`, `b0`, `b1` are each `tiles` tiles
/// one after another. `cold` says that B comes from memory.
///
/// # Safety
/// The thread is [`configure`]d; the pointers are valid for that many tiles, and `out` for 1024
/// values.
pub unsafe fn block_2x2(
    a0: *const u32,
    a1: *const u32,
    b0: *const u32,
    b1: *const u32,
    tiles: usize,
    out: *mut f32,
    cold: bool,
) {
    // SAFETY: all that is read and written lies where the caller says (a prefetch is no access). The
    // loop ends with `tiles` at zero, and is not entered with it.
    unsafe {
        if cold {
            loop_2x2!(a0, a1, b0, b1, tiles, out, prefetch_tile!("b0"), prefetch_tile!("b1"));
        } else {
            loop_2x2!(a0, a1, b0, b1, tiles, out, "", "");
        }
    }
}

/// The first 16 rows of `out` `[32][32]` = A (one row tile) by B (two panels).
///
/// # Safety
/// As [`block_2x2`].
pub unsafe fn block_1x2(a0: *const u32, b0: *const u32, b1: *const u32, tiles: usize, out: *mut f32) {
    // SAFETY: as `block_2x2`.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            "test {n}, {n}", "jz 3f",
            "2:",
            "tileloadd tmm4, [{a0} + {s}]",
            "tileloadd tmm6, [{b0} + {s}]",
            prefetch_tile!("b0"),
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {s}]",
            prefetch_tile!("b1"),
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a0}, {t}", "add {b0}, {t}", "add {b1}, {t}",
            "dec {n}", "jnz 2b",
            "3:",
            "tilestored [{o} + {w}], tmm0",
            "tilestored [{o} + {w} + 64], tmm1",
            a0 = inout(reg) a0 => _, b0 = inout(reg) b0 => _, b1 = inout(reg) b1 => _,
            n = inout(reg) tiles => _,
            s = in(reg) 64usize, t = const TILE_BYTES, d = const AHEAD, w = in(reg) 128usize, o = in(reg) out,
            options(nostack),
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
