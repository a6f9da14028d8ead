//! The tensors of a GGUF file under the names that Hugging Face gives them, and what llama.cpp's
//! converter (`convert_hf_to_gguf.py`) did to them on the way, undone.

use crate::kernels::{quantized::BlockFormat, weight::Blocks};

/// What has to be done to a tensor to have it as Hugging Face does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    None,
    /// Rows of each of so many heads lie in the order of rotation in adjacent pairs.
    Pairs {
        heads: usize,
    },
    /// Queries, keys and values lie one after another; they belong side by side for each head.
    Fused {
        heads: usize,
    },
    /// It is stored with 1 added.
    PlusOne,
    /// It is stored `[out, in]` and belongs `[in, out]`.
    Transposed,
}

/// The tensors of an architecture: GGUF's names to Hugging Face's, those of a layer without its number.
#[derive(Debug)]
pub struct GgufNames {
    pub top: &'static [(&'static str, &'static str)],
    /// What stands before a layer's number.
    pub prefix: &'static str,
    pub layer: &'static [(&'static str, &'static str)],
    /// Queries and keys were reordered for llama.cpp's rotation.
    pub pairs: bool,
    /// Queries, keys and values in one matrix were reordered.
    pub fused: bool,
    /// Norms are stored with 1 added.
    pub plus_one: bool,
    /// Matrices of the layers were transposed.
    pub transposed: bool,
}

const TOP: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Norms before and after each half of a layer (Gemma 2 and 3), or only after (OLMo 2).
const MORE_NORMS: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Tensors that say how to rotate; they are part of the config.
const ROTATION: [&str; 3] = ["rope_freqs", "rope_factors_long", "rope_factors_short"];

impl GgufNames {
    /// As Llama's, and nothing changed.
    pub const PLAIN: Self = Self {
        top: TOP,
        prefix: "model.layers.",
        layer: LAYER,
        pairs: false,
        fused: false,
        plus_one: false,
        transposed: false,
    };

    /// With more norms in a layer, as Gemma 2 has them.
    pub const MORE_NORMS: Self = Self { layer: MORE_NORMS, ..Self::PLAIN };

