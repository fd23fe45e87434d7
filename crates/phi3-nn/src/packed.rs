//! A packed batch while it runs through a model.
//!
//! [`Packed::begin`] turns the caller's spans into the rows that really run: a sequence whose keys
//! must be computed again runs its whole history before its new tokens, inside the same call. The
//! model then only sees rows, positions and sequences; at the end [`Packed::logits`] gives what the
//! caller asked for and [`Packed::finish`] lengthens the caches.

use std::fmt::Display;
use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::causal_lm::{Input, LogitRows, Observer, Span};
use crate::embedding::Embedding;
use crate::error::{Error, Result};
use crate::kv_cache::{InputSegment, KvCache, SpanPlan};
use crate::linear::Linear;
use crate::rope::Regime;

/// A packed batch on its way through the layers.
pub struct Packed<'a, 's> {
    input: Input<'a>,
    spans: &'a mut [Span<'s>],
    plans: Vec<RowPlan>,
    observer: Option<&'a mut dyn Observer>,
}

/// Where a span's rows lie among those that run.
struct RowPlan {
    /// Rows of the caller's input.
    input_rows: Range<usize>,
    /// Rows that run: history, then the caller's.
    rows: Range<usize>,
    span: SpanPlan,
}

/// One sequence of a packed batch, as attention sees it.
pub(crate) struct Sequence<'c> {
    /// Its rows among those that run.
    pub(crate) rows: Range<usize>,
    /// Position of the first of them.
    pub(crate) start: usize,
    /// Its cache.
    pub(crate) cache: &'c mut KvCache,
}

