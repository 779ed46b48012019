"""Losses as pure tensor functions in float32 or wider; each implements the equation of its paper."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpretrain import distributed

CHUNK_BYTES = 1 << 26


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    split: bool = False,
) -> Tensor:
    """Compute the symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3).

    L = -1/2B sum_i [log softmax_j(s <x_i, y_j>)_i + log softmax_j(s <x_j, y_i>)_i]

    Args:
        image, text: x and y, [B, e] of unit length; row i of both is a pair.
        logit_scale: s, one number.
        ids: int64 [B], id of each row's sample; rows with equal ids are copies of one sample, and not negatives of each
            other.
        chunk_bytes: size of a chunk of the similarity matrix, which is never in memory as a whole.
        split: divide the rows among the ranks, in their order and as evenly as they go. The loss and the gradients of text
            and scale are complete on every rank. The gradient of image is nonzero only for the rank's own rows. A collective.

    Returns: a scalar.

    Raises: ValueError if image or text is narrower than float32. The other chunked contrastive losses raise it, too.
    """
    chunks = _chunks(image, text, chunk_bytes, split)
    return cast(Tensor, _Contrast.apply(image, text, logit_scale, ids, None, chunks, torch.is_grad_enabled()))


def multi_positive_info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    groups: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
    split: bool = False,
) -> Tensor:
    """Compute the contrastive loss in which all pairs of a group are positives.

    The bidirectional loss of UniCL (Yang et al. 2022, arXiv:2204.03610) as a mean:

    L = -1/2B sum_i 1/|P(i)| sum_{k in P(i)} [log softmax_j(s <x_i, y_j>)_k + log softmax_j(s <x_j, y_i>)_k]

    Args:
        image, text: x and y, [B, e] of unit length; row i of both is a pair.
        logit_scale: s, one number.
        groups: int64 [B], group of each row; P(i) are the rows of the same group as row i, including i.
        chunk_bytes, split: as in `info_nce`.

    Returns: a scalar.
    """
    chunks = _chunks(image, text, chunk_bytes, split)
    return cast(Tensor, _Contrast.apply(image, text, logit_scale, None, groups, chunks, torch.is_grad_enabled()))


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    split: bool = False,
) -> Tensor:
    """Compute the pairwise sigmoid loss of SigLIP (Zhai et al. 2023, equation 1).

    L = -1/B sum_ij log sigma(z_ij (t <x_i, y_j> + b)),  z_ij = 1 on the diagonal and -1 off it

    Args:
        image, text: x and y, [B, e] of unit length; row i of both is a pair.
        logit_scale, logit_bias: t and b, one number each.
        ids, chunk_bytes, split: as in `info_nce`.

    Returns: a scalar.
    """
    chunks = _chunks(image, text, chunk_bytes, split)
    has_backward = torch.is_grad_enabled()
    return cast(Tensor, _PairwiseSigmoid.apply(image, text, logit_scale, logit_bias, ids, chunks, has_backward))


@dataclass(frozen=True)
class _Chunks:
    """Chunks of rows of the similarity matrix that this rank computes."""

    rows: list[slice]
    split: bool

    def sum(self, *tensors: Tensor) -> None:
        """Sum tensors over all ranks, in place, if the rows are split."""
        for tensor in tensors if self.split else ():
            distributed.all_reduce_sum(tensor)


def _chunks(rows: Tensor, columns: Tensor, chunk_bytes: int, split: bool) -> _Chunks:
    """Divide `rows`, or if split this rank's part of them, into chunks.

    The similarities of a chunk to all `columns` take at most `chunk_bytes`, or one row if that is more.
    """
    for tensor in (rows, columns):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"rows are {tensor.dtype}; expected torch.float32 or float64: a contrastive loss needs them"
            )
    size = max(1, chunk_bytes // (len(columns) * columns.element_size()))
    rank, world = (distributed.rank(), distributed.world_size()) if split else (0, 1)
    # Parts differ by at most one row if the ranks do not divide the batch.
    first, end = len(columns) * rank // world, len(columns) * (rank + 1) // world
    return _Chunks([slice(start, min(start + size, end)) for start in range(first, end, size)], split)


def _copies(ids: Tensor, rows: slice) -> Tensor:
    """Return a mask of the columns that are other copies of a row's sample, bool [c, B] for c rows."""
    copies = ids[rows, None] == ids[None, :]
    copies.diagonal(rows.start).fill_(False)
    return copies


