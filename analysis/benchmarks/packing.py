r"""Measure a text encoder on captions of different lengths: padded, in length groups, or packed into rows.

    python -m analysis.benchmarks.packing [--captions data/emoji/train] [--output packing.json]

Forward and backward with the same weights and captions, in turn, for a causal and a bidirectional encoder:

- `padded`: every caption has the whole context, as open_clip computes it;
- `groups n`: sorted by length, in n slices, each cut to its longest caption, rounded up to 8. Attention runs slice by
  slice, and everything else on all slices at once;
- `packed`: mmpretrain's method. Rows of the longest caption's length, filled first-fit decreasing;
- `rows l`: the same with rows of l tokens;
- `flex`, on CUDA: all captions in one row, attention by FlexAttention's block masks, compiled.

Each computes all of the last block. The benchmark fails unless all give the same end-token states and gradients of the
weights in float32, to 1e-4 of the largest. `tokens` is the number of tokens that each computes; the head of the table has
the number of tokens of the captions.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import demand, one_line, write_record
from analysis.benchmarks.step import OPEN_CLIP_PRECISION, Work, build_model, real_batches, synthetic_batches
from mmpretrain.batch import Packing
from mmpretrain.config.schema import Precision
from mmpretrain.data.packing import packed, row_length
from mmpretrain.models.attention import attention
from mmpretrain.models.blocks import of_picks
from mmpretrain.models.rows import Rows
from mmpretrain.models.text import TextTransformer
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.training.precision import autocast

AGREEMENT = 1e-4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [T, heads, d] -> [T, heads, d]."""


@dataclass(frozen=True)
class Tokens:
    """Captions as a matrix of T tokens."""

    ids: Tensor
    """int64 [T]."""
    places: Tensor
    """int64 [T], a token's number in its caption."""
    ends: Tensor
    """int64 [b], where each caption's end token stands."""
    attend: Attend


def in_slices(ids: Tensor, lengths: Tensor, num_slices: int, causal: bool) -> Tokens:
    """Split captions [b, L], sorted by length, into equal slices, each cut to its longest caption."""
    parts = lengths.tensor_split(num_slices)
    shapes = [(len(part), row_length(part, ids.shape[1])) for part in parts]
    places = [torch.arange(cut, device=ids.device).repeat(num) for num, cut in shapes]
    starts = torch.tensor([cut for num, cut in shapes for _ in range(num)], device=ids.device).cumsum(0)
    starts = starts - starts.new_tensor([cut for num, cut in shapes for _ in range(num)])
    rows = zip(ids.split([num for num, _ in shapes]), shapes, strict=True)
    masks = [
        None if causal else (torch.arange(cut, device=ids.device) < part[:, None])[:, None, None]
        for part, (_, cut) in zip(parts, shapes, strict=True)
    ]

    def attend(*qkv: Tensor) -> Tensor:
        seen = []
        slices = zip(*(tensor.split([num * cut for num, cut in shapes]) for tensor in qkv), strict=True)
        for part, shape, mask in zip(slices, shapes, masks, strict=True):
            q, k, v = (tensor.unflatten(0, shape).transpose(1, 2) for tensor in part)
            seen.append(attention(q, k, v, mask, causal).transpose(1, 2).flatten(0, 1))
        return torch.cat(seen)

    joined = torch.cat([part[:, :cut].flatten() for part, (_, cut) in rows])
    return Tokens(joined, torch.cat(places), starts + lengths - 1, attend)


def in_one_row(ids: Tensor, lengths: Tensor, causal: bool) -> Tokens:
    """Concatenate captions [b, L]. FlexAttention skips blocks that are fully masked."""
    num_tokens = int(lengths.sum())
    caption = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), lengths, output_size=num_tokens)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(num_tokens, device=ids.device) - starts[caption]

    def may_see(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = caption[query] == caption[key]
        return inside & (query >= key) if causal else inside

    mask = create_block_mask(may_see, None, None, num_tokens, num_tokens, device=str(ids.device))
    compiled = torch.compile(flex_attention)

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in qkv)
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return Tokens(ids[caption, places], places, starts + lengths - 1, attend)


