//! Softserve: many tuned prompts, one frozen model, one server.
//!
//! The map, in the order a request meets the modules; `ARCHITECTURE.md` has the picture:
//!
//! - [`http`]: the only module that knows the wire
//! - [`registry`]: task names to immutable versions
//! - [`prompt`]: what a task is: learned prompt, template, labels
//! - [`tokenizer`]: text to token ids and back
//! - [`input`]: from the fields of an input to the positions that the model reads
//! - [`sampling`]: the table of sampling parameters
//! - [`engine`]: one thread that owns the device and batches sequences
//! - [`model`]: the decoder, embeddings in and hidden states out
//! - [`kernels`]: norm, rope and attention, differentiable or fast
//! - [`examples`], [`quality`]: examples of a task from files, and how good answers to them are
//! - [`tune`]: learns a prompt by differentiating the forward that serves
//! - [`convert`]: prompts that other programs wrote, read without running anything
//! - [`content`]: what a file is that is not what it should be
//! - [`cli`], [`config`], [`telemetry`]: what the user typed and sees
#![deny(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod config;
pub mod content;
pub mod convert;
pub mod demo;
pub mod engine;
pub mod examples;
pub mod grammar;
pub mod http;
pub mod input;
pub mod kernels;
pub mod model;
pub mod packing;
pub mod prompt;
pub mod quality;
pub mod records;
pub mod registry;
pub mod sampling;
pub mod telemetry;
pub mod tokenizer;
pub mod tune;
