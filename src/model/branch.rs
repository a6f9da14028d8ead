//! The residual stream, and how a branch leaves it and comes back: its norms and its sum.

use candle_core::{Result, Tensor};

use super::{
    config::NormPlaces,
    names::NormNames,
    source::{Loaded, Source},
};
use crate::kernels::{Kernels, norm::Norm, weight::Linear};

/// The residual stream between two branches, `[t, hidden]`.
#[derive(Debug)]
pub struct Stream {
    pub x: Tensor,
    /// What the norm of the next branch makes of it, where that is known already.
    normed: Option<Tensor>,
}

impl Stream {
    /// A stream that no norm has read yet.
    pub fn new(x: Tensor) -> Self {
        Self { x, normed: None }
    }

    /// What the next branch reads, which begins with `norm` if there is one.
    ///
    /// # Errors
    /// A kernel fails.
    pub fn into_normed(self, norm: Option<&Norm>, kernels: &mut dyn Kernels) -> Result<Tensor> {
        let Self { x, normed } = self;
        match (normed, norm) {
            (Some(normed), _) => Ok(normed),
            (None, Some(norm)) => kernels.norm(&x, norm),
            (None, None) => Ok(x),
        }
    }
}

/// The norms of a branch, those that there are.
#[derive(Debug)]
pub struct BranchNorms {
    pub before: Option<Norm>,
    pub after: Option<Norm>,
    pub sum: Option<Norm>,
}

impl BranchNorms {
    /// Takes the norms of a branch of layer `index` out of a file.
    pub fn load(source: &mut Source, index: usize, names: NormNames, places: NormPlaces, width: usize) -> Loaded<Self> {
        let mut norm = |is: bool, name: Option<&str>| {
            name.filter(|_| is).map(|name| source.norm(Some(index), name, width)).transpose()
        };
        Ok(Self {
            before: norm(places.before, names.before)?,
            after: norm(places.after, names.after)?,
            sum: norm(places.sum, names.sum)?,
        })
    }

    /// What the end of the branch returns, added to what it branched off from, and what the norm `next` makes of that, if
    /// there is one. `last` adds what it is given.
    ///
    /// # Errors
    /// A kernel fails.
    pub fn leave(
        &self,
        last: impl FnOnce(Option<&Tensor>, &mut dyn Kernels) -> Result<Tensor>,
        residual: &Tensor,
        next: Option<&Norm>,
        kernels: &mut dyn Kernels,
    ) -> Result<Stream> {
        let of_sum = self.sum.as_ref().or(next);
        let (x, normed) = match (&self.after, of_sum) {
            (after, Some(norm)) if after.is_some() || kernels.adds_in_norm(residual.dims()[0]) => {
                let branch = last(None, kernels)?;
                let (sum, normed) = kernels.add_norm(&branch, after.as_ref(), residual, norm)?;
                (sum, Some(normed))
            }
            (_, Some(norm)) => {
                let sum = last(Some(residual), kernels)?;
                let normed = kernels.norm(&sum, norm)?;
                (sum, Some(normed))
            }
            (Some(after), None) => {
                let branch = last(None, kernels)?;
                ((residual + kernels.norm(&branch, after)?)?, None)
            }
            (None, None) => (last(Some(residual), kernels)?, None),
        };
        match (&self.sum, normed) {
            // The stream goes on from this norm.
            (Some(_), Some(x)) => {
                let normed = next.map(|norm| kernels.norm(&x, norm)).transpose()?;
                Ok(Stream { x, normed })
            }
            (_, normed) => Ok(Stream { x, normed }),
        }
    }

    /// Every norm that there is.
    pub fn all(&self) -> impl Iterator<Item = &Norm> {
        [&self.before, &self.after, &self.sum].into_iter().flatten()
    }
}

/// The end of a branch that is a linear layer of `h`.
pub fn last(layer: &Linear, h: &Tensor) -> impl FnOnce(Option<&Tensor>, &mut dyn Kernels) -> Result<Tensor> {
    move |residual, kernels| match residual {
        Some(residual) => layer.forward_add(h, residual, kernels),
        None => layer.forward(h, kernels),
    }
}
