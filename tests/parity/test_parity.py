"""Objectives against code written elsewhere, with copied weights and shared noise."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from open_clip.loss import CoCaLoss
from torch import Tensor
from transformers import BertTokenizer, DataCollatorForLanguageModeling, ViTMAEConfig, ViTMAEForPreTraining

from mmpretrain.losses import nt_xent
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import TokenMaskSpec, mask_tokens
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.objectives.captioning import Captioning
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.seeds import hash64, torch_draws
from mmpretrain.training.task import Encodings, Task
from tests import tiny
from tests.distributed.steps import make_batches, make_task

# ---------------------------------------------------------------------------------------------- MAE


def hugging_face_names(ours: Mapping[str, Tensor], depth: int, decoder_depth: int) -> dict[str, Tensor]:
    """The weights of our ViT and MAE decoder under transformers' names."""
    trunk, mae = "model.image.trunk.", "objectives.mae."
    theirs = {
        "vit.embeddings.cls_token": ours[trunk + "cls_token"],
        "vit.embeddings.position_embeddings": ours[trunk + "pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": ours[trunk + "patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": ours[trunk + "patch_embed.proj.bias"],
        "vit.layernorm.weight": ours[trunk + "norm.weight"],
        "vit.layernorm.bias": ours[trunk + "norm.bias"],
        "decoder.mask_token": ours[mae + "mask_token"],
        "decoder.decoder_pos_embed": F.pad(ours[mae + "positions"], (0, 0, 1, 0)),
    }
    for name, own in (
        ("decoder.decoder_embed", "decoder_embed"),
        ("decoder.decoder_norm", "norm"),
        ("decoder.decoder_pred", "predict"),
    ):
        theirs |= {f"{name}.{kind}": ours[f"{mae}{own}.{kind}"] for kind in ("weight", "bias")}
    layers = [(f"vit.layers.{i}.", f"{trunk}blocks.{i}.") for i in range(depth)]
    layers += [(f"decoder.decoder_layers.{i}.", f"{mae}blocks.{i}.") for i in range(decoder_depth)]
    for their, own in layers:
        for kind in ("weight", "bias"):
            q, k, v = ours[f"{own}attn.qkv.{kind}"].chunk(3)
            theirs |= {
                f"{their}attention.q_proj.{kind}": q,
                f"{their}attention.k_proj.{kind}": k,
                f"{their}attention.v_proj.{kind}": v,
                f"{their}attention.o_proj.{kind}": ours[f"{own}attn.proj.{kind}"],
                f"{their}mlp.fc1.{kind}": ours[f"{own}mlp.fc1.{kind}"],
                f"{their}mlp.fc2.{kind}": ours[f"{own}mlp.fc2.{kind}"],
                f"{their}layernorm_before.{kind}": ours[f"{own}norm1.{kind}"],
                f"{their}layernorm_after.{kind}": ours[f"{own}norm2.{kind}"],
            }
    return theirs


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_is_the_vitmae_of_transformers(norm_pix: bool) -> None:
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": True}
    image = TimmEncoder("vit_base_patch16_224", 32, shape)
    model = ImageTextModel(image, None, embed_dim=8)
    mae = MAE(model, mask_ratio=0.75, decoder_width=16, decoder_depth=2, decoder_heads=2, norm_pix=norm_pix)
    task = tiny.randomize(Task(model, {"mae": mae})).double()
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, mask_ratio=0.75,
        decoder_intermediate_size=64, norm_pix_loss=norm_pix, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config).double().eval()
    weights = {**task.state_dict(), "objectives.mae.positions": mae.positions.double()}
    theirs.load_state_dict(hugging_face_names(weights, 2, 2))

    batch = tiny.batch([3] * 6)
    encodings = Encodings(model, batch)
    prediction, mask = mae.reconstruct(encodings)
    # Their masks are argsorts of noise: ours are argsorts of 64 random bits.
    noise = torch_draws(batch.streams["pairs"].seeds, 16, hash64("patch-mask", "mae")).argsort(1).argsort(1).double()
    out = theirs(encodings.pixels("pairs"), noise=noise)
    assert torch.equal(mask.hidden, out.mask.bool())
    torch.testing.assert_close(prediction, out.logits, rtol=0, atol=1e-6)
    assert float(mae.loss(encodings).detach() / mae.count(batch)) == pytest.approx(float(out.loss.detach()), rel=1e-6)


# ---------------------------------------------------------------------------------------------- MLM


def bert_tokenizer(folder: Path) -> BertTokenizer:
    words = [f"word{i}" for i in range(200)] + [f"##part{i}" for i in range(200)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizer(str(folder / "vocab.txt"))


@pytest.mark.parametrize("ratio", [0.15, 0.4])
def test_mlm_chooses_and_hides_as_the_collator_of_transformers(ratio: float, tmp_path: Path) -> None:
    """The same parts of the tokens: chosen, and of those masked, made random and kept; special ones never."""
    tokenizer = bert_tokenizer(tmp_path)
    torch.manual_seed(0)
    rows, length = 2000, 40
    ids = torch.randint(5, 405, (rows, length))
    ids[:, 0], ids[:, -1] = 2, 3
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=ratio)
    out = collator([{"input_ids": row.tolist()} for row in ids])
    theirs = statistics(ids, out["input_ids"], out["labels"] != -100)
    lengths, seeds = torch.full((rows,), length), torch.randint(-(1 << 62), 1 << 62, (rows,))
    mask = mask_tokens(ids, lengths, seeds, TokenMaskSpec("mlm", ratio, 4, 405), None)
    ours = statistics(ids, mask.ids, mask.chosen)
    assert not mask.chosen[:, 0].any() and not mask.chosen[:, -1].any()
    num_chosen = ratio * rows * (length - 2)
    for name, (mine, deviation) in {
        "chosen": (ours["chosen"], (ratio * (1 - ratio) / (rows * (length - 2))) ** 0.5),
        "masked": (ours["masked"], (0.8 * 0.2 / num_chosen) ** 0.5),
        "random": (ours["random"], (0.1 * 0.9 / num_chosen) ** 0.5),
        "kept": (ours["kept"], (0.1 * 0.9 / num_chosen) ** 0.5),
    }.items():
        # Two samples of one distribution: within four deviations of their difference.
        assert abs(mine - theirs[name]) < 4 * 2**0.5 * deviation, name


def statistics(ids: Tensor, hidden: Tensor, chosen: Tensor) -> dict[str, float]:
    """Parts of the tokens that may be chosen, and of the chosen ones."""
    masked, kept = hidden == 4, (hidden == ids) & chosen
    return {
        "chosen": float(chosen[:, 1:-1].double().mean()),
        "masked": float(masked[chosen].double().mean()),
        "kept": float(kept[chosen].double().mean()),
        "random": float((~masked & ~kept)[chosen].double().mean()),
    }


# ---------------------------------------------------------------------------------------------- SimCLR


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_is_the_ntxent_of_lightly(temperature: float) -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = nt_xent(F.normalize(first, dim=-1), F.normalize(second, dim=-1), temperature)
    theirs = NTXentLoss(temperature=temperature)(first, second)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (first, second)), torch.autograd.grad(theirs, (first, second)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------------------------------- captioning


def test_captioning_beside_infonce_is_the_loss_of_coca() -> None:
    """open_clip's CoCaLoss on our own logits, with a padding id that is no real token."""
    task = make_task(("infonce", "coca"))
    (batch,) = make_batches(1)
    samples = batch.streams["pairs"]
    batch = replace(batch, streams={"pairs": replace(samples, ids=samples.positions)})
    samples = batch.streams["pairs"]
    encodings = Encodings(task.model, batch)
    captioning, infonce = task.objectives["coca"], task.objectives["infonce"]
    assert isinstance(captioning, Captioning) and isinstance(infonce, InfoNCE)
    logits = (captioning.decode(encodings) @ encodings.token_embeddings.T)[:, :-1]
    assert samples.text is not None and samples.lengths is not None
    is_token = torch.arange(samples.text.shape[1]) < samples.lengths[:, None]
    labels = samples.text.masked_fill(~is_token, -1)[:, 1:]
    coca = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=-1)
    theirs = coca(
        encodings.image_embedding("pairs"), encodings.text_embedding("pairs"), logits, labels,
        infonce.logit_scale.exp(), output_dict=True,
    )  # fmt: skip
    terms, _ = captioning.loss(encodings)
    assert (2 * terms / captioning.count(batch)).item() == pytest.approx(theirs["caption_loss"].item(), rel=1e-10)
    contrastive = infonce.loss(*infonce.embed(encodings))
    assert contrastive.item() == pytest.approx(theirs["contrastive_loss"].item(), rel=1e-10)
