//! What is particular to each layer: whether it rotates queries and keys, the window that it looks
//! through, and the scale of its scores.

use super::{LayerConfig, reader::Reader};
use crate::model::family::config_spec::{ScoreScale, Windows};

impl Reader<'_> {
    /// All of them, `[num_layers]`; `ropes` is how many kinds of rotation there are.
    pub(super) fn layers(&self, num_layers: usize, head_dim: usize, ropes: usize) -> Result<Vec<LayerConfig>, String> {
        let keys = self.keys;
        let of_heads = (head_dim as f64).powf(-0.5);
        let (scale, by_depth) = match self.spec().score_scale {
            ScoreScale::HeadDim => (of_heads, false),
            ScoreScale::QueryScalar => (keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5), false),
            ScoreScale::One => (1.0, false),
            ScoreScale::Keys { scaled, by_depth } => {
                (if keys.flag(scaled, true)? { of_heads } else { 1.0 }, keys.flag(by_depth, false)?)
            }
        };
        let rotated = self.rotated(num_layers)?;
        let windows = self.windows(num_layers, &rotated)?;
        let layer = |i: usize| LayerConfig {
            window: windows[i],
            rope: (ropes > 0 && rotated[i]).then_some(if windows[i].is_some() && ropes > 1 { 1 } else { 0 }),
            scale: if by_depth { scale / (i + 1) as f64 } else { scale },
        };
        Ok((0..num_layers).map(layer).collect())
    }

    /// Which layers rotate their queries and keys, if any do.
    fn rotated(&self, num_layers: usize) -> Result<Vec<bool>, String> {
        if !self.spec().no_rope_layers {
            return Ok(vec![true; num_layers]);
        }
        match self.keys.get::<Vec<u8>>("no_rope_layers")? {
            Some(layers) if layers.len() >= num_layers => Ok(layers.iter().map(|rope| *rope != 0).collect()),
            Some(layers) => Err(format!("no_rope_layers has {} entries, expected {num_layers}", layers.len())),
            None => {
                let interval = self.size(&["no_rope_layer_interval"])?.unwrap_or(4);
                Ok((1..=num_layers).map(|i| i % interval != 0).collect())
            }
        }
    }

    /// The window of each layer.
    fn windows(&self, num_layers: usize, rotated: &[bool]) -> Result<Vec<Option<usize>>, String> {
        let keys = self.keys;
        let default = match self.spec().windows {
            Windows::None => return Ok(vec![None; num_layers]),
            Windows::All(default) => default,
            Windows::WithoutRope => None,
            _ => Some(4096),
        };
        let key = "sliding_window";
        let mut window = if keys.has(key) { keys.size(&[key])? } else { default };
        let optional = matches!(self.spec().windows, Windows::Late | Windows::WithoutRope);
        if optional && !keys.flag("use_sliding_window", false)? {
            window = None;
        }
        let slides: Vec<bool> = match self.spec().windows {
            Windows::All(_) => return Ok(vec![window; num_layers]),
            _ => match keys.get::<Vec<String>>("layer_types")? {
                Some(types) => self.slides(&types, num_layers)?,
                None => self.slides_by_default(num_layers, rotated, window.is_some())?,
            },
        };
        if window.is_none() && slides.contains(&true) {
            return Err("layer_types has sliding_attention, but no sliding_window is set".into());
        }
        Ok(slides.iter().map(|slides| window.filter(|_| *slides)).collect())
    }

    /// Whether each layer of `layer_types` has a window.
    fn slides(&self, types: &[String], num_layers: usize) -> Result<Vec<bool>, String> {
        if types.len() < num_layers {
            return Err(format!("layer_types has {} entries, expected {num_layers}", types.len()));
        }
        let slides = |of: &String| match of.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => Err(format!(
                "layer_types has {other:?}, which is not supported; supported are full_attention, sliding_attention"
            )),
        };
        types[..num_layers].iter().map(slides).collect()
    }

    fn slides_by_default(&self, num_layers: usize, rotated: &[bool], set: bool) -> Result<Vec<bool>, String> {
        let from = self.keys.get::<usize>("max_window_layers")?.unwrap_or(28);
        Ok(match self.spec().windows {
            Windows::Late => (0..num_layers).map(|i| set && i >= from).collect(),
            Windows::WithoutRope => rotated[..num_layers].iter().map(|rotated| set && !rotated).collect(),
            Windows::Pattern(every) => {
                let every = self.size(&["sliding_window_pattern"])?.unwrap_or(every);
                (1..=num_layers).map(|i| i % every != 0).collect()
            }
            Windows::None | Windows::All(_) => vec![set; num_layers],
        })
    }
}
