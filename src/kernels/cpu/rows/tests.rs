//! Argmax held against the position that is known, and row-wise kernels called with lengths that do not fit.

use super::*;

#[test]
fn argmax_finds_the_first_of_the_largest() {
    for isa in Isa::available() {
        for (n, at) in [(1, 0), (15, 14), (64, 0), (1024, 1023), (1025, 1024), (5000, 3000), (49_152, 40_001)] {
            if cfg!(miri) && n > 2000 {
                continue;
            }
            let mut x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 2.0).collect();
            x[at] = 3.0;
            assert_eq!(argmax(isa, &x), at, "{isa:?}");
            if at + 1 < n {
                x[at + 1] = 3.0;
                x[n - 1] = f32::NAN;
            }
            assert_eq!(argmax(isa, &x), at, "{isa:?}");
        }
        assert_eq!(argmax(isa, &[]), 0);
        assert_eq!(argmax(isa, &[f32::NAN, f32::NEG_INFINITY, -1.0]), 2);
        assert_eq!(argmax(isa, &[f32::NAN; 3]), 0);
    }
}
#[test]
fn lengths_that_do_not_fit_are_refused() {
    let (pool, x, w) = (Pool::new(2), [1f32; 64], [1f32; 16]);
    let refused = |f: &dyn Fn() -> Vec<f32>| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    for isa in Isa::available() {
        assert!(!refused(&|| rms_norm(isa, &pool, &x, &w, 1e-5)));
        assert!(refused(&|| rms_norm(isa, &pool, &x, &w[1..], 1e-5)));
        assert!(refused(&|| rms_norm(isa, &pool, &x, &[], 1e-5)));
        assert!(refused(&|| layer_norm(isa, &pool, &x[1..], &w, None, 1e-5)));
        assert!(refused(&|| layer_norm(isa, &pool, &x, &w, Some(&w[1..]), 1e-5)));
        assert!(refused(&|| activate(isa, &pool, Activation::Silu, &x, 15)));
        // Four rows of one head of 16 dimensions, of which twice two are rotated.
        let (cos, sin) = ([1f32; 8], [0f32; 8]);
        assert!(!refused(&|| rope(isa, &pool, &x, 4, 16, &cos, &sin)));
        assert!(refused(&|| rope(isa, &pool, &x, 4, 16, &cos, &sin[1..])));
        assert!(refused(&|| rope(isa, &pool, &x, 3, 16, &cos, &sin)));
        assert!(refused(&|| rope(isa, &pool, &x, 0, 16, &cos, &sin)));
        assert!(refused(&|| rope(isa, &pool, &x, 4, 3, &cos, &sin)), "heads of three, of which four are rotated");
        assert!(refused(&|| rope(isa, &pool, &x, 4, 5, &cos, &sin)), "a row that is no whole heads");
    }
}
