//! What `config.json` says of an encoder, and of a decoder that follows one (T5, mT5).

use super::{
    EncoderConfig, LayerConfig, ModelConfig, RelativeBias,
    reader::{MAX_LAYERS, Reader},
};
use crate::model::family::config_spec::EncoderSpec;

impl ModelConfig {
    /// The shape of the encoder's layers, if there is one.
    pub fn of_encoder(&self) -> Option<Self> {
        let encoder = self.encoder.as_ref()?;
        let layer = LayerConfig { window: None, rope: None, scale: self.layers.first()?.scale };
        Some(Self {
            num_layers: encoder.num_layers,
            layers: vec![layer; encoder.num_layers],
            causal: false,
            encoder: None,
            ..self.clone()
        })
    }
}

impl Reader<'_> {
    /// Adds what the families with an encoder have.
    pub(super) fn encoder_decoder(&self, config: &mut ModelConfig, spec: EncoderSpec) -> Result<(), String> {
        let keys = self.keys;
        let num_layers = self.needed(&["num_layers"])?;
        if num_layers > MAX_LAYERS {
            return Err(format!("num_layers is {num_layers}, expected 1 to {MAX_LAYERS}"));
        }
        if !keys.flag("is_encoder_decoder", true)? {
            return Err("is_encoder_decoder false is not supported: an encoder alone makes no text".into());
        }
        let buckets = keys.size(&["relative_attention_num_buckets"])?.unwrap_or(32);
        let max_distance = keys.size(&["relative_attention_max_distance"])?.unwrap_or(128);
        if buckets < 4 || !buckets.is_multiple_of(4) || max_distance <= buckets / 2 || max_distance > 1 << 12 {
            return Err(format!(
                "relative_attention_num_buckets {buckets} and relative_attention_max_distance {max_distance} are not \
                 supported; expected a multiple of 4, and a distance of more than half of it"
            ));
        }
        let start_token = keys.get("decoder_start_token_id")?.or(keys.get("pad_token_id")?).unwrap_or(0);
        if start_token as usize >= config.vocab_size {
            return Err(format!(
                "decoder_start_token_id is {start_token}, expected a token of the vocabulary of {}",
                config.vocab_size
            ));
        }
        config.context_length = config.context_length.max(spec.context_length);
        let proj: Option<String> = keys.get("feed_forward_proj")?;
        config.gated_mlp = proj.as_deref().unwrap_or(self.spec().activation).starts_with("gated-");
        config.relative_bias = Some(RelativeBias { buckets, max_distance });
        config.encoder = Some(EncoderConfig { num_layers, start_token });
        // T5 1.0 scales; files before transformers v5 say so by tying, whatever their weights are.
        let scales = match keys.get("scale_decoder_outputs")? {
            Some(scales) => scales,
            None => keys.flag("tie_word_embeddings", true)?,
        };
        config.output_scale = (spec.scales_output && scales).then(|| (config.hidden_size as f64).powf(-0.5));
        config.tie_word_embeddings = true;
        if config.eos_token_ids.is_empty() {
            config.eos_token_ids = vec![1];
        }
        Ok(())
    }
}