class _Contrast(torch.autograd.Function):
    """Contrastive loss over the similarities l_ij = s <x_i, y_j>, and its gradients, computed in chunks of rows.

    A first pass computes log-sum-exp of the rows, a_i, and of the columns, b_j. A second pass recomputes each chunk for the
    gradients:

        L = 1/2B [sum_i a_i + sum_j b_j - sum_ij t_ij l_ij],     t_ij = 1/|P(i)| + 1/|P(j)| for j in P(i), else 0
        d L / d l_ij = 1/2B [exp(l_ij - a_i) + exp(l_ij - b_j) - t_ij]

    Without groups P(i) = {i}. Other copies of a sample have l = -inf.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        s: Tensor,
        ids: Tensor | None,
        groups: Tensor | None,
        chunks: _Chunks,
        has_backward: bool,
    ) -> Tensor:
        # Two buffers that all chunks of similarities reuse.
        longest = max((rows.stop - rows.start for rows in chunks.rows), default=0)
        blocks = [x.new_empty(longest, len(y)) for _ in range(2)]

        def similarities(rows: slice) -> Tensor:
            scaled = s * x[rows]
            logits = torch.mm(scaled, y.T, out=blocks[0][: len(scaled)])
            return logits if ids is None else logits.masked_fill_(_copies(ids, rows), -torch.inf)

        # The initial maximum is finite: a column may have only copies (-inf) in the first chunks, and inf - inf is NaN.
        a, most, total = x.new_zeros(len(x)), x.new_full((len(x),), torch.finfo(x.dtype).min / 2), x.new_zeros(len(x))
        # For each row and column, the sum of the similarities to its positives, and their number.
        right_rows, right_columns, num_right = (x.new_zeros(len(x)) for _ in range(3))
        for rows in chunks.rows:
            logits = similarities(rows)
            # torch.logsumexp would need a third buffer.
            highest = logits.amax(dim=1)
            exponentials = torch.sub(logits, highest[:, None], out=blocks[1][: len(logits)]).exp_()
            a[rows] = highest + exponentials.sum(dim=1).log()
            # A running maximum is subtracted. With a fixed one exp would underflow at a scale of 100.
            higher = torch.maximum(most, logits.amax(dim=0))
            total = total * (most - higher).exp() + torch.sub(logits, higher, out=exponentials).exp_().sum(dim=0)
            most = higher
            if groups is None:
                right_rows[rows] = right_columns[rows] = logits.diagonal(rows.start)
                num_right[rows] = 1
            else:
                is_right = groups[rows, None] == groups[None, :]
                right = torch.mul(logits, is_right, out=exponentials)
                right_rows[rows], num_right[rows] = right.sum(dim=1), is_right.sum(dim=1).to(x.dtype)
                right_columns += right.sum(dim=0)
        if chunks.split:
            highest = distributed.all_reduce_max(most.clone())
            total, most = total * (most - highest).exp(), highest
        chunks.sum(total, a, right_rows, right_columns, num_right)
        b = most + total.log()
        loss = (a + b - (right_rows + right_columns) / num_right).sum() / (2 * len(x))
        if not has_backward:
            return loss
        d_x, d_y, d_s = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(s)
        for rows in chunks.rows:
            if len(chunks.rows) > 1:  # a single chunk is still in its buffer
                logits = similarities(rows)
            d_logits = torch.sub(logits, a[rows, None], out=blocks[1][: len(logits)]).exp_()
            d_logits += logits.sub_(b).exp_()
            if groups is None:
                d_logits.diagonal(rows.start).sub_(2.0)
            else:
                share = 1 / num_right
                shares = torch.add(share[rows, None], share, out=logits)
                d_logits.sub_(shares.mul_(groups[rows, None] == groups[None, :]))
            d_logits /= 2 * len(x)
            to_rows = d_logits @ y
            d_s += (to_rows * x[rows]).sum()
            d_x[rows] = s * to_rows
            d_y.addmm_(d_logits.T, s * x[rows])
        chunks.sum(d_y, d_s)
        ctx.save_for_backward(d_x, d_y, d_s)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * d_loss for gradient in ctx.saved_tensors), None, None, None, None


class _PairwiseSigmoid(torch.autograd.Function):
    """`sigmoid_loss` and its gradients, computed in chunks of rows: d L / d l_ij = -z_ij sigma(-z_ij l_ij) / B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        b: Tensor,
        ids: Tensor | None,
        chunks: _Chunks,
        has_backward: bool,
    ) -> Tensor:
        loss = x.new_zeros(())
        d_x, d_y, d_t, d_b = (torch.zeros_like(tensor) for tensor in (x, y, t, b))
        for rows in chunks.rows:
            signed = ((t * x[rows]) @ y.T + b).neg_()  # z l, with z = -1 off the diagonal
            signed.diagonal(rows.start).neg_()
            if ids is not None:
                signed.masked_fill_(_copies(ids, rows), torch.inf)  # log sigma(inf) = 0
            loss -= F.logsigmoid(signed).sum() / len(x)
            if not has_backward:
                continue
            d_logits = signed.neg_().sigmoid_().div_(len(x))
            d_logits.diagonal(rows.start).neg_()
            to_rows = d_logits @ y
            d_t += (to_rows * x[rows]).sum()
            d_b += d_logits.sum()
            d_x[rows] = t * to_rows
            d_y.addmm_(d_logits.T, t * x[rows])
        chunks.sum(loss, d_y, d_t, d_b)
        ctx.save_for_backward(d_x, d_y, d_t, d_b)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * d_loss for gradient in ctx.saved_tensors), None, None, None


