//! Everything that is tested from outside, in one crate so that it links once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod backends;
mod bench;
mod bounds;
mod candle_models;
mod convert;
mod demo;
mod encoder_decoder;
mod engine;
mod families;
mod fixtures;
mod gguf;
mod hot_swap;
mod http;
#[cfg(feature = "hub")]
mod hub;
mod inspect;
mod model;
mod openapi;
mod parsers;
mod passes;
mod peft;
mod problems;
mod process;
mod prompt_types;
mod readme;
mod sharing;
mod soak;
mod support;
mod tidy;
mod tiny_model;
mod tune;
mod tune_encoder_decoder;
mod tune_job;
mod tune_types;
