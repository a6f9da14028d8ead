//! Rotary position embeddings: what `rope_parameters` (transformers v5) or `rope_theta` and
//! `rope_scaling` (v4) say, and the frequencies that follow, as transformers' modeling_rope_utils.py
//! computes them.

use super::keys::Keys;
use crate::model::family::config_spec::RopeSpec;

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// How many dimensions of a head are rotated, its first; even.
    pub dims: usize,
    pub scaling: RopeScaling,
    /// What cosines and sines are multiplied with.
    pub attention_factor: f64,
}

/// How the rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by the factor (position interpolation, Chen et al. 2023).
    Linear {
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a smooth step between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context_length: f64,
    },
    /// YaRN (Peng et al. 2023): the same by the dimension, with a linear step from `low` to `high`.
    Yarn {
        factor: f64,
        low: f64,
        high: f64,
    },
    /// LongRoPE (Ding et al. 2024): each frequency divided by a factor of its own.
    Long {
        factors: Vec<f64>,
    },
}

impl Rope {
    /// The rotary frequency of each pair of dimensions, `[dims / 2]`.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let base = (0..self.dims / 2).map(|i| self.theta.powf(-2.0 * i as f64 / self.dims as f64));
        match &self.scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_length } => base
                .map(|f| {
                    // _compute_llama3_parameters
                    let wavelength = 2.0 * std::f64::consts::PI / f;
                    let turns = original_context_length / wavelength;
                    let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    f * (smooth + (1.0 - smooth) / factor)
                })
                .collect(),
            RopeScaling::Yarn { factor, low, high } => base
                .enumerate()
                .map(|(i, f)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f * (divided / factor + (1.0 - divided))
                })
                .collect(),
            RopeScaling::Long { factors } => base.zip(factors).map(|(f, factor)| f / factor).collect(),
        }
    }
}

/// The rotary embeddings of a model.
#[derive(Debug)]
pub struct Ropes {
    /// All there are. A second one is that of layers with a sliding window.
    pub ropes: Vec<Rope>,
    /// The context length for which they are what transformers computes.
    pub context_length: usize,
    /// Whether they change where a sequence is longer than that.
    pub is_bounded: bool,
}

/// Reads the rotary embeddings of heads of `head_dim` from `config.json`.
pub fn read(
    keys: Keys,
    model_type: &str,
    spec: RopeSpec,
    head_dim: usize,
    context_length: usize,
) -> Result<Ropes, String> {
    let v4 = keys.object("rope_scaling", "rope ")?;
    let v5 = keys.object("rope_parameters", "rope ")?;
    let mut reader =
        Reader { keys, model_type, spec, head_dim, context_length, limit: context_length, is_bounded: false };
    let by_layer = |of: &str| v5.map_or(Ok(None), |v5| v5.object(of, "rope "));
    let (full, sliding) = (by_layer("full_attention")?, by_layer("sliding_attention")?);
    if let Some(local) = spec.local_theta {
        // Only the first one's frequencies are stretched.
        let full = full.or(v4).or(v5.filter(|_| sliding.is_none()));
        let theta = reader.theta(spec.theta, full)?;
        let global = reader.rope(full, theta)?;
        let theta = reader.theta(local, sliding)?;
        let local = reader.rope(sliding, theta)?;
        return Ok(Ropes { ropes: vec![global, local], context_length: reader.limit, is_bounded: reader.is_bounded });
    }
    if full.is_some() || sliding.is_some() {
        return Err(format!("rope_parameters by the type of a layer are not supported for {model_type}"));
    }
    let parameters = v4.or(v5);
    let theta = reader.theta(spec.theta, parameters)?;
    let rope = reader.rope(parameters, theta)?;
    Ok(Ropes { ropes: vec![rope], context_length: reader.limit, is_bounded: reader.is_bounded })
}

struct Reader<'a> {
    keys: Keys<'a>,
    model_type: &'a str,
    spec: RopeSpec,
    head_dim: usize,
    context_length: usize,
    /// The most positions for which what was read is exact.
    limit: usize,
    is_bounded: bool,
}

