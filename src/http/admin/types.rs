//! What the admin routes take and answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::gate::{GateMetric, GateReport};
use crate::{
    engine::request::CacheNamespace,
    http::{App, types::VersionMeta},
    prompt::TaskName,
    registry::{TaskEntry, UnreadableVersion, VersionEntry},
};

/// How to treat an upload.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct UploadQuery {
    /// Whether the version answers from now on; `false` only stores it.
    #[serde(default = "yes")]
    #[param(default = true)]
    pub activate: bool,
    /// Activate the version only if it does not score worse than the active one on the upload's `eval.jsonl`.
    #[serde(default)]
    #[param(inline)]
    pub gate: Option<GateMetric>,
    /// Accept a prompt whose `task.json` names another base model by its fingerprint, such as one that was tuned on the same
    /// model in another precision.
    #[serde(default)]
    #[param(default = false)]
    pub allow_other_base: bool,
}

fn yes() -> bool {
    true
}

/// What an upload did.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "sentiment", "created": true, "active": true, "generation": 1,
    "version": "3f9a0c1b2d4e", "kind": "embeddings", "peft_type": "PROMPT_TUNING", "virtual_tokens": 20,
    "template": "{{ input }}", "labels": {}, "defaults": {"max_tokens": 4}, "limits": {},
    "metrics": {"accuracy": 0.94}, "warnings": []}))]
pub struct Uploaded {
    #[schema(value_type = String, example = "sentiment")]
    pub task: TaskName,
    /// False when the very same version was there before.
    pub created: bool,
    pub active: bool,
    /// Goes up by one with each change of the active version.
    #[schema(example = 1)]
    pub generation: u64,
    /// What a gate found; `active` is false if the version did not pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateReport>,
    #[serde(flatten)]
    pub meta: VersionMeta,
}

/// A multipart upload: the files of a PEFT directory.
#[derive(Debug, ToSchema)]
#[allow(dead_code, reason = "it is there for its schema")]
pub struct UploadForm {
    #[schema(rename = "adapter_config.json", content_media_type = "application/json")]
    #[serde(rename = "adapter_config.json")]
    adapter_config: String,
    #[serde(rename = "adapter_model.safetensors")]
    #[schema(format = Binary)]
    adapter_model: String,
    #[serde(rename = "task.json")]
    task: Option<String>,
    /// Examples for `gate`; they are not stored.
    #[serde(rename = "eval.jsonl")]
    eval: Option<String>,
    /// The picture of the tuning run; it does not count for the version.
    #[serde(rename = "loss.svg")]
    #[schema(content_media_type = "image/svg+xml")]
    curve: Option<String>,
}

/// The bytes of a file.
#[derive(Debug, ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(dead_code, reason = "it is there for its schema")]
pub struct Binary(Vec<u8>);

/// Which versions answer from now on: one, or several with their shares of the requests.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"version": "3f9a0c1b2d4e"}))]
pub struct ActiveVersions {
    /// The only one.
    pub version: Option<String>,
    /// Several by their ids, each with its weight: `{"3f9a0c1b2d4e": 0.9, "77aa0c1b2d4e": 0.1}`.
    pub versions: Option<BTreeMap<String, f64>>,
}

/// The version that an alias names from now on.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"version": "3f9a0c1b2d4e"}))]
pub struct AliasedVersion {
    pub version: String,
}

/// A task with all its versions.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"task": "sentiment", "generation": 1, "active": "3f9a0c1b2d4e", "versions": [{
    "version": "3f9a0c1b2d4e", "kind": "embeddings", "peft_type": "PROMPT_TUNING", "virtual_tokens": 20,
    "template": "{{ input }}", "labels": {}, "defaults": {"max_tokens": 4}, "limits": {},
    "metrics": {"accuracy": 0.94}, "warnings": [],
    "active": true, "stored_at": 1_795_414_325, "residency": {"loaded": true, "device": "cpu", "bytes": 10240, "cache": "resident"}}]}))]
