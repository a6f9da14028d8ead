//! Where prompts are stored, as `--prompts` says it: a folder, or an address in a bucket.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, path::Path as Key,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use url::Url;

/// One request to a bucket, with its answer, takes at most this long.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// After an error that may pass, a request is sent again so often, and no longer than [`RETRY_TIMEOUT`] after the first.
const MAX_RETRIES: usize = 3;
const RETRY_TIMEOUT: Duration = Duration::from_secs(10);

/// The place of the prompts.
#[derive(Debug, Clone)]
pub enum PromptLocation {
    /// The folder described in README "Files under --prompts".
    Folder(PathBuf),
    /// The same files as objects.
    Bucket(Bucket),
}

/// An address in a bucket: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`. The key and the endpoint
/// come from the environment, under the names that the providers' own tools use.
#[derive(Clone)]
pub struct Bucket {
    pub url: String,
    pub objects: Arc<dyn ObjectStore>,
    pub prefix: Key,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What reaches the bucket knows its keys.
        f.debug_tuple("Bucket").field(&self.url).finish()
    }
}

impl fmt::Display for PromptLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(root) => root.display().fmt(f),
            Self::Bucket(bucket) => f.write_str(&bucket.url),
        }
    }
}

impl From<PathBuf> for PromptLocation {
    fn from(root: PathBuf) -> Self {
        Self::Folder(root)
    }
}

impl FromStr for PromptLocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once("://") {
            Some(_) => Bucket::open(text).map(Self::Bucket),
            None if text.is_empty() => Err("found nothing, expected a folder or the address of a bucket".to_owned()),
            None => Ok(Self::Folder(text.into())),
        }
    }
}

impl<'de> Deserialize<'de> for PromptLocation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for PromptLocation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Bucket {
    /// Reads an address and the environment. Nothing is sent yet.
    fn open(text: &str) -> Result<Self, String> {
        let expected = "expected a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX";
        let url = Url::parse(text).map_err(|e| format!("found {text:?} ({e}), {expected}"))?;
        let known = ["s3", "s3a", "gs", "az", "azure", "abfs", "abfss"].contains(&url.scheme());
        let has_more = url.query().is_some() || url.fragment().is_some() || url.password().is_some();
        if !known || url.host_str().is_none_or(str::is_empty) || has_more {
            return Err(format!("found {text:?}, {expected}"));
        }
        let (scheme, prefix) =
            ObjectStoreScheme::parse(&url).map_err(|e| format!("found {text:?} ({e}), {expected}"))?;
        // One TLS for all: the one that downloads of models use. Whoever is first sets it; it is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let cannot = |e: object_store::Error| format!("cannot use {text}: {e}");
        let objects: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::AmazonS3 => {
                // Tests and machines of one's own have no TLS; who names such an endpoint means it.
                let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
                    .into_iter()
                    .find_map(|name| std::env::var(name).ok());
                let is_plain = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
                let builder = AmazonS3Builder::from_env().with_url(text).with_retry(retries());
                Arc::new(builder.with_client_options(client(is_plain)).build().map_err(cannot)?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder = GoogleCloudStorageBuilder::from_env().with_url(text).with_retry(retries());
                Arc::new(builder.with_client_options(client(false)).build().map_err(cannot)?)
            }
            ObjectStoreScheme::MicrosoftAzure => {
                let builder = MicrosoftAzureBuilder::from_env().with_url(text).with_retry(retries());
                Arc::new(builder.with_client_options(client(false)).build().map_err(cannot)?)
            }
            _ => return Err(format!("found {text:?}, {expected}")),
        };
        Ok(Self { url: text.trim_end_matches('/').to_owned(), objects, prefix })
    }

    /// Objects under a name, for tests.
    #[cfg(test)]
    pub fn of(url: &str, objects: Arc<dyn ObjectStore>) -> Self {
        Self { url: url.to_owned(), objects, prefix: Key::from("prompts") }
    }
}

fn retries() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(2), base: 2.0 };
    RetryConfig { backoff, max_retries: MAX_RETRIES, retry_timeout: RETRY_TIMEOUT }
}

fn client(allow_http: bool) -> ClientOptions {
    let options = ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT);
    options.with_allow_http(allow_http)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_or_the_address_of_a_bucket_and_nothing_else() {
        let parse = |text: &str| text.parse::<PromptLocation>();
        for folder in ["prompts", "/srv/prompts", "./s3", "C:\\prompts"] {
            assert!(matches!(parse(folder), Ok(PromptLocation::Folder(root)) if root.display().to_string() == folder));
        }
        for (bucket, prefix) in [("s3://b/a/prompts", "a/prompts"), ("s3://b", ""), ("gs://b/p/", "p")] {
            match parse(bucket) {
                Ok(PromptLocation::Bucket(found)) => assert_eq!(found.prefix.as_ref(), prefix, "{bucket}"),
                other => panic!("{bucket}: {other:?}"),
            }
        }
        for wrong in ["", "http://b/p", "file:///tmp", "s3://", "s4://b", "s3://b/p?region=x", "s3://k:secret@b/p"] {
            let error = parse(wrong).expect_err(wrong);
            assert!(error.contains("expected"), "{wrong}: {error}");
        }
    }
}
