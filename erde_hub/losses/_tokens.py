"""Losses per token over large vocabularies, a few tokens at a time.

A batch of 8 x 512 tokens over 32,000 words is half a gigabyte of float32, and every softmax or product of all of it is
another one. Here logits are read in chunks; what is kept is one number per token, and in the backward pass the gradient
itself, filled in chunk by chunk from its closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import functional

#: Logits in a chunk, 8 MiB of float32 each time they are copied, where no chunk size is given.
CHUNK_ELEMENTS = 2**21


def chunks(num_tokens: int, vocab_size: int, chunk_size: int | None) -> Iterator[slice]:
    """Yields slices of tokens."""
    size = chunk_size or max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


@torch.no_grad()
def token_entropy(logits: Tensor, vocab_size: int, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns entropy in nats and most likely word of every token, from the first ``vocab_size`` columns.

    Shape:
        logits: (N, V). Returns (N,) float32 (float64 for float64 logits) and (N,) int64.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entropy = logits.new_empty(len(logits), dtype=dtype)
    prediction = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for rows in chunks(len(logits), vocab_size, chunk_size):
        part = logits[rows, :vocab_size]
        entropy[rows] = functional.entropy(functional.log_probs(part))
        prediction[rows] = part.argmax(-1)
    return entropy, prediction


class TokenLosses(torch.autograd.Function):
    """Divergence from the teacher and cross-entropy of every token; differentiable once, in the student's logits.

    With q = softmax(z / T_n) at each token's temperature and p = softmax(z)::

        forward  KL(q_t || q_s)   d/ds = (q_s - q_t) / T_n
        reverse  KL(q_s || q_t)   d/ds = q_s (log q_s - log q_t - KL) / T_n
        CE(s, y) = -log p_s[y]    d/ds = p_s - onehot(y), 0 where y < 0
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        temperature: Tensor,
        vocab_size: int,
        chunk_size: int | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns divergence and cross-entropy, (N,) each."""
        ctx.save_for_backward(student, labels, temperature)
        ctx.teacher = teacher  # needs no gradient, and may come from inference mode, which could not be saved
        ctx.settings = (vocab_size, chunk_size, reverse)
        divergence = torch.empty_like(temperature)
        cross_entropy = torch.zeros_like(temperature)
        for rows in chunks(len(student), vocab_size, chunk_size):
            own = _soften(student[rows, :vocab_size], temperature[rows])
            target = _soften(teacher[rows, :vocab_size], temperature[rows])
            pair = (own, target) if reverse else (target, own)
            divergence[rows] = functional.kl_divergence(*pair)
            del pair
            del own, target
            log_probs = functional.log_probs(student[rows, :vocab_size])
            cross_entropy[rows] = -log_probs.gather(1, labels[rows, None].clamp_min(0))[:, 0]
        return divergence, cross_entropy.masked_fill_(labels < 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Fills the gradient of the student's logits chunk by chunk; nothing else of that size is made."""
        student, labels, temperature = ctx.saved_tensors
        teacher = ctx.teacher
        vocab_size, chunk_size, reverse = ctx.settings
        grad_divergence, grad_ce = grads[0] / temperature, grads[1].masked_fill(labels < 0, 0.0)
        gradient = torch.empty_like(student)
        gradient[:, vocab_size:] = 0
        for rows in chunks(len(student), vocab_size, chunk_size):
            own = _soften(student[rows, :vocab_size], temperature[rows])
            target = _soften(teacher[rows, :vocab_size], temperature[rows])
            if reverse:
                difference = own - target
                own.exp_()
                difference -= (own * difference).sum(-1, keepdim=True)
                total = difference.mul_(own)
            else:
                total = own.exp_().sub_(target.exp_())
            total *= grad_divergence[rows, None]
            del own, target
            probs = functional.log_probs(student[rows, :vocab_size]).exp_()
            probs.scatter_add_(1, labels[rows, None].clamp_min(0), -torch.ones_like(probs[:, :1]))
            total += probs.mul_(grad_ce[rows, None])
            gradient[rows, :vocab_size] = total.to(gradient.dtype)
        return gradient, None, None, None, None, None, None


def _soften(logits: Tensor, temperature: Tensor) -> Tensor:
    return functional.log_probs(functional.upcast(logits) / temperature[:, None])
