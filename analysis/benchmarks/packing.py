r"""Captions of different lengths through a text encoder: in length groups, or several packed into one row.

    python -m analysis.benchmarks.packing [--model emoji_clip] [--captions data/emoji/train] [--output packing.json]

The same weights and the same batch of captions, forward and backward, in turn, for a causal and for a bidirectional encoder:

- `padded`: every caption has the whole context, as open_clip computes it;
- `groups n`: sorted by length, in n slices that are each cut to their own longest (`data.text_groups`; 1: the longest of all);
- `rows l`: packed into rows of l tokens, first fit with the longest first; attention is kept inside captions by a mask
  [rows, 1, l, l] (on CUDA also `flex`: all captions one row, attention by FlexAttention's block masks, compiled).

Every way runs all of the last block. All give the same end-token states, to 1e-4 of the largest in float32 or the benchmark
ends. `tokens` is what each computes; the captions themselves have as many as the table's head says.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from analysis.benchmarks.machine import describe, one_line
from analysis.benchmarks.step import Work, build_model, real_batches, synthetic_batches
from mmpretrain.data.stream import length_cuts
from mmpretrain.models.attention import attention
from mmpretrain.models.text import TextTransformer
from mmpretrain.precision import autocast
from mmpretrain.profiling import synchronize

AGREEMENT = 1e-4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [T, heads, d] -> [T, heads, d]."""


@dataclass(frozen=True)
class Captions:
    """A batch of captions, sorted by length."""

    ids: Tensor
    """int64 [b, L]."""
    lengths: Tensor
    """int64 [b]."""


@dataclass(frozen=True)
class Packed:
    """The same captions as one matrix of T tokens, in rows of `row_length`."""

    ids: Tensor
    """int64 [T]."""
    places: Tensor
    """int64 [T], a token's number in its caption."""
    caption: Tensor
    """int64 [T], whose token it is; -1: padding."""
    ends: Tensor
    """int64 [b], where each caption's end token stands."""
    row_length: int


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Which captions stand in which row, the longest placed first, each in the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for caption in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[caption]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(caption)
        room[row] -= lengths[caption]
    return rows


