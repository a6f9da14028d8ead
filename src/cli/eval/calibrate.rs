//! `softserve eval --calibrate`: learns a calibration on the examples and writes it to the prompt's task.json.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::{
    prompt::{calibration::Calibration, files::TASK},
    tune::{
        calibrate::{LEAST_EXAMPLES, LearnedCalibration},
        evaluate::Column,
    },
};

/// What was learned, and where it was written.
pub struct Calibrated {
    learned: LearnedCalibration,
    /// `None` where probabilities are no better with it.
    written: Option<PathBuf>,
}

/// Learns the calibration of the tuned prompt and writes it to task.json in its folder, if probabilities are better with it
/// on examples that it did not see.
pub fn calibrate(folder: &Path, columns: &[Column]) -> anyhow::Result<Calibrated> {
    let Some(evidence) = columns.iter().find(|c| c.name == "tuned").and_then(|c| c.evidence.as_ref()) else {
        bail!("--calibrate needs a task with labels, and {} has none", folder.join(TASK).display())
    };
    let found = evidence.expected.len();
    if found < LEAST_EXAMPLES {
        bail!(
            "--calibrate needs at least {LEAST_EXAMPLES} examples that the prompt was not tuned on, and the data has {found}"
        );
    }
    let learned = evidence.learn();
    let written = learned.is_better.then(|| folder.join(TASK));
    if let Some(path) = &written {
        write(path, &learned.calibration)?;
    }
    Ok(Calibrated { learned, written })
}

/// Puts the calibration in task.json, whose other fields stay. The file is replaced as a whole.
fn write(path: &Path, calibration: &Calibration) -> anyhow::Result<()> {
    let cannot = |what: &str| format!("cannot {what} {}", path.display());
    let bytes = std::fs::read(path).with_context(|| cannot("read"))?;
    let json = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    let mut task: serde_json::Value = serde_json::from_slice(json).with_context(|| cannot("read"))?;
    let Some(fields) = task.as_object_mut() else { bail!("{}: expected an object", path.display()) };
    fields.insert("calibration".to_owned(), serde_json::to_value(calibration)?);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(|| cannot("write"))?;
    serde_json::to_writer_pretty(&mut file, &task).with_context(|| cannot("write"))?;
    writeln!(file).and_then(|()| file.as_file().sync_all()).with_context(|| cannot("write"))?;
    // A temporary file is its owner's only; task.json keeps who may read it.
    if let Ok(metadata) = std::fs::metadata(path) {
        file.as_file().set_permissions(metadata.permissions()).with_context(|| cannot("write"))?;
    }
    file.persist(path).with_context(|| cannot("write"))?;
    Ok(())
}

impl Calibrated {
    /// As JSON, for the report.
    pub fn json(&self) -> serde_json::Value {
        let LearnedCalibration { calibration, before, held_out, .. } = &self.learned;
        serde_json::json!({
            "temperature": calibration.temperature,
            "priors": calibration.priors,
            "without": {"brier": before.brier, "ece": before.ece},
            "cross_validated": {"brier": held_out.brier, "ece": held_out.ece},
            "written_to": self.written,
        })
    }

    /// As text, below the table.
    pub fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let Self { learned: LearnedCalibration { calibration, before, held_out, .. }, written } = self;
        writeln!(
            out,
            "\n  calibration: temperature {}, priors of {} labels",
            calibration.temperature,
            calibration.priors.len()
        )?;
        writeln!(out, "  {:<28} {:>8} {:>8}", "", "Brier", "ECE")?;
        writeln!(out, "  {:<28} {:>8.4} {:>8.4}", "without a calibration", before.brier, before.ece)?;
        writeln!(out, "  {:<28} {:>8.4} {:>8.4}", "with it (5-fold validated)", held_out.brier, held_out.ece)?;
        match written {
            Some(path) => {
                writeln!(
                    out,
                    "\nwritten to {}; upload the prompt again with `softserve push` to serve it so",
                    path.display()
                )
            }
            None => writeln!(
                out,
                "\nnot written: on examples that it was not learned from, the probabilities are no better with it"
            ),
        }
    }
}