    /// A tensor's name with Hugging Face, and what has to be done to it; `None` for those that are no
    /// weights. An unknown name is an error: leaving a tensor out would be another model.
    pub fn translate(
        &self,
        name: &str,
        num_heads: usize,
        num_kv_heads: usize,
    ) -> Result<Option<(String, Change)>, String> {
        let unknown = || format!("the tensor {name} is not one that this architecture is known to have");
        let (stem, suffix) = name.rsplit_once('.').ok_or_else(unknown)?;
        if !["weight", "bias"].contains(&suffix) {
            return Err(unknown());
        }
        let find = |table: &[(&str, &'static str)], stem: &str| table.iter().find(|(n, _)| *n == stem).map(|(_, h)| *h);
        let Some((layer, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            if ROTATION.contains(&stem) {
                return Ok(None);
            }
            let to = find(self.top, stem).ok_or_else(unknown)?;
            return Ok(Some((format!("{to}.{suffix}"), self.norm(stem, suffix))));
        };
        if part == "attn_rot_embd" || ROTATION.contains(&part) {
            return Ok(None);
        }
        let layer: usize = layer.parse().map_err(|_| unknown())?;
        let to = find(self.layer, part).ok_or_else(unknown)?;
        let change = match part {
            "attn_q" if self.pairs => Change::Pairs { heads: num_heads },
            "attn_k" if self.pairs => Change::Pairs { heads: num_kv_heads },
            "attn_qkv" if self.fused => Change::Fused { heads: num_heads },
            _ if self.transposed && suffix == "weight" && !part.ends_with("norm") => Change::Transposed,
            _ => self.norm(part, suffix),
        };
        Ok(Some((format!("{}{layer}.{to}.{suffix}", self.prefix), change)))
    }

    fn norm(&self, part: &str, suffix: &str) -> Change {
        if self.plus_one && suffix == "weight" && part.ends_with("norm") { Change::PlusOne } else { Change::None }
    }
}

impl Change {
    /// The shape with Hugging Face.
    pub fn shape(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Self::Transposed => shape.iter().rev().copied().collect(),
            _ => shape.to_vec(),
        }
    }

    /// The tensor as Hugging Face has it. Rows are moved as they are; only what is changed within a row
    /// becomes f32. The error says which shape does not go with the change.
    pub fn apply(self, blocks: Blocks) -> Result<Blocks, String> {
        match self {
            Self::None => Ok(blocks),
            Self::Pairs { heads } => {
                let size = head_size(&blocks, heads, 2)?;
                reordered(blocks, |row| {
                    let (head, at) = (row / size, row % size);
                    head * size + at % (size / 2) * 2 + at / (size / 2)
                })
            }
            Self::Fused { heads } => {
                let size = head_size(&blocks, 3 * heads, 1)?;
                reordered(blocks, |row| {
                    let (head, part, at) = (row / (3 * size), row / size % 3, row % size);
                    (part * heads + head) * size + at
                })
            }
            Self::PlusOne => {
                let values = blocks.values().map_err(unreadable)?.into_iter().map(|x| x - 1.0);
                Ok(Blocks::from_values(values, blocks.shape))
            }
            Self::Transposed => {
                let &[n, k] = blocks.shape.as_slice() else {
                    return Err(format!("it has the shape {:?}, expected a matrix", blocks.shape));
                };
                let values = blocks.values().map_err(unreadable)?;
                let turned = (0..k).flat_map(|i| values[i..].iter().step_by(k).copied());
                Ok(Blocks::from_values(turned, vec![k, n]))
            }
        }
    }
}

fn unreadable(error: std::io::Error) -> String {
    error.to_string()
}

fn head_size(blocks: &Blocks, heads: usize, multiple: usize) -> Result<usize, String> {
    let rows = blocks.shape[0];
    match rows.checked_div(heads) {
        Some(size) if size * heads == rows && size.is_multiple_of(multiple) => Ok(size),
        _ => Err(format!("it has {rows} rows, which do not make {heads} heads")),
    }
}

/// Row `i` of the result is row `from(i)`.
fn reordered(blocks: Blocks, from: impl Fn(usize) -> usize) -> Result<Blocks, String> {
    // A row of a vector is one value, which may be part of a block.
    let blocks = if blocks.shape.len() == 1 {
        let values = blocks.values().map_err(unreadable)?;
        Blocks::from_values(values.into_iter(), blocks.shape)
    } else {
        blocks
    };
    let rows = blocks.shape[0];
    let stored = blocks.bytes.into_memory().map_err(unreadable)?;
    let size = stored.len() / rows;
    let mut bytes = Vec::with_capacity(stored.len());
    (0..rows).for_each(|row| bytes.extend_from_slice(&stored[from(row) * size..][..size]));
    Ok(Blocks { bytes: bytes.into(), ..blocks })
}

impl Blocks {
    fn from_values(values: impl Iterator<Item = f32>, shape: Vec<usize>) -> Self {
        Self { format: BlockFormat::F32, shape, bytes: values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::family::Family;

    fn of(architecture: &str) -> &'static GgufNames {
        &Family::of_gguf(architecture).unwrap().1.names
    }

    fn name(architecture: &str, tensor: &str) -> (String, Change) {
        of(architecture).translate(tensor, 4, 2).unwrap().unwrap()
    }

    #[test]
    fn names_become_those_of_hugging_face() {
        use Change::*;
        for (architecture, tensor, expected, change) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight", None),
            ("llama", "blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight", Pairs { heads: 4 }),
            ("llama", "blk.3.attn_k.bias", "model.layers.3.self_attn.k_proj.bias", Pairs { heads: 2 }),
            ("llama", "blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", None),
            ("smollm3", "blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", Pairs { heads: 4 }),
            ("qwen2", "blk.11.attn_q.bias", "model.layers.11.self_attn.q_proj.bias", None),
            ("qwen3", "blk.1.attn_q_norm.weight", "model.layers.1.self_attn.q_norm.weight", None),
            ("gemma", "output_norm.weight", "model.norm.weight", PlusOne),
            ("gemma2", "blk.0.ffn_norm.weight", "model.layers.0.pre_feedforward_layernorm.weight", PlusOne),
            ("gemma3", "blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight", PlusOne),
            ("gemma3", "blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", None),
            ("olmo2", "blk.0.post_ffw_norm.weight", "model.layers.0.post_feedforward_layernorm.weight", None),
            ("phi3", "blk.0.ffn_up.weight", "model.layers.0.mlp.gate_up_proj.weight", None),
            ("gpt2", "blk.0.attn_qkv.weight", "transformer.h.0.attn.c_attn.weight", Transposed),
            ("gpt2", "blk.0.attn_qkv.bias", "transformer.h.0.attn.c_attn.bias", None),
            ("gpt2", "blk.0.attn_norm.weight", "transformer.h.0.ln_1.weight", None),
            ("gptneox", "output.weight", "embed_out.weight", None),
            ("gptneox", "blk.0.attn_qkv.bias", "gpt_neox.layers.0.attention.query_key_value.bias", Fused { heads: 4 }),
            ("bloom", "token_embd_norm.bias", "transformer.word_embeddings_layernorm.bias", None),
        ] {
            assert_eq!(name(architecture, tensor), (expected.to_owned(), change), "{architecture} {tensor}");
        }
    }

    #[test]
    fn a_tensor_that_is_not_known_is_an_error_and_one_that_is_no_weight_is_left_out() {
        let llama = of("llama");
        assert_eq!(llama.translate("rope_freqs.weight", 4, 2), Ok(None));
        for unknown in ["blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "attn", "blk.0.attn_q.scale", "v.weight"] {
            assert!(llama.translate(unknown, 4, 2).unwrap_err().contains(unknown));
        }
    }

    /// The rows 0, 1, … of `k` equal values.
    fn rows(n: usize, k: usize) -> Blocks {
        Blocks::from_values((0..n * k).map(|i| (i / k) as f32), vec![n, k])
    }

    fn first_column(blocks: &Blocks) -> Vec<f32> {
        blocks.values().unwrap().into_iter().step_by(blocks.shape[1]).collect()
    }

    #[test]
    fn what_the_converter_did_is_undone() {
        // llama.cpp: w.reshape(heads, 2, size / 2, k).swapaxes(1, 2).reshape(n, k)
        let pairs = Change::Pairs { heads: 2 }.apply(rows(12, 3)).unwrap();
        assert_eq!(first_column(&pairs), [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.]);
        // llama.cpp: rows of q of all heads, then of k, then of v.
        let fused = Change::Fused { heads: 2 }.apply(rows(12, 3)).unwrap();
        assert_eq!(first_column(&fused), [0., 1., 4., 5., 8., 9., 2., 3., 6., 7., 10., 11.]);
        let bias = Blocks::from_values((0..4).map(|i| i as f32), vec![4]);
        assert_eq!(Change::Pairs { heads: 1 }.apply(bias.clone()).unwrap().values().unwrap(), [0., 2., 1., 3.]);
        assert_eq!(Change::PlusOne.apply(bias).unwrap().values().unwrap(), [-1., 0., 1., 2.]);
        let turned = Change::Transposed.apply(rows(2, 3)).unwrap();
        assert_eq!(
            (turned.shape.as_slice(), turned.values().unwrap()),
            ([3, 2].as_slice(), vec![0., 1., 0., 1., 0., 1.])
        );
        assert!(Change::Pairs { heads: 5 }.apply(rows(12, 3)).unwrap_err().contains("12 rows"));
        assert!(Change::Pairs { heads: 0 }.apply(rows(12, 3)).is_err());
    }
}
