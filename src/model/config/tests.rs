//! `config.json` in its many forms, and what is refused.

use super::*;

const LLAMA_V5: &str = r#"{"model_type":"llama","vocab_size":384,"hidden_size":64,"intermediate_size":128,
    "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,
    "max_position_embeddings":512,"eos_token_id":[1,7],"attention_bias":true,
    "rope_parameters":{"rope_theta":500000.0,"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
    "high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#;

/// The config above with some keys changed; a null removes one.
fn with(change: &str) -> Result<ModelConfig, String> {
    let mut config: serde_json::Value = serde_json::from_str(LLAMA_V5).unwrap();
    let change: serde_json::Value = serde_json::from_str(change).unwrap();
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    ModelConfig::from_json(config.to_string().as_bytes())
}

fn windows(change: &str) -> Vec<Option<usize>> {
    with(change).unwrap().layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn a_v5_config_and_its_v4_form_mean_the_same() {
    let v5 = with("{}").unwrap();
    assert_eq!(v5.head_dim, 32);
    assert_eq!(v5.eos_token_ids, [1, 7]);
    assert!(v5.qkv_bias && v5.attention_output_bias && !v5.mlp_bias);
    let v4 = with(
        r#"{"rope_parameters":null,"rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,
        "low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#,
    );
    assert_eq!(v4.unwrap(), v5);
}

#[test]
fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
    let scaled = Rope { dims: 128, ..with("{}").unwrap().ropes[0].clone() };
    let plain = Rope { scaling: RopeScaling::None, ..scaled.clone() };
    let (scaled, plain) = (scaled.inverse_frequencies(), plain.inverse_frequencies());
    assert_eq!(scaled[0], plain[0]);
    assert!((scaled[63] * 8.0 - plain[63]).abs() < 1e-12);
    assert!(scaled.iter().zip(&plain).all(|(s, p)| *s <= *p && *s >= p / 8.0));
}

#[test]
fn windows_are_those_that_a_family_gives_its_layers() {
    let layers = r#""num_hidden_layers":4,"rope_parameters":null"#;
    let of = |family: &str, rest: &str| windows(&format!(r#"{{"model_type":"{family}",{layers}{rest}}}"#));
    assert_eq!(of("llama", r#","sliding_window":8"#), [None; 4]);
    assert_eq!(of("mistral", ""), [Some(4096); 4]);
    assert_eq!(of("mistral", r#","sliding_window":null"#), [None; 4]);
    assert_eq!(of("phi3", ""), [None; 4]);
    assert_eq!(of("qwen2", r#","sliding_window":8,"max_window_layers":2"#), [None; 4]);
    let late = r#","use_sliding_window":true,"sliding_window":8,"max_window_layers":2"#;
    assert_eq!(of("qwen2", late), [None, None, Some(8), Some(8)]);
    let named =
        r#","sliding_window":8,"layer_types":["full_attention","sliding_attention","full_attention","full_attention"]"#;
    assert_eq!(of("gemma2", named), [None, Some(8), None, None]);
    assert_eq!(of("gemma2", r#","sliding_window":8"#), [Some(8), None, Some(8), None]);
    assert_eq!(
        of("gemma3_text", r#","sliding_window":8,"sliding_window_pattern":3"#),
        [Some(8), Some(8), None, Some(8)]
    );
    let without_rope = r#","sliding_window":8,"use_sliding_window":true"#;
    assert_eq!(of("smollm3", without_rope), [None, None, None, Some(8)]);
}

#[test]
fn gemma3_has_a_second_theta_for_layers_with_a_window() {
    let nested = with(
        r#"{"model_type":"gemma3_text","num_hidden_layers":3,"sliding_window_pattern":2,"rope_parameters":{
        "full_attention":{"rope_type":"linear","factor":8.0,"rope_theta":1e6},
        "sliding_attention":{"rope_type":"default","rope_theta":1e4}}}"#,
    );
    let nested = nested.unwrap();
    assert_eq!(nested.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(), [Some(1), Some(0), Some(1)]);
    assert_eq!((nested.ropes[0].theta, nested.ropes[1].theta), (1e6, 1e4));
    assert_eq!(nested.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(nested.ropes[1].scaling, RopeScaling::None);
    let v4 = with(
        r#"{"model_type":"gemma3_text","num_hidden_layers":3,"sliding_window_pattern":2,"rope_parameters":null,
        "rope_scaling":{"rope_type":"linear","factor":8.0}}"#,
    );
    assert_eq!(v4.unwrap(), nested);
}

#[test]
fn defaults_that_files_leave_out_are_a_familys_own() {
    let gemma = with(r#"{"model_type":"gemma","rope_parameters":null,"hidden_act":"gelu"}"#).unwrap();
    assert!(gemma.tie_word_embeddings && gemma.activation == Activation::GeluTanh);
    assert_eq!(gemma.embedding_scale, Some(8.0));
    let gemma2 = with(r#"{"model_type":"gemma2","rope_parameters":null}"#).unwrap();
    assert_eq!((gemma2.attention_softcap, gemma2.final_softcap), (Some(50.0), Some(30.0)));
    assert_eq!(gemma2.layers[0].scale, 1.0 / 16.0);
    let none = with(r#"{"model_type":"gemma2","rope_parameters":null,"attn_logit_softcapping":null}"#).unwrap();
    assert_eq!((none.attention_softcap, none.final_softcap), (None, Some(30.0)));
    let vision = r#"{"model_type":"gemma3","eos_token_id":[1,106],"text_config":{"hidden_size":64,"sliding_window":8,
        "intermediate_size":128,"num_hidden_layers":6,"model_type":"gemma3_text"}}"#;
    let vision = ModelConfig::from_json(vision.as_bytes()).unwrap();
    assert_eq!((vision.num_heads, vision.num_kv_heads, vision.head_dim), (8, 4, 256));
    assert_eq!(vision.eos_token_ids, [1, 106]);
    let smol = with(r#"{"model_type":"smollm3","num_hidden_layers":4,"rope_parameters":null}"#).unwrap();
    assert_eq!(smol.ropes[0].theta, 2e6);
    assert_eq!(smol.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(), [Some(0), Some(0), Some(0), None]);
}

#[test]
fn gpt2_and_bloom_have_names_of_their_own() {
    let gpt2 = r#"{"model_type":"gpt2","vocab_size":9,"n_embd":16,"n_layer":2,"n_head":4,"n_positions":64,
        "scale_attn_by_inverse_layer_idx":true}"#;
    let gpt2 = ModelConfig::from_json(gpt2.as_bytes()).unwrap();
    assert_eq!((gpt2.intermediate_size, gpt2.head_dim, gpt2.context_length), (64, 4, 64));
    assert_eq!((gpt2.layers[0].scale, gpt2.layers[1].scale, gpt2.layers[0].rope), (0.5, 0.25, None));
    let bloom = r#"{"model_type":"bloom","vocab_size":9,"n_embed":16,"n_layer":2,"num_attention_heads":4}"#;
    let bloom = ModelConfig::from_json(bloom.as_bytes()).unwrap();
    assert!(bloom.alibi && bloom.embedding_norm && bloom.tie_word_embeddings);
    assert_eq!(bloom.context_length, 2048);
}

#[test]
fn longrope_ends_where_its_factors_change() {
    let long = |factors: &str| {
        with(&format!(
            r#"{{"model_type":"phi3","head_dim":null,"rope_parameters":null,"max_position_embeddings":512,
            "partial_rotary_factor":0.5,"original_max_position_embeddings":128,
            "rope_scaling":{{"type":"su","short_factor":[1.0,1.1,1.2,1.3],"long_factor":{factors}}}}}"#
        ))
        .unwrap()
    };
    let changing = long("[1.0,2.0,3.0,4.0]");
    assert_eq!((changing.context_length, changing.ropes[0].dims), (128, 8));
    // sqrt(1 + ln 4 / ln 128)
    assert!((changing.ropes[0].attention_factor - 1.133_893_4).abs() < 1e-6, "{}", changing.ropes[0].attention_factor);
    assert_eq!(long("[1.0,1.1,1.2,1.3]").context_length, 512);
}

#[test]
fn what_is_not_supported_is_named() {
    for (change, named) in [
        (r#"{"model_type":"mamba"}"#, "mamba"),
        (r#"{"model_type":"mamba"}"#, "bloom"),
        (r#"{"model_type":null}"#, "model_type is missing"),
        (r#"{"hidden_act":"mish"}"#, r#"hidden_act "mish""#),
        (r#"{"hidden_act":3}"#, "hidden_act is 3"),
        (r#"{"rope_parameters":{"rope_type":"mrope","factor":4.0}}"#, "mrope"),
        (r#"{"rope_parameters":{"rope_type":"linear"}}"#, "rope factor is missing"),
        (r#"{"rope_parameters":{"rope_type":"linear","factor":-1.0}}"#, "rope factor -1"),
        (r#"{"rope_parameters":{"rope_type":"llama3","factor":4.0}}"#, "low_freq_factor"),
        (
            r#"{"rope_parameters":{"rope_type":"longrope","short_factor":[1.0],"long_factor":[1.0]}}"#,
            "short_factor has 1",
        ),
        (r#"{"rope_parameters":{"full_attention":{"rope_type":"default"}}}"#, "by the type of a layer"),
        (r#"{"rope_parameters":7}"#, "rope_parameters is 7"),
        (r#"{"partial_rotary_factor":0.5}"#, "partial_rotary_factor 0.5"),
        (r#"{"num_key_value_heads":3}"#, "num_key_value_heads 3"),
        (r#"{"vocab_size":0}"#, "vocab_size is 0"),
        (r#"{"vocab_size":"many"}"#, "vocab_size is \"many\""),
        (r#"{"num_hidden_layers":100000}"#, "num_hidden_layers is 100000"),
        (r#"{"quantization_config":{}}"#, "quantization_config"),
        (r#"{"head_dim":15}"#, "head_dim 15"),
        (r#"{"rms_norm_eps":2.0}"#, "rms_norm_eps 2"),
        (r#"{"model_type":"mistral","sliding_window":0}"#, "sliding_window is 0"),
        (r#"{"model_type":"qwen2","layer_types":["sliding_attention","full_attention"]}"#, "no sliding_window is set"),
        (r#"{"model_type":"qwen2","layer_types":["full_attention"]}"#, "layer_types has 1"),
        (r#"{"model_type":"qwen2","layer_types":["linear_attention","full_attention"]}"#, "linear_attention"),
        (r#"{"model_type":"gemma2","use_bidirectional_attention":true}"#, "use_bidirectional_attention true"),
        (r#"{"model_type":"gemma2","final_logit_softcapping":-1.0}"#, "final_logit_softcapping -1"),
        (r#"{"model_type":"gemma3"}"#, "text_config is missing"),
        (r#"{"model_type":"smollm3","no_rope_layers":[1]}"#, "no_rope_layers has 1"),
        (r#"{"model_type":"gpt2","add_cross_attention":true}"#, "add_cross_attention true"),
        (r#"{"model_type":"gpt_neox","rotary_pct":0.1,"rope_parameters":null}"#, "rotary_pct 0.1"),
        (r#"{"model_type":"opt"}"#, "ffn_dim is missing"),
        (r#"{"model_type":"opt","ffn_dim":9,"word_embed_proj_dim":32}"#, "word_embed_proj_dim 32"),
        (
            r#"{"model_type":"opt","ffn_dim":9,"layer_norm_elementwise_affine":false}"#,
            "layer_norm_elementwise_affine false",
        ),
        (r#"{"model_type":"bloom","apply_residual_connection_post_layernorm":true}"#, "apply_residual_connection"),
    ] {
        let error = with(change).unwrap_err();
        assert!(error.contains(named), "{change}: {error}");
    }
    assert!(ModelConfig::from_json(b"{").unwrap_err().contains("not understood"));
    assert!(ModelConfig::from_json(b"[]").unwrap_err().contains("not an object"));
}

const T5: &str = r#"{"model_type":"t5","vocab_size":384,"d_model":64,"d_ff":128,"d_kv":24,"num_layers":3,"num_heads":4,
    "decoder_start_token_id":0,"eos_token_id":1}"#;

fn t5(change: &str) -> Result<ModelConfig, String> {
    let mut config: serde_json::Value = serde_json::from_str(T5).unwrap();
    let change: serde_json::Value = serde_json::from_str(change).unwrap();
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    ModelConfig::from_json(config.to_string().as_bytes())
}

#[test]
fn an_encoder_decoder_config_says_both_stacks_and_each_version_of_t5_is_told_from_the_others() {
    let first = t5("{}").unwrap();
    assert_eq!((first.num_layers, first.head_dim, first.intermediate_size, first.context_length), (3, 24, 128, 2048));
    assert_eq!(first.relative_bias, Some(RelativeBias { buckets: 32, max_distance: 128 }));
    assert_eq!((first.activation, first.gated_mlp, first.output_scale), (Activation::Relu, false, Some(0.125)));
    let encoder = t5(r#"{"num_decoder_layers":2}"#).unwrap().of_encoder().unwrap();
    assert_eq!((encoder.num_layers, encoder.layers.len(), encoder.causal), (3, 3, false));
    assert_eq!(encoder.of_encoder(), None);

    let second = r#"{"feed_forward_proj":"gated-gelu","tie_word_embeddings":false,"n_positions":512}"#;
    let second = t5(second).unwrap();
    assert_eq!((second.activation, second.gated_mlp, second.output_scale), (Activation::GeluTanh, true, None));
    // Where transformers v5 has saved it.
    assert_eq!(t5(r#"{"tie_word_embeddings":true,"scale_decoder_outputs":false}"#).unwrap().output_scale, None);
    let multilingual = t5(r#"{"model_type":"mt5"}"#).unwrap();
    assert_eq!((multilingual.gated_mlp, multilingual.output_scale), (true, None));

    for (change, words) in [
        (r#"{"relative_attention_num_buckets":3}"#, "relative_attention_num_buckets 3"),
        (r#"{"relative_attention_max_distance":16}"#, "more than half"),
        (r#"{"decoder_start_token_id":384}"#, "decoder_start_token_id is 384"),
        (r#"{"is_encoder_decoder":false}"#, "is_encoder_decoder"),
        (r#"{"feed_forward_proj":"gated-tanh"}"#, "tanh"),
        (r#"{"num_layers":null}"#, "num_layers is missing"),
    ] {
        let error = t5(change).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
}