pub struct AdminTask {
    #[schema(value_type = String, example = "sentiment")]
    pub task: TaskName,
    /// Goes up by one with each change of the active version; the ETag is made of it.
    pub generation: u64,
    /// The version that answers, if one does.
    #[schema(example = "3f9a0c1b2d4e")]
    pub active: Option<String>,
    /// Several versions with their shares of the requests that name no version, if these are split.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub shares: BTreeMap<String, f64>,
    /// Names for versions, with their ids: `task@alias` is such a version.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, String>,
    /// The versions that were active before, the last one first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<String>,
    pub versions: Vec<AdminVersion>,
    /// Versions whose files cannot be read now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<Unreadable>,
}

/// Tasks with all their versions.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdminTaskList {
    pub tasks: Vec<AdminTask>,
    /// The last task of this page if there are more: the next page is the one after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub next: Option<TaskName>,
}

/// A version that is stored and cannot be read now.
#[derive(Debug, Serialize, ToSchema)]
pub struct Unreadable {
    #[schema(example = "3f9a0c1b2d4e")]
    pub version: String,
    /// What is wrong with its files.
    pub reason: String,
}

/// One version.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"version": "3f9a0c1b2d4e", "kind": "embeddings", "peft_type": "PROMPT_TUNING", "virtual_tokens": 20,
    "template": "{{ input }}", "labels": {}, "defaults": {"max_tokens": 4}, "limits": {},
    "metrics": {"accuracy": 0.94}, "warnings": [],
    "active": true, "stored_at": 1_795_414_325, "residency": {"loaded": true, "device": "cpu", "bytes": 10240, "cache": "resident"}}))]
pub struct AdminVersion {
    #[serde(flatten)]
    pub meta: VersionMeta,
    pub active: bool,
    /// Seconds since 1970 when it was stored.
    pub stored_at: u64,
    pub residency: Residency,
}

/// Where a version's tensors are.
#[derive(Debug, Serialize, ToSchema)]
pub struct Residency {
    /// Whether they are in memory; otherwise the next request reads them from the store.
    pub loaded: bool,
    /// The device of the model, which computes with them.
    #[schema(example = "cpu")]
    pub device: String,
    /// How many bytes they are.
    pub bytes: usize,
    /// Whether the keys and values of all its virtual tokens are in the cache.
    pub cache: CacheState,
}

/// Where the keys and values of a learned prompt are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheState {
    /// In the cache: a request computes its text only.
    Resident,
    /// Not in the cache, or not all of them: the next request computes them.
    Cold,
}

impl AdminTask {
    /// A task as the registry has it, and where its versions are.
    pub(super) fn new(app: &App, entry: TaskEntry) -> Self {
        let unreadable = |UnreadableVersion { version, reason }| Unreadable { version, reason };
        Self {
            task: entry.task,
            generation: entry.generation,
            active: entry.active,
            shares: entry.shares.into_iter().collect(),
            aliases: entry.aliases,
            previous: entry.previous,
            versions: entry.versions.into_iter().map(|version| AdminVersion::new(app, version)).collect(),
            unreadable: entry.unreadable.into_iter().map(unreadable).collect(),
        }
    }
}

impl AdminVersion {
    /// A version as the registry has it, and where it is.
    pub(super) fn new(app: &App, entry: VersionEntry) -> Self {
        let device = match app.model.device {
            candle_core::Device::Cpu => "cpu",
            candle_core::Device::Cuda(_) => "cuda",
            candle_core::Device::Metal(_) => "metal",
        };
        Self {
            meta: (&*entry.version).into(),
            active: entry.active,
            stored_at: entry.stored_at.duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs()),
            residency: Residency {
                loaded: entry.loaded,
                device: device.to_owned(),
                bytes: entry.version.prompt.num_bytes(),
                cache: match app.engine.is_cached(CacheNamespace(entry.version.digest.0)) {
                    true => CacheState::Resident,
                    false => CacheState::Cold,
                },
            },
        }
    }
}
