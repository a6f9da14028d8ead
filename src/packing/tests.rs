//! Packing without a model: who reads what, and where the bounds lie.

use super::{
    InputToken::{Virtual, Vocab},
    *,
};

const DECODER: Packing = Packing { start_token: None, max_encoder: 20, max_decoder: 20 };
const ENCODER_DECODER: Packing = Packing { start_token: Some(9), max_encoder: 20, max_decoder: 10 };

fn pack(packing: Packing, prompt: PromptShape, ids: &[u32]) -> Result<PackedInput, PackingError> {
    packing.pack(prompt, prompt.followed_by(ids))
}

#[test]
fn a_decoder_reads_the_learned_prompt_and_the_text() {
    for prompt in [PromptShape::Embeddings(2), PromptShape::KeyValues(2)] {
        let packed = pack(DECODER, prompt, &[5, 6]).unwrap();
        let decoder = vec![Virtual(0), Virtual(1), Vocab(5), Vocab(6)];
        assert_eq!(packed, PackedInput { encoder: None, decoder });
    }
}

#[test]
fn an_encoder_reads_embeddings_and_text_and_the_decoder_reads_past_key_values_and_its_start_token() {
    let packed = pack(ENCODER_DECODER, PromptShape::Embeddings(1), &[5]).unwrap();
    assert_eq!(packed, PackedInput { encoder: Some(vec![Virtual(0), Vocab(5)]), decoder: vec![Vocab(9)] });
    let packed = pack(ENCODER_DECODER, PromptShape::KeyValues(1), &[5]).unwrap();
    assert_eq!(packed, PackedInput { encoder: Some(vec![Vocab(5)]), decoder: vec![Virtual(0), Vocab(9)] });
    assert_eq!(leading_virtual_tokens(&packed.decoder), 1);
}

#[test]
fn an_input_that_predicts_nothing_is_refused() {
    for packing in [DECODER, ENCODER_DECODER] {
        assert_eq!(pack(packing, PromptShape::None, &[]), Err(PackingError::Empty));
        assert_eq!(pack(packing, PromptShape::KeyValues(2), &[]), Err(PackingError::NoText));
        assert!(pack(packing, PromptShape::Embeddings(2), &[]).is_ok());
    }
}

#[test]
fn the_row_before_each_token_of_a_continuation_predicts_it_and_the_last_token_is_not_read() {
    let mut packed = pack(DECODER, PromptShape::Embeddings(2), &[5]).unwrap();
    assert_eq!(packed.continued_by(&[6, 7, 8]), 2..5);
    assert_eq!(packed.decoder, [Virtual(0), Virtual(1), Vocab(5), Vocab(6), Vocab(7)]);
    let mut packed = pack(ENCODER_DECODER, PromptShape::Embeddings(2), &[5]).unwrap();
    assert_eq!(packed.continued_by(&[6]), 0..1);
    assert_eq!(packed.decoder, [Vocab(9)]);
}

/// The longest text that [`Packing::check`] takes is the budget's, for every kind of prompt and model.
#[test]
fn the_budget_and_the_check_of_lengths_agree() {
    for packing in [DECODER, ENCODER_DECODER, DECODER.bounded(8, 8), ENCODER_DECODER.bounded(7, 6)] {
        for prompt in [PromptShape::None, PromptShape::Embeddings(3), PromptShape::KeyValues(3)] {
            let budget = packing.budget(prompt);
            for length in 1..=25 {
                let packed = pack(packing, prompt, &vec![5; length]).unwrap();
                let fits = packing.check(&packed).is_ok();
                assert_eq!(fits, length <= budget.input, "{packing:?}, {prompt:?}, {length} tokens");
                assert_eq!(fits, budget.output_after(length) > 0);
                assert_eq!(fits, budget.check(length, 1).is_ok());
                if fits {
                    // As many new tokens as the decoder has positions after what it reads.
                    let output = packing.max_decoder() - packed.decoder.len();
                    assert_eq!(budget.output_after(length), output);
                    assert!(budget.check(length, output).is_ok());
                    assert!(budget.check(length, output + 1).is_err());
                }
            }
        }
    }
}
