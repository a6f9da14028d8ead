//! A load on a running server and what came of it: who asks for what and when, a light HTTP client,
//! and the figures.
//!
//! It measures from outside, over HTTP, and knows the server only by its routes.

pub mod client;
pub mod distribution;
pub mod drive;
pub mod load;
pub mod plan;
pub mod report;
pub mod sse;