def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float,
    ids: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    split: bool = False,
) -> Tensor:
    """Compute the normalised temperature-scaled cross-entropy of two views (SimCLR, Chen et al. 2020, equation 1).

    L = -1/2B sum_i log [ exp(<z_i, z_j(i)> / tau) / sum_{k != i} exp(<z_i, z_k> / tau) ]

    Args:
        first, second: z, [B, e] of unit length; row i of both is one image, and j(i) is the other view of i.
        temperature: tau.
        ids, chunk_bytes, split: as in `info_nce`, except that with `split` the gradients are complete on every rank.

    Returns: a scalar.
    """
    rows = torch.cat([first, second])
    if ids is None:
        ids = torch.arange(len(first), device=rows.device)
    chunks = _chunks(rows, rows, chunk_bytes, split)
    return cast(Tensor, _NTXent.apply(rows, torch.cat([ids, ids]), temperature, chunks, torch.is_grad_enabled()))


class _NTXent(torch.autograd.Function):
    """`nt_xent` of the rows of both views [2B, e] and its gradient, computed in chunks of rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, temperature: float, chunks: _Chunks, has_backward: bool) -> Tensor:
        all_rows = rows.detach().requires_grad_(has_backward)
        total, d_rows = rows.new_zeros(()), torch.zeros_like(rows)
        indices = torch.arange(len(rows), device=rows.device)
        partners = indices.roll(len(rows) // 2)
        for part in chunks.rows:
            # A view itself and other copies of its image are left out; its partner has the same id and is not.
            is_left_out = ids[part, None] == ids[None, :]
            is_left_out.scatter_(1, partners[part, None], False)
            with torch.set_grad_enabled(has_backward):
                logits = all_rows[part] @ all_rows.T / temperature
                loss = F.cross_entropy(
                    logits.masked_fill(is_left_out, -torch.inf), partners[part], reduction="sum"
                ) / len(rows)
            total += loss.detach()
            if has_backward:
                d_rows += torch.autograd.grad(loss, all_rows)[0]
        chunks.sum(total, d_rows)
        ctx.save_for_backward(d_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (d_rows,) = ctx.saved_tensors
        return d_rows * d_loss, None, None, None, None


def token_cross_entropy(
    states: Tensor, embeddings: Tensor, labels: Tensor, bias: Tensor | None = None, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy over a vocabulary in chunks of tokens, so that the logits are never in memory as a whole.

    L = -sum_i log softmax_v(<h_i, e_v> + b_v)_{y_i}

    The gradients of each chunk are computed in the forward pass, while its logits are in memory.

    Args:
        states: h, [n, d].
        embeddings: e, [vocabulary, d].
        labels: y, int64 [n].
        bias: b, [vocabulary].
        chunk_bytes: size of the float32 logits of a chunk.

    Returns: (L, a scalar, float32 or wider; number of labels with the largest logit, an int64 scalar).
    """
    device_type = states.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states.dtype
    chunk_size = max(1, chunk_bytes // (len(embeddings) * 4))
    loss, hits = _TokenCrossEntropy.apply(states, embeddings, bias, labels, dtype, chunk_size, torch.is_grad_enabled())
    return loss, hits


class _TokenCrossEntropy(torch.autograd.Function):
    """`token_cross_entropy` and its gradients, which are computed only with `has_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        embeddings: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype,
        chunk_size: int,
        has_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=states.device)
        hits = torch.zeros((), dtype=torch.int64, device=states.device)
        gradients = [
            None if tensor is None or not has_backward else torch.zeros_like(tensor)
            for tensor in (states, embeddings, bias)
        ]
        d_states, d_embeddings, d_bias = gradients
        table = embeddings.to(dtype)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), chunk_size):
                h, y = states[start : start + chunk_size].to(dtype), labels[start : start + chunk_size, None]
                logits = (h @ table.T).to(wide)
                if bias is not None:
                    logits += bias
                log_z = logits.logsumexp(dim=1, keepdim=True)
                loss += (log_z - logits.gather(1, y)).sum()
                hits += (logits.argmax(dim=1) == y[:, 0]).sum()
                if d_states is None or d_embeddings is None:
                    continue
                d_logits = logits.sub_(log_z).exp_()
                d_logits.scatter_add_(1, y, -torch.ones_like(log_z))
                narrow = d_logits.to(dtype)
                d_states[start : start + chunk_size] = narrow @ table
                d_embeddings += narrow.T @ h
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if tensor is None else tensor * d_loss for tensor in ctx.saved_tensors)
        return (*gradients, None, None, None, None)
