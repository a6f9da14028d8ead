//! A run's state on disk: one file, replaced as a whole, so that it is always one moment of the
//! run. Numbers are stored as bits, so a resumed run goes on exactly.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};

use super::{
    loss::ValidationMetrics,
    optim::Moments,
    trainer::{Best, State},
};

/// The name of the file in the checkpoint's folder.
pub const FILE: &str = "state.safetensors";

/// Everything that must be the same for a run to go on, by name, as a reader would say it.
pub type Identity = BTreeMap<String, String>;

/// What the file holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    pub identity: Identity,
    /// The learning rate that was given or found.
    pub rate: f64,
    pub state: State,
    /// What cross-validation found after so many steps; empty where other examples judge.
    pub cross_validation: Vec<(usize, ValidationMetrics)>,
}

/// Why a run cannot be saved or resumed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("there is no checkpoint at {}", .0.display())]
    Missing(PathBuf),
    #[error("cannot read the checkpoint {}: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "the checkpoint {} is of another run: {}", path.display(), differences.join(", ")
    )]
    OtherRun { path: PathBuf, differences: Vec<String> },
    #[error("cannot write the checkpoint {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl Checkpoint {
    /// Writes the file into `dir`, which is made if need be. The old one is replaced at once, so a
    /// crash at any moment leaves one of the two.
    pub fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let fail = |source| CheckpointError::Write { path: dir.join(FILE), source };
        let bytes = self.to_bytes().map_err(|e| fail(io::Error::other(e)))?;
        fs::create_dir_all(dir).map_err(fail)?;
        let mut file = tempfile::Builder::new().prefix(".state-").tempfile_in(dir).map_err(fail)?;
        file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(fail)?;
        file.persist(dir.join(FILE)).map_err(|e| fail(e.error))?;
        Ok(())
    }

    /// Reads the file in `dir` and checks that it is of the run that `identity` describes.
    pub fn read(dir: &Path, identity: &Identity) -> Result<Self, CheckpointError> {
        let path = dir.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(CheckpointError::Missing(path)),
            Err(e) => return Err(CheckpointError::Damaged { path, reason: e.to_string() }),
        };
        let checkpoint = match Self::from_bytes(&bytes) {
            Ok(checkpoint) => checkpoint,
            Err(reason) => return Err(CheckpointError::Damaged { path, reason }),
        };
        let differences = differences(&checkpoint.identity, identity);
        match differences.is_empty() {
            true => Ok(checkpoint),
            false => Err(CheckpointError::OtherRun { path, differences }),
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let state = &self.state;
        let f32s = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let f64s = |values: &[f64]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let flat = |evaluations: &[(usize, ValidationMetrics)]| {
            let flat = evaluations.iter().flat_map(|(step, metrics)| [*step as f64, metrics.loss, metrics.exact]);
            f64s(&flat.collect::<Vec<f64>>())
        };
        let mut scalars = vec![self.rate, state.step as f64, state.evaluations_without_gain as f64];
        scalars.extend(state.last_gain.map_or([f64::NAN; 2], |m| [m.loss, m.exact]));
        scalars.extend(
            state.best.as_ref().map_or([f64::NAN; 3], |b| [b.step as f64, b.validation.loss, b.validation.exact]),
        );
        let best = state.best.as_ref().map_or(&[][..], |b| &b.values);
        let tensors = [
            ("best", Dtype::F32, f32s(best)),
            ("cross_validation", Dtype::F64, flat(&self.cross_validation)),
            ("evaluations", Dtype::F64, flat(&state.evaluations)),
            ("first_moment", Dtype::F32, f32s(&state.moments.first)),
            ("losses", Dtype::F64, f64s(&state.losses)),
            ("scalars", Dtype::F64, f64s(&scalars)),
            ("second_moment", Dtype::F32, f32s(&state.moments.second)),
            ("values", Dtype::F32, f32s(&state.values)),
        ];
        let size = |dtype| if dtype == Dtype::F64 { 8 } else { 4 };
        let views = tensors
            .iter()
            .map(|(name, dtype, data)| Ok((*name, TensorView::new(*dtype, vec![data.len() / size(*dtype)], data)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        safetensors::serialize(views, Some(self.identity.clone().into_iter().collect()))
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let identity: HashMap<String, String> = metadata.metadata().clone().unwrap_or_default();
        let f32s = |name: &str| -> Result<Vec<f32>, String> {
            let view = tensors.tensor(name).map_err(|e| e.to_string())?;
            Ok(view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let f64s = |name: &str| -> Result<Vec<f64>, String> {
            let view = tensors.tensor(name).map_err(|e| e.to_string())?;
            Ok(view.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
        };
        let [rate, step, without_gain, gain_loss, gain_exact, best_step, best_loss, best_exact] = f64s("scalars")?[..]
        else {
            return Err("it was written by another version".to_owned());
        };
        let metrics = |loss: f64, exact: f64| ValidationMetrics { loss, exact };
        let best = Best { step: best_step as usize, values: f32s("best")?, validation: metrics(best_loss, best_exact) };
        let evaluations = |name: &str| -> Result<Vec<(usize, ValidationMetrics)>, String> {
            let flat = f64s(name)?;
            Ok(flat.as_chunks::<3>().0.iter().map(|e| (e[0] as usize, metrics(e[1], e[2]))).collect())
        };
        let state = State {
            step: step as usize,
            values: f32s("values")?,
            moments: Moments { first: f32s("first_moment")?, second: f32s("second_moment")? },
            best: (!best_step.is_nan()).then_some(best),
            evaluations_without_gain: without_gain as usize,
            last_gain: (!gain_exact.is_nan()).then_some(metrics(gain_loss, gain_exact)),
            losses: f64s("losses")?,
            evaluations: evaluations("evaluations")?,
        };
        let cross_validation = evaluations("cross_validation")?;
        Ok(Self { identity: identity.into_iter().collect(), rate, state, cross_validation })
    }
}

/// What differs, each as `name is X, was Y`.
fn differences(was: &Identity, is: &Identity) -> Vec<String> {
    let value = |map: &Identity, name: &str| map.get(name).cloned().unwrap_or_else(|| "not set".to_owned());
    let names: std::collections::BTreeSet<&String> = was.keys().chain(is.keys()).collect();
    names
        .into_iter()
        .filter(|name| was.get(*name) != is.get(*name))
        .map(|name| format!("{name} is {}, was {}", value(is, name), value(was, name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let mut state = State::new(vec![0.1, -2.5e-30, f32::MAX]);
        state.step = 7;
        state.losses = vec![1.0 / 3.0, 2e-300];
        state.evaluations = vec![(0, ValidationMetrics { loss: 0.1 + 0.2, exact: 0.5 })];
        state.best = Some(Best {
            step: 3,
            values: vec![1.0, 2.0, 3.0],
            validation: ValidationMetrics { loss: 0.7, exact: 1.0 },
        });
        let identity = [("seed", "1"), ("batch size", "16")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let cross_validation = vec![(5, ValidationMetrics { loss: 1e-9, exact: 0.25 })];
        Checkpoint { identity, rate: 0.3, state, cross_validation }
    }

    #[test]
    fn a_checkpoint_comes_back_bit_for_bit() {
        let dir = tempfile::tempdir().expect("a folder");
        let written = checkpoint();
        written.write(dir.path()).expect("written");
        assert_eq!(Checkpoint::read(dir.path(), &written.identity).expect("read"), written);
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_checkpoint_of_other_settings_is_refused_by_their_names() {
        let dir = tempfile::tempdir().expect("a folder");
        checkpoint().write(dir.path()).expect("written");
        let mut other = checkpoint().identity;
        other.insert("batch size".to_owned(), "8".to_owned());
        let refused = Checkpoint::read(dir.path(), &other).expect_err("refused").to_string();
        assert!(refused.contains("batch size is 8, was 16") && !refused.contains("seed"), "{refused}");
        let missing = Checkpoint::read(&dir.path().join("none"), &other);
        assert!(matches!(missing, Err(CheckpointError::Missing(_))));
        fs::write(dir.path().join(FILE), b"not a checkpoint").expect("written");
        assert!(matches!(Checkpoint::read(dir.path(), &other), Err(CheckpointError::Damaged { .. })));
    }
}