impl Reader<'_> {
    fn theta(&self, (key, default): (&str, f64), parameters: Option<Keys>) -> Result<f64, String> {
        if let Some(theta) = parameters.map_or(Ok(None), |p| p.positive("rope_theta"))? {
            return Ok(theta);
        }
        Ok(self.keys.positive(key)?.unwrap_or(default))
    }

    /// The first dimensions of a head that are rotated.
    fn dims(&self, parameters: Option<Keys>) -> Result<usize, String> {
        let of = |keys: Option<Keys>, key: &str| keys.map_or(Ok(None), |keys| keys.positive(key));
        let key = self.spec.partial_key;
        let partial = of(parameters, "partial_rotary_factor")?.or(of(Some(self.keys), key)?);
        let partial = match (partial, self.spec.partial) {
            (Some(partial), None) if partial != 1.0 => {
                return Err(format!("partial_rotary_factor {partial} is not supported for {}", self.model_type));
            }
            (partial, default) => partial.or(default).unwrap_or(1.0),
        };
        let dims = (self.head_dim as f64 * partial) as usize;
        if dims == 0 || !dims.is_multiple_of(2) || dims > self.head_dim {
            return Err(match self.spec.partial {
                None => format!("head_dim {dims} is not a positive even number, as rope needs"),
                Some(_) => format!(
                    "{key} {partial} of head_dim {} is {dims} dimensions, which is not a positive even number, as rope needs",
                    self.head_dim
                ),
            });
        }
        Ok(dims)
    }

    fn rope(&mut self, parameters: Option<Keys>, theta: f64) -> Result<Rope, String> {
        let dims = self.dims(parameters)?;
        let plain = Rope { theta, dims, scaling: RopeScaling::None, attention_factor: 1.0 };
        let Some(parameters) = parameters else { return Ok(plain) };
        let of_type: Option<String> = match parameters.get("rope_type")? {
            None => parameters.get("type")?,
            of_type => of_type,
        };
        let of_type = match of_type.as_deref() {
            Some(name) if self.spec.longrope_types.contains(&name) => Some("longrope"),
            of_type => of_type,
        };
        let needed = |key: &str| parameters.positive(key)?.ok_or_else(|| parameters.missing(key));
        match of_type {
            None | Some("default") => Ok(plain),
            // Dynamic scaling begins past the context length, which nothing here goes beyond.
            Some("dynamic") => {
                self.is_bounded = true;
                Ok(plain)
            }
            Some("linear") => Ok(Rope { scaling: RopeScaling::Linear { factor: needed("factor")? }, ..plain }),
            Some("llama3") => {
                let low_freq_factor = needed("low_freq_factor")?;
                let high_freq_factor = needed("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return Err(format!(
                        "rope high_freq_factor {high_freq_factor} is not above low_freq_factor {low_freq_factor}"
                    ));
                }
                let original_context_length = self.original(parameters)?;
                let factor = needed("factor")?;
                let scaling =
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_length };
                Ok(Rope { scaling, ..plain })
            }
            Some("yarn") => self.yarn(parameters, plain),
            Some("longrope") => self.long(parameters, plain),
            Some(other) => Err(format!(
                "rope type {other:?} is not supported; supported are default, linear, dynamic, llama3, yarn, longrope"
            )),
        }
    }

    /// The context length that a model had before it was stretched.
    fn original(&self, parameters: Keys) -> Result<f64, String> {
        let key = "original_max_position_embeddings";
        // Phi-3 keeps it outside, and always has one.
        let outside = self.keys.positive(key)?.or(self.spec.original_context_length);
        Ok(outside.or(parameters.positive(key)?).unwrap_or(self.context_length as f64))
    }

    /// _compute_yarn_parameters
    fn yarn(&self, parameters: Keys, plain: Rope) -> Result<Rope, String> {
        let original = self.original(parameters)?;
        let factor = parameters.positive("factor")?.unwrap_or(self.context_length as f64 / original);
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let given = |key: &str| Ok::<_, String>(parameters.get::<f64>(key)?.filter(|x| *x != 0.0));
        let attention_factor = match parameters.positive("attention_factor")? {
            Some(factor) => factor,
            None => match (given("mscale")?, given("mscale_all_dim")?) {
                (Some(mscale), Some(all)) => scale(mscale) / scale(all),
                _ => scale(1.0),
            },
        };
        let dims = plain.dims as f64;
        let dimension =
            |turns: f64| dims * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * plain.theta.ln());
        let mut low = dimension(given("beta_fast")?.unwrap_or(32.0));
        let mut high = dimension(given("beta_slow")?.unwrap_or(1.0));
        if !(low.is_finite() && high.is_finite() && attention_factor.is_finite()) {
            return Err(format!("rope type \"yarn\" with rope_theta {} has no finite frequencies", plain.theta));
        }
        if parameters.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let mut high = high.min(dims - 1.0);
        if low == high {
            high += 0.001;
        }
        Ok(Rope { scaling: RopeScaling::Yarn { factor, low, high }, attention_factor, ..plain })
    }

    /// _compute_longrope_parameters. Sequences of up to the original length take the short factors, and
    /// longer ones take others for all of their positions; so the context ends there.
    fn long(&mut self, parameters: Keys, plain: Rope) -> Result<Rope, String> {
        let original = self.original(parameters)?;
        let factors = |key: &str| {
            let factors: Vec<f64> = parameters.get(key)?.ok_or_else(|| parameters.missing(key))?;
            if factors.len() != plain.dims / 2 || factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
                return Err(format!(
                    "rope {key} has {} values, expected {} positive numbers",
                    factors.len(),
                    plain.dims / 2
                ));
            }
            Ok(factors)
        };
        let (short, long) = (factors("short_factor")?, factors("long_factor")?);
        let factor = parameters.positive("factor")?.unwrap_or(self.context_length as f64 / original);
        let attention_factor = match parameters.positive("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        if !attention_factor.is_finite() {
            return Err(format!("rope original_max_position_embeddings {original} is too small for longrope"));
        }
        if short != long {
            self.is_bounded = true;
            self.limit = self.limit.min(original as usize).max(1);
        }
        Ok(Rope { scaling: RopeScaling::Long { factors: short }, attention_factor, ..plain })
    }
}
