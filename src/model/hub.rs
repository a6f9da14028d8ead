//! A model by its hub id: downloaded once into the cache that Hugging Face's own tools use.
//!
//! `HF_ENDPOINT`, `HF_HOME` and a stored token are honoured as there. Without a network, what is
//! in the cache is used.

use std::path::PathBuf;

use hf_hub::{
    Repo, RepoType,
    api::sync::{ApiBuilder, ApiRepo},
};

use super::{ModelError, ModelFiles};

/// A text of the form `ORG/NAME` or `ORG/NAME@REVISION`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    repo: String,
    revision: String,
}

impl HubId {
    /// Reads a hub id; `None` if the text has another form.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let safe = |s: &str| {
            !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let (org, name) = repo.split_once('/')?;
        (safe(org) && safe(name) && safe(revision))
            .then(|| Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }

    /// Downloads what is not in the cache yet, with progress bars on a terminal.
    pub fn fetch(&self) -> Result<ModelFiles, ModelError> {
        let progress = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let api = ApiBuilder::from_env()
            .with_progress(progress)
            .with_retries(3)
            .with_user_agent("softserve", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| self.error("the hub", &e.to_string()))?;
        let repo = api.repo(Repo::with_revision(self.repo.clone(), RepoType::Model, self.revision.clone()));
        let config = self.get(&repo, "config.json")?;
        let folder = config.parent().map(PathBuf::from).unwrap_or_default();
        for file in self.wanted(&repo)? {
            let path = self.get(&repo, &file)?;
            if path.parent() != Some(&folder) {
                return Err(self.error(&file, "the model changed on the hub during the download; start again"));
            }
        }
        Ok(ModelFiles::dir(&folder)?.named(&self.repo))
    }

    /// The files beside `config.json`. Asked of the hub, or without one of the cache.
    fn wanted(&self, repo: &ApiRepo) -> Result<Vec<String>, ModelError> {
        const INDEX: &str = "model.safetensors.index.json";
        let listed: Option<Vec<String>> =
            repo.info().ok().map(|info| info.siblings.into_iter().map(|s| s.rfilename).collect());
        let cache = hf_hub::Cache::from_env().repo(Repo::with_revision(
            self.repo.clone(),
            RepoType::Model,
            self.revision.clone(),
        ));
        let exists = |file: &str| match &listed {
            Some(files) => files.iter().any(|f| f == file),
            None => cache.get(file).is_some(),
        };
        let mut wanted = vec!["tokenizer.json".to_owned()];
        if exists("generation_config.json") {
            wanted.push("generation_config.json".to_owned());
        }
        if exists(INDEX) && !exists("model.safetensors") {
            self.get(repo, INDEX)?;
            let folder = self.get(repo, "config.json")?.parent().map(PathBuf::from).unwrap_or_default();
            wanted.extend(ModelFiles::dir(&folder)?.weight_files()?);
        } else {
            wanted.push("model.safetensors".to_owned());
        }
        Ok(wanted)
    }

    fn get(&self, repo: &ApiRepo, file: &str) -> Result<PathBuf, ModelError> {
        repo.get(file).map_err(|e| self.error(file, &e.to_string()))
    }

    fn error(&self, file: &str, reason: &str) -> ModelError {
        ModelError::File {
            model: self.repo.clone(),
            file: file.to_owned(),
            reason: format!(
                "{reason} (from the hub at revision {}; set HF_ENDPOINT for another hub, HF_TOKEN for a private model, or give a folder)",
                self.revision
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_id_is_an_organisation_a_name_and_perhaps_a_revision() {
        assert_eq!(HubId::parse("a/b-1.5@v2").unwrap(), HubId { repo: "a/b-1.5".into(), revision: "v2".into() });
        assert_eq!(HubId::parse("a/b").unwrap().revision, "main");
        for bad in ["a", "/b", "a/", "../b", "a/..", "a/b/c", "a/b@", "a b/c", "/etc/x"] {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
    }
}
