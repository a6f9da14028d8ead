//! The tasks that a benchmark asks: those that the server has, or learned prompts made at random.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rand::{SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Normal};
use safetensors::{Dtype, tensor::TensorView};

use super::progress;
use crate::{bench::plan::Target, cli::client::ServerArgs};

const TIMEOUT: Duration = Duration::from_secs(300);
/// As the values of embeddings are.
const STANDARD_DEVIATION: f32 = 0.02;

/// The routes beside those that are measured.
#[derive(Debug)]
pub struct Admin {
    server: ServerArgs,
    agent: ureq::Agent,
    key: Option<String>,
    admin_key: Option<String>,
}

impl Admin {
    pub fn new(url: &str, key: Option<&str>, admin_key: Option<&str>) -> Self {
        let server = ServerArgs { url: url.to_owned() };
        let own = |key: Option<&str>| key.map(|key| format!("Bearer {key}"));
        Self { agent: server.agent(TIMEOUT), server, key: own(key.or(admin_key)), admin_key: own(admin_key.or(key)) }
    }

    /// Every task that can be asked.
    pub fn list(&self) -> Result<Vec<Target>> {
        let request = authorized(self.agent.get(self.server.at("/v1/tasks")), self.key.as_deref());
        let mut body = self.server.answer(request.call())?.success()?;
        serde_json::from_value(body["tasks"].take()).context("the server's list of tasks is not understood")
    }

    /// Uploads learned prompts of these lengths, named `prefix-0` and so on.
    pub fn upload(&self, lengths: &[usize], hidden_size: usize, prefix: &str, seed: u64) -> Result<Vec<Target>> {
        self.wait_until_ready()?;
        let bar = progress("uploading prompts", Some(lengths.len()), None);
        let mut random = StdRng::seed_from_u64(seed);
        let mut upload = |i: usize, length: usize| -> Result<Target> {
            let task = format!("{prefix}-{i}");
            let prompt = random_prompt(length, hidden_size, &mut random)?;
            let path = self.server.at(&format!("/v1/admin/tasks/{task}/versions"));
            let request = authorized(self.agent.post(path), self.admin_key.as_deref());
            let sent = request.header("content-type", "application/octet-stream").send(&prompt[..]);
            self.server.answer(sent)?.success().with_context(|| format!("cannot upload {task}"))?;
            bar.inc(1);
            Ok(Target { task, fields: vec!["input".to_owned()] })
        };
        let mut targets = Vec::with_capacity(lengths.len());
        for (i, length) in lengths.iter().enumerate() {
            match upload(i, *length) {
                Ok(target) => targets.push(target),
                Err(error) => {
                    // The server may be somebody's: nothing is left behind, if it still lets us.
                    targets.iter().for_each(|target: &Target| drop(self.delete(&target.task)));
                    return Err(error);
                }
            }
        }
        bar.finish_and_clear();
        Ok(targets)
    }

    /// Takes a task away again.
    pub fn delete(&self, task: &str) -> Result<()> {
        let path = self.server.at(&format!("/v1/admin/tasks/{task}"));
        let request = authorized(self.agent.delete(path), self.admin_key.as_deref());
        self.server.answer(request.call())?.success().with_context(|| format!("cannot delete {task}"))?;
        Ok(())
    }

    fn wait_until_ready(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let answer = self.server.answer(self.agent.get(self.server.at("/health/ready")).call())?;
            match answer.status {
                200 => return Ok(()),
                _ if begun.elapsed() < TIMEOUT => std::thread::sleep(Duration::from_millis(50)),
                status => bail!("the server at {} is not ready ({status}): {}", self.server.url, answer.body),
            }
        }
    }
}

fn authorized<T>(request: ureq::RequestBuilder<T>, key: Option<&str>) -> ureq::RequestBuilder<T> {
    match key {
        Some(key) => request.header("authorization", key),
        None => request,
    }
}

/// A safetensors file with rows of random values.
fn random_prompt(rows: usize, columns: usize, random: &mut StdRng) -> Result<Vec<u8>> {
    let normal = Normal::new(0.0, STANDARD_DEVIATION)?;
    let data: Vec<u8> = normal.sample_iter(random).take(rows * columns).flat_map(f32::to_le_bytes).collect();
    let tensor = TensorView::new(Dtype::F32, vec![rows, columns], &data)?;
    Ok(safetensors::serialize([("prompt_embeddings", tensor)], None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_prompt_is_one_that_a_server_takes() {
        let bytes = random_prompt(3, 4, &mut StdRng::seed_from_u64(0)).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("prompt_embeddings").unwrap().shape(), [3, 4]);
        assert_ne!(bytes, random_prompt(3, 4, &mut StdRng::seed_from_u64(1)).unwrap());
    }
}