impl<'a, 's> Packed<'a, 's> {
    /// Checks the batch and plans its rows. Caches that will be rebuilt are emptied here; their
    /// length stays.
    ///
    /// # Errors
    /// [`Error::Batch`] if there is no row, a span is empty, the spans do not add up to the input,
    /// or a sequence would exceed the model's maximum length.
    pub fn begin(
        input: Input<'a>,
        spans: &'a mut [Span<'s>],
        observer: Option<&'a mut (dyn Observer + '_)>,
    ) -> Result<Self> {
        let expected: usize = spans.iter().map(|span| span.len).sum();
        if expected != input.len() {
            return Err(Error::Batch(format!(
                "the spans have {expected} rows, the input has {}",
                input.len()
            )));
        }
        let (mut input_row, mut row) = (0, 0);
        let mut plans = Vec::with_capacity(spans.len());
        for (span_idx, span) in spans.iter().enumerate() {
            if span.len == 0 {
                return Err(Error::Batch(format!("span {span_idx} has no token")));
            }
            let plan = span.cache.plan(span.len, span.reaches)?;
            let rows = plan.history + span.len;
            plans.push(RowPlan {
                input_rows: input_row..input_row + span.len,
                rows: row..row + rows,
                span: plan,
            });
            input_row += span.len;
            row += rows;
        }
        if plans.is_empty() {
            return Err(Error::Batch("there is no sequence in it".to_owned()));
        }
        for (span, plan) in spans.iter_mut().zip(&plans) {
            if plan.span.history > 0 {
                span.cache.history(plan.span.history)?;
                span.cache.clear_keys();
            }
        }
        // The coercion shortens the observer's own lifetime, which nothing else can.
        let observer = observer.map(|observer| -> &'a mut dyn Observer { observer });
        Ok(Self {
            input,
            spans,
            plans,
            observer,
        })
    }

    /// The embeddings of all rows that run, `[n, hidden]`, which the observer is shown as
    /// `hidden_embed`.
    ///
    /// # Errors
    /// [`Error::TokenId`], or those of the observer.
    pub fn embed(&mut self, embed_tokens: &Embedding) -> Result<Tensor> {
        let x = match self.input {
            _ if self.plans.iter().any(|plan| plan.span.history > 0) => {
                self.embed_with_history(embed_tokens)?
            }
            Input::Ids(ids) => embed_tokens.forward(ids)?,
            Input::Embeddings(rows) => rows.clone(),
        };
        self.observe("hidden_embed", &x)?;
        Ok(x)
    }

    fn embed_with_history(&self, embed_tokens: &Embedding) -> Result<Tensor> {
        let mut pieces = Vec::new();
        for (span, plan) in self.spans.iter().zip(&self.plans) {
            if plan.span.history > 0 {
                for segment in span.cache.history(plan.span.history)? {
                    pieces.push(match segment {
                        InputSegment::Ids(ids) => embed_tokens.forward(ids)?,
                        InputSegment::Rows(rows) => rows.clone(),
                    });
                }
            }
            pieces.push(match self.input {
                Input::Ids(ids) => {
                    embed_tokens.forward(ids.get(plan.input_rows.clone()).unwrap_or_default())?
                }
                Input::Embeddings(rows) => {
                    rows.narrow(0, plan.input_rows.start, plan.input_rows.len())?
                }
            });
        }
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// Position and LongRoPE regime of every row that runs.
    pub fn positions(&self) -> impl Iterator<Item = (usize, Regime)> + '_ {
        self.spans.iter().zip(&self.plans).flat_map(|(span, plan)| {
            let SpanPlan {
                start,
                history,
                regime,
                ..
            } = plan.span;
            (0..plan.rows.len()).map(move |row| {
                let regime = match row < history {
                    true => span.cache.regime_of(start + row, &plan.span),
                    false => regime,
                };
                (start + row, regime)
            })
        })
    }

    /// The sequences, in packed order.
    pub(crate) fn sequences_mut(&mut self) -> impl Iterator<Item = Sequence<'_>> {
        self.spans
            .iter_mut()
            .zip(&self.plans)
            .map(|(span, plan)| Sequence {
                rows: plan.rows.clone(),
                start: plan.span.start,
                cache: &mut *span.cache,
            })
    }

    /// Shows `value`, whose first axis counts the rows that run, to the observer under a name that
    /// is only written out if there is one.
    ///
    /// # Errors
    /// Those of the observer.
    pub fn observe(&mut self, name: impl Display, value: &Tensor) -> Result<()> {
        let Some(observer) = self.observer.as_deref_mut() else {
            return Ok(());
        };
        let name = name.to_string();
        if !observer.wants(&name) {
            return Ok(());
        }
        let shown = pick_rows(value, &self.plans, |plan| {
            plan.rows.start + plan.span.history..plan.rows.end
        })?;
        observer.observe(&name, &shown)
    }

    /// Whether anybody may want to be shown something.
    pub fn is_observed(&self) -> bool {
        self.observer.is_some()
    }

    /// [`Packed::observe`] for a `value` that has some of the rows that run: `rows[i]` is the one
    /// that its row i belongs to. Those that the caller did not send are left out.
    ///
    /// # Errors
    /// Those of the observer.
    pub fn observe_rows(&mut self, name: impl Display, value: &Tensor, rows: &[u32]) -> Result<()> {
        let Some(observer) = self.observer.as_deref_mut() else {
            return Ok(());
        };
        let name = name.to_string();
        if !observer.wants(&name) {
            return Ok(());
        }
        let sent = |row: usize| {
            let mut plans = self.plans.iter();
            plans.any(|plan| (plan.rows.start + plan.span.history..plan.rows.end).contains(&row))
        };
        let shown: Vec<u32> = (0u32..)
            .zip(rows)
            .filter(|(_, row)| sent(**row as usize))
            .map(|(idx, _)| idx)
            .collect();
        match shown.len() {
            0 => Ok(()),
            all if all == rows.len() => observer.observe(&name, value),
            _ => {
                let shown = Tensor::new(shown.as_slice(), value.device())?;
                observer.observe(&name, &value.index_select(&shown, 0)?)
            }
        }
    }

    /// Runs a linear layer and shows its input to the observer under the layer's name.
    ///
    /// # Errors
    /// [`Error::Interrupted`], and those of the layer and of the observer.
    pub fn linear(&mut self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        self.enter(linear, x)?;
        linear.forward(x)
    }

    /// [`Linear::forward_silu_mul`], as [`linear`](Self::linear).
    ///
    /// # Errors
    /// Those of [`linear`](Self::linear).
    pub fn linear_silu_mul(&mut self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        self.enter(linear, x)?;
        linear.forward_silu_mul(x)
    }

    fn enter(&mut self, linear: &Linear, x: &Tensor) -> Result<()> {
        // Every layer of every model comes by here, and takes longer than to ask.
        if self.spans.iter().all(Span::is_interrupted) {
            return Err(Error::Interrupted);
        }
        self.observe(linear.name(), x)
    }

    /// f32 logits `[rows, vocab_size]` of the rows of `x` `[n, hidden]` that the caller wants; `head`
    /// gives them, and is not run where the caller wants none.
    ///
    /// # Errors
    /// Those of `head`, [`Error::Candle`] if the rows cannot be taken.
    pub fn logits(
        &self,
        x: &Tensor,
        vocab_size: usize,
        head: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        Ok(match self.select_logit_rows(x)? {
            Some(rows) => head(&rows)?.to_dtype(DType::F32)?,
            None => Tensor::zeros((0, vocab_size), DType::F32, x.device())?,
        })
    }

    fn select_logit_rows(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let wanted: Vec<LogitRows> = self.spans.iter().map(|span| span.logits).collect();
        let counts = || {
            wanted
                .iter()
                .zip(&self.plans)
                .map(|(rows, plan)| rows.count(plan.input_rows.len()))
        };
        if counts().sum::<usize>() == 0 {
            return Ok(None);
        }
        let mut counts = counts();
        pick_rows(x, &self.plans, |plan| {
            plan.rows.end - counts.next().unwrap_or(0)..plan.rows.end
        })
        .map(Some)
    }

    /// Ends a successful pass: the caches are now as long as their sequences.
    ///
    /// # Errors
    /// [`Error::Candle`] if a device tensor cannot be narrowed.
    pub fn finish(self) -> Result<()> {
        for (span, plan) in self.spans.iter_mut().zip(&self.plans) {
            let segment = match self.input {
                Input::Ids(ids) => InputSegment::Ids(
                    ids.get(plan.input_rows.clone())
                        .unwrap_or_default()
                        .to_vec(),
                ),
                Input::Embeddings(rows) => InputSegment::Rows(rows.narrow(
                    0,
                    plan.input_rows.start,
                    plan.input_rows.len(),
                )?),
            };
            span.cache.commit(segment, &plan.span)?;
        }
        Ok(())
    }
}

/// Takes the rows that `range` names of each span, in order.
fn pick_rows(
    x: &Tensor,
    plans: &[RowPlan],
    mut range: impl FnMut(&RowPlan) -> Range<usize>,
) -> Result<Tensor> {
    let mut pieces = Vec::new();
    let mut taken = 0;
    for plan in plans {
        let rows = range(plan);
        if !rows.is_empty() {
            pieces.push(x.narrow(0, rows.start, rows.len())?);
            taken += rows.len();
        }
    }
    match pieces.as_slice() {
        _ if taken == x.dim(0)? => Ok(x.clone()),
        [one] => Ok(one.contiguous()?),
        several => Ok(Tensor::cat(several, 0)?),
    }
}