def pack(captions: Captions, row_length: int | None) -> Packed:
    """Captions in rows of `row_length` tokens; None: all of them in one."""
    lengths = captions.lengths.tolist()
    row_length = row_length or sum(lengths)
    rows = first_fit(lengths, row_length)
    ids, places = (torch.zeros(len(rows), row_length, dtype=torch.int64) for _ in range(2))
    caption = torch.full_like(ids, -1)
    ends = torch.zeros(len(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        start = 0
        for j in row:
            end = start + lengths[j]
            ids[i, start:end], caption[i, start:end] = captions.ids[j, : lengths[j]], j
            places[i, start:end] = torch.arange(lengths[j])
            ends[j], start = i * row_length + end - 1, end
    device = captions.ids.device
    flat = (tensor.flatten().to(device) for tensor in (ids, places, caption))
    return Packed(*flat, ends.to(device), row_length)


def in_rows(packed: Packed, causal: bool) -> Attend:
    """Attention row by row, inside captions."""
    caption = packed.caption.unflatten(0, (-1, packed.row_length))
    mask = caption[:, :, None] == caption[:, None, :]
    if causal:
        mask = mask.tril()

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (tensor.unflatten(0, (-1, packed.row_length)).transpose(1, 2) for tensor in qkv)
        return attention(q, k, v, mask[:, None]).transpose(1, 2).flatten(0, 1)

    return attend


def with_flex(packed: Packed, causal: bool) -> Attend:
    """FlexAttention over one row of all captions, which skips blocks in which nothing may be seen."""
    caption, num_tokens = packed.caption, len(packed.ids)

    def may_see(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = caption[query] == caption[key]
        return inside & (query >= key) if causal else inside

    mask = create_block_mask(may_see, None, None, num_tokens, num_tokens, device=str(packed.ids.device))
    compiled = torch.compile(flex_attention)

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in qkv)
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


def packed_states(text: TextTransformer, packed: Packed, attend: Attend) -> Tensor:
    """The end tokens' states [b, d], by the encoder's own parts."""
    x = text.token_embedding(packed.ids) + F.embedding(packed.places, text.positional_embedding)
    for block in text.transformer["resblocks"]:  # type: ignore[union-attr]
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
        x = x + attn.out_proj(attend(*qkv.unbind(1)).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return text.ln_final(x[packed.ends])


def grouped_states(text: TextTransformer, captions: Captions, cuts: tuple[int, ...]) -> Tensor:
    """The same by length groups."""
    tokens = text(captions.ids[:, : cuts[-1]], captions.lengths, cuts).tokens
    return tokens[torch.arange(len(tokens)), captions.lengths - 1]


def ways(text: TextTransformer, captions: Captions, rows: Sequence[int]) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """By name: how many tokens each way computes, and the states that it gives."""
    num, context = len(captions.ids), text.context_length
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "padded": (num * context, partial(grouped_states, text, captions, (context,)))
    }
    for groups in (1, 4, 8):
        cuts = length_cuts(captions.lengths.cpu(), groups, context)
        sizes = [len(part) for part in captions.lengths.tensor_split(len(cuts))]
        num_tokens = sum(size * cut for size, cut in zip(sizes, cuts, strict=True))
        found[f"groups {groups}"] = num_tokens, partial(grouped_states, text, captions, cuts)
    for row_length in rows:
        packed = pack(captions, row_length)
        found[f"rows {row_length}"] = (
            len(packed.ids), partial(packed_states, text, packed, in_rows(packed, text.causal)),
        )  # fmt: skip
    if captions.ids.is_cuda:
        packed = pack(captions, None)
        found["flex"] = len(packed.ids), partial(packed_states, text, packed, with_flex(packed, text.causal))
    return found


def measure(
    text: TextTransformer, captions: Captions, precision: str, rows: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens and median seconds of each way. Raises: SystemExit if their states differ."""
    device = captions.ids.device
    found = ways(text, captions, rows)
    context = autocast(device, precision)  # type: ignore[arg-type]
    expected, difference = None, 0.0
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):  # the first warms up
        for name in list(found) if turn % 2 == 0 else reversed(found):
            text.zero_grad()
            synchronize(device)
            started = time.perf_counter()
            with context:
                states = found[name][1]()
            states.float().square().sum().backward()
            synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
            elif expected is None:
                expected = states.detach()
            else:
                difference = max(difference, float((states - expected).abs().max() / expected.abs().max()))
    if precision == "fp32" and difference > AGREEMENT:
        raise SystemExit(f"states differ by {difference:.1e} of the largest; expected {AGREEMENT:.0e} at most")
    medians = {name: {"tokens": found[name][0], "seconds": statistics.median(seconds[name])} for name in found}
    return {name: {**value, "difference": difference} for name, value in medians.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="emoji_clip", help="emoji_clip or a conf/model of ours with a text encoder of ours"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--captions", default="24", help="a folder of tars, or the longest: lengths from 4 to that, alike"
    )
    parser.add_argument("--rows", default="80,160,320", help="tokens of a row of packed captions, at least the context")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    model = build_model(args.model)
    text = model.text
    if not isinstance(text, TextTransformer):
        parser.error(f"--model {args.model}: expected one whose text encoder is a TextTransformer, such as emoji_clip")
    work = Work(args.model, args.batch, args.captions, 1, "fp32", device)
    batch = (synthetic_batches if args.captions.isdigit() else real_batches)(work, model, 1)[0]
    samples = batch.streams["pairs"]
    assert samples.text is not None and samples.lengths is not None
    ids = F.pad(samples.text, (0, text.context_length - samples.text.shape[1]))
    captions = Captions(ids.to(device), samples.lengths.to(device))
    text.to(device)
    print(one_line())
    results: dict[str, dict[str, dict[str, float]]] = {}
    for causal in (True, False):
        text.causal = causal
        for precision in args.precision.split(","):
            kind = f"{'causal' if causal else 'bidirectional'}, {precision}"
            medians = results[kind] = measure(
                text, captions, precision, list(map(int, args.rows.split(","))), args.rounds
            )
            print(f"\n{args.model}, {args.batch} captions of {int(captions.lengths.sum()):,} tokens, {kind}")
            print(f"{'':<12}{'tokens':>9}{'ms':>9}{'of padded':>11}")
            for name, value in medians.items():
                share = value["seconds"] / medians["padded"]["seconds"]
                print(f"{name:<12}{value['tokens']:>9,}{1000 * value['seconds']:>9.1f}{share:>11.2f}")
    if args.output:
        record = {"machine": describe(), "arguments": {key: str(value) for key, value in vars(args).items()}}
        args.output.write_text(json.dumps({**record, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
