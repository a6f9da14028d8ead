//! What is on the wire, converted by hand to and from the types of the other layers. What only the
//! admin routes have is in [`super::admin`].

mod answer;
mod request;
mod score;
mod task;
mod tokens;

pub use answer::{
    BatchResponse, BatchResult, ChoiceInfo, Events, Finish, GenerateResponse, OneOrSeveral, StreamEvent, TokenInfo,
    TokenLogprob, Usage,
};
pub use request::{BatchItem, BatchRequest, GenerateRequest, InputSchema, stop_texts};
pub use score::{
    ClassifyRequest, ClassifyResponse, LabelProbability, ScoreRequest, ScoreResponse, ScoredText, ScoredToken,
};
pub use task::{TaskInfo, TaskLimits, TaskList, VersionMeta};
pub use tokens::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
