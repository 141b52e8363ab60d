"""Losses per token over large vocabularies, a few tokens at a time.

A batch of 8 x 512 tokens over 32,000 words is half a gigabyte of float32, and every softmax or product of all of it is
another one. Here logits are read in chunks; what is kept is one number per token, and in the backward pass the gradient
itself, filled in chunk by chunk from its closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import functional

#: Logits in a chunk, 8 MiB of float32 each time they are copied, where no chunk size is given.
CHUNK_ELEMENTS = 2**21
#: The same where a head computes them: each chunk also gives a gradient as large as the output embedding.
HEAD_CHUNK_ELEMENTS = 2**23


@dataclass
class TokenLogits:
    """Logits of tokens that are computed where they are read, so that those of all tokens never exist at once.

    Attributes:
        states: (N, D), what the read-out of one exit reads at each token; without a head the logits themselves.
        head: Maps (n, D) to logits (n, V).
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Tensor:
        """Returns the logits (n, V) of some tokens."""
        return self.of(self.states[rows])

    def of(self, states: Tensor) -> Tensor:
        """Returns the logits (n, V) of states (n, D)."""
        return states if self.head is None else self.head(states)

    def at(self, rows: Tensor) -> TokenLogits:
        """Returns those of the tokens with these numbers."""
        return TokenLogits(self.states[rows], self.head)


def in_chunks(function: Callable[..., Any], tensors: Sequence[Tensor], size: int) -> list[Any]:
    """Calls a function on a few rows at a time; what it keeps for its gradient is computed again in the backward pass.

    Args:
        function: Takes as many tensors as are given.
        tensors: Of N rows each.
        size: Rows per call.
    """
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


def chunks(num_tokens: int, vocab_size: int, chunk_size: int | None) -> Iterator[slice]:
    """Yields slices of tokens."""
    size = chunk_size or max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


@torch.no_grad()
def token_entropy(
    logits: TokenLogits | Tensor, vocab_size: int, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns entropy in nats and most likely word of every token, from the first ``vocab_size`` columns.

    Shape:
        logits: (N, V). Returns (N,) float32 (float64 for float64 logits) and (N,) int64.
    """
    logits = TokenLogits(logits) if isinstance(logits, Tensor) else logits
    states = logits.states
    entropy = states.new_empty(len(logits), dtype=torch.promote_types(states.dtype, torch.float32))
    prediction = torch.empty(len(logits), dtype=torch.int64, device=states.device)
    for rows in chunks(len(logits), vocab_size, chunk_size):
        part = logits[rows][:, :vocab_size]
        entropy[rows] = functional.entropy(functional.log_probs(part))
        prediction[rows] = part.argmax(-1)
    return entropy, prediction


def token_losses(
    student: TokenLogits,
    teacher: TokenLogits,
    labels: Tensor,
    temperature: Tensor,
    vocab_size: int,
    chunk_size: int | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns divergence, cross-entropy and whether the student's most likely word is the label, per token.

    Shape:
        student, teacher: N tokens. labels, temperature: (N,). Returns (N,) three times.
    """
    if student.head is None and teacher.head is None:
        kl, ce = TokenLosses.apply(student.states, teacher.states, labels, temperature, vocab_size, chunk_size, reverse)
        return kl, ce, _predicts(student.states, labels, vocab_size)

    def of_chunk(own: Tensor, target: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = student.of(own)
        with torch.no_grad():
            target = teacher.of(target)
        with torch.autocast(logits.device.type, enabled=False):
            kl, ce = TokenLosses.apply(logits, target, labels, temperature, vocab_size, None, reverse)
        return kl, ce, _predicts(logits, labels, vocab_size)

    size = chunk_size or max(1, HEAD_CHUNK_ELEMENTS // (2 * vocab_size))
    found = in_chunks(of_chunk, (student.states, teacher.states, labels, temperature), size)
    kl, ce, predicts = (torch.cat(values) for values in zip(*found, strict=True))
    return kl, ce, predicts


@torch.no_grad()
def _predicts(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    return logits[:, :vocab_size].argmax(-1) == labels


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