def states_of_tokens(text: TextTransformer, tokens: Tokens) -> Tensor:
    """Return the states of the end tokens, [b, d], computed with the encoder's parts."""
    x = text.token_embedding(tokens.ids) + F.embedding(tokens.places, text.positional_embedding)
    for block in text.blocks:
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
        x = x + attn.out_proj(tokens.attend(*qkv.unbind(1)).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return text.ln_final(x[tokens.ends])


def states_of_rows(text: TextTransformer, ids: Tensor, lengths: Tensor, packing: Packing | None) -> Tensor:
    """Return the same for captions [b, L] in rows of one or several captions."""
    rows = Rows(lengths, ids.shape[1], packing)
    x = text.token_embedding(rows.pack(ids)) + F.embedding(rows.positions, text.positional_embedding)
    mask = rows.mask(text.causal)
    for block in text.blocks:
        x = block(x, mask, text.causal and mask is None)
    return text.ln_final(rows.unpack_tokens(of_picks(x, rows.token_indices(lengths - 1))))


def ways(
    text: TextTransformer, ids: Tensor, lengths: Tensor, rows: Sequence[int]
) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Return (number of tokens, function that computes the states) by name. Captions are [b, context], by length."""
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "padded": (ids.numel(), partial(states_of_rows, text, ids, lengths, None))
    }
    for num in (1, 4, 8):
        tokens = in_slices(ids, lengths, num, text.causal)
        found[f"groups {num}"] = len(tokens.ids), partial(states_of_tokens, text, tokens)
    longest = row_length(lengths, text.context_length)
    for name, length in {"packed": longest, **{f"rows {length}": length for length in rows}}.items():
        packing = packed(lengths.cpu(), length)
        if packing is not None:
            there = packing.map(lambda tensor: tensor.to(ids.device))
            way = partial(states_of_rows, text, ids[:, :longest], lengths, there)
            found[name] = packing.num_rows * length, way
    if ids.is_cuda:
        tokens = in_one_row(ids, lengths, text.causal)
        found["flex"] = len(tokens.ids), partial(states_of_tokens, text, tokens)
    return found


def measure(
    text: TextTransformer, ids: Tensor, lengths: Tensor, precision: Precision, rows: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Return the tokens and median seconds of each way. Raises: SystemExit if their states differ."""
    found = ways(text, ids, lengths, rows)
    context = autocast(ids.device, precision)
    expected: list[Tensor] | None = None
    differences = [0.0]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):  # the first round warms up
        for name in list(found) if turn % 2 == 0 else reversed(found):
            text.zero_grad()
            synchronize(ids.device)
            started = time.perf_counter()
            with context:
                states = found[name][1]()
            states.float().square().sum().backward()
            synchronize(ids.device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
                continue
            gradients = torch.cat([p.grad.flatten() for p in text.parameters() if p.grad is not None])
            given = [states.detach(), gradients]
            expected = expected or given
            differences += [float((a - b).abs().max() / b.abs().max()) for a, b in zip(given, expected, strict=True)]
    difference = float(torch.tensor(differences).max())  # unlike max(), propagates NaN
    if precision == "fp32":
        demand("states or gradients", difference, AGREEMENT)
    medians = {name: {"tokens": found[name][0], "seconds": statistics.median(seconds[name])} for name in found}
    return {name: {**value, "difference": difference} for name, value in medians.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=arguments.positive, default=128)
    parser.add_argument(
        "--captions", type=arguments.captions, default="24", help="a folder of tars, or the tokens of every caption"
    )
    parser.add_argument(
        "--rows", type=arguments.listed(arguments.positive), default="160", help="further lengths of rows (default 160)"
    )
    precision = arguments.listed(arguments.one_of(*OPEN_CLIP_PRECISION))
    parser.add_argument("--precision", type=precision, default="fp32,bf16")
    parser.add_argument("--rounds", type=arguments.positive, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = build_model("emoji_clip")
    text = model.text
    assert isinstance(text, TextTransformer)
    work = Work("emoji_clip", args.batch, args.captions, "fp32", device)
    samples = (synthetic_batches if args.captions.isdigit() else real_batches)(work, model, 1)[0].streams["pairs"]
    assert samples.text is not None and samples.lengths is not None
    by_length = samples.lengths.argsort()
    lengths = samples.lengths[by_length].to(device)
    if min(args.rows) < lengths.max():
        parser.error(f"--rows {min(args.rows)}: expected {int(lengths.max())} at least, the longest caption's length")
    ids = F.pad(samples.text[by_length], (0, text.context_length - samples.text.shape[1])).to(device)
    text.to(device)
    print(one_line())
    results: dict[str, dict[str, dict[str, float]]] = {}
    for causal in (True, False):
        text.causal = causal
        if "fp32" not in args.precision:
            measure(text, ids, lengths, "fp32", args.rows, 1)  # only for its checks
        for precision in args.precision:
            kind = f"{'causal' if causal else 'bidirectional'}, {precision}"
            medians = results[kind] = measure(text, ids, lengths, precision, args.rows, args.rounds)
            print(f"\nemoji_clip's text encoder, {args.batch} captions of {int(lengths.sum()):,} tokens, {kind}")
            print(f"{'':<12}{'tokens':>9}{'ms':>9}{'of padded':>11}")
            for name, value in medians.items():
                share = value["seconds"] / medians["padded"]["seconds"]
                print(f"{name:<12}{value['tokens']:>9,}{1000 * value['seconds']:>9.1f}{share:>11.2f}", flush=True)
    write_record(args, results=results)


if __name__ == "__main__":
    main()
