"""Image encoders: timm's own outputs, and patches that are dropped."""

import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from mmpretrain.models.masking import MaskSpec, PatchMask, random_patch_mask
from mmpretrain.models.patch_projection import PatchProjection
from mmpretrain.models.vit import PickingBlock, TimmEncoder, sincos_positions
from mmpretrain.seeds import torch_seed
from tests import tiny

POOLS = [
    {"global_pool": "token"},
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False, "reg_tokens": 2, "no_embed_class": True, "pre_norm": True},
    {"global_pool": "map", "class_token": False},
]


def images(b: int) -> Tensor:
    return torch.randn(b, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, dtype=torch.float64)


def ragged_mask(num_keep: list[int], seed: int = 0) -> PatchMask:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(tiny.NUM_PATCHES, generator=generator) for _ in num_keep])
    counts = torch.tensor(num_keep)
    return PatchMask(order[:, : max(num_keep)], counts, order.argsort(1) >= counts[:, None])


def on_tokens_alone(encoder: TimmEncoder, image: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    """(tokens, pooled) of one image, only ever computed on the tokens that stay."""
    trunk = encoder.trunk
    x = trunk._pos_embed(trunk.patch_embed(image[None]))
    prefix = encoder.num_prefix_tokens
    x = x[:, [*range(prefix), *(prefix + place for place in kept)]]
    x = trunk.norm(trunk.blocks(trunk.norm_pre(x)))
    pooled = x[:, 0] if trunk.global_pool == "token" else x[:, prefix:].mean(1)
    if trunk.global_pool == "map":
        pooled = trunk.attn_pool(x)
    return x[0], trunk.fc_norm(pooled)[0]


@pytest.mark.parametrize("args", POOLS)
def test_encoder_without_mask_is_timms_model(args: dict[str, object]) -> None:
    encoder = tiny.vit(**args).double()
    x = images(3)
    encoding = encoder(x)
    torch.testing.assert_close(encoding.tokens, encoder.trunk.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(encoding.pooled, encoder.trunk(x), rtol=1e-12, atol=1e-12)
    assert encoding.tokens.shape == (3, encoder.num_prefix_tokens + tiny.NUM_PATCHES, tiny.WIDTH)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_class_token_alone_is_what_it_is_among_all(ragged: bool, qk_norm: bool) -> None:
    encoder = tiny.vit(qk_norm=qk_norm, init_values=0.5, qkv_bias=not qk_norm).double().train()
    x, mask = images(3), ragged_mask([4, 7, 11]) if ragged else None
    alone, among = encoder(x, mask).pooled, encoder(x, mask).tokens[:, 0]
    torch.testing.assert_close(alone, among, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(alone)
    of_alone, of_among = (
        torch.autograd.grad((part * weights).sum(), list(encoder.parameters())) for part in (alone, among)
    )
    for one, other in zip(of_alone, of_among, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_weights_are_those_that_timm_draws_under_the_same_names() -> None:
    args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with torch_seed(5):
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **args)
        drawn = torch.get_rng_state()
    with torch_seed(5):
        ours = TimmEncoder("vit_tiny_patch16_224", 32, args)
        assert torch.equal(torch.get_rng_state(), drawn)
    assert type(ours.trunk.blocks[-1]) is PickingBlock and type(ours.trunk.patch_embed.proj) is PatchProjection
    assert [name for name, _ in ours.trunk.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.trunk.state_dict()[name], tensor), name


@pytest.mark.parametrize("drop", [{"proj_drop_rate": 0.5}, {"attn_drop_rate": 0.5}, {"drop_path_rate": 0.5}])
def test_a_last_block_that_draws_is_drawn_once_for_all_of_its_tokens(drop: dict[str, float]) -> None:
    encoder = tiny.vit(**drop).double().train()
    encoding = encoder(images(8))
    assert torch.equal(encoding.pooled, encoding.tokens[:, 0])


@pytest.mark.parametrize("args", POOLS)
def test_keeping_every_patch_in_order_equals_no_mask(args: dict[str, object]) -> None:
    encoder = tiny.vit(**args).double()
    x = images(2)
    everything = PatchMask(torch.arange(16).expand(2, 16), None, torch.zeros(2, 16, dtype=torch.bool))
    torch.testing.assert_close(encoder(x, everything).tokens, encoder(x).tokens)
    torch.testing.assert_close(encoder(x, everything).pooled, encoder(x).pooled)


@pytest.mark.parametrize("args", POOLS)
def test_constant_mask_equals_computing_kept_tokens_alone(args: dict[str, object]) -> None:
    encoder = tiny.vit(**args).double()
    x = images(4)
    mask = random_patch_mask(torch.arange(4), 16, MaskSpec("test", (0.7, 0.7)))
    assert mask.keep.shape == (4, 5) and mask.num_keep is None
    encoding = encoder(x, mask)
    for row in range(4):
        tokens, pooled = on_tokens_alone(encoder, x[row], mask.keep[row].tolist())
        torch.testing.assert_close(encoding.tokens[row], tokens, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(encoding.pooled[row], pooled, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("args", POOLS[:3])
def test_ragged_mask_equals_computing_each_sample_alone_and_never_sees_filler(args: dict[str, object]) -> None:
    encoder = tiny.vit(**args).double()
    x = images(4)
    num_keep = [5, 1, 16, 9]
    mask = ragged_mask(num_keep)
    encoding = encoder(x, mask)
    for row, count in enumerate(num_keep):
        tokens, pooled = on_tokens_alone(encoder, x[row], mask.keep[row, :count].tolist())
        torch.testing.assert_close(encoding.tokens[row, : len(tokens)], tokens, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(encoding.pooled[row], pooled, rtol=1e-10, atol=1e-12)


def test_ragged_mask_is_refused_by_map_pooling() -> None:
    encoder = tiny.vit(global_pool="map", class_token=False)
    with pytest.raises(ValueError, match="'map' cannot pool a varying number of patches; use a constant mask_ratio"):
        encoder(images(2).float(), ragged_mask([3, 5]))


@pytest.mark.parametrize("ragged", [False, True])
def test_what_a_hidden_patch_shows_changes_nothing(ragged: bool) -> None:
    encoder = tiny.vit().double()
    x = images(3)
    mask = ragged_mask([4, 7, 11] if ragged else [6, 6, 6])
    if not ragged:
        mask = PatchMask(mask.keep, None, mask.hidden)
    pixels = mask.hidden.reshape(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    before, after = encoder(x, mask), encoder(torch.where(pixels, 100.0, x), mask)
    assert torch.equal(before.pooled, after.pooled)
    is_kept = torch.arange(mask.keep.shape[1]) < (~mask.hidden).sum(1)[:, None]
    assert torch.equal(before.tokens[:, 1:][is_kept], after.tokens[:, 1:][is_kept])
    assert not torch.equal(encoder(x).pooled, encoder(torch.where(pixels, 100.0, x)).pooled)


@pytest.mark.parametrize(
    ("name", "num_tokens", "token_width", "width"),
    [
        ("test_resnet", 4, 96, 96),
        ("mobilenetv3_small_050", 4, 288, 1024),  # its head widens what it pools
        ("davit_tiny.msft_in1k", 4, 768, 768),  # takes any image size, in spite of its name
        ("mixer_s32_224", 4, 512, 512),  # is built for one image size, in spite of its name
    ],
)
def test_other_models_of_timm_give_tokens_and_a_pooled_embedding(
    name: str, num_tokens: int, token_width: int, width: int
) -> None:
    with torch.device("meta"):
        encoder = TimmEncoder(name, image_size=64)
        encoding = encoder(torch.zeros(2, 3, 64, 64))
    assert not encoder.is_vit
    assert encoder.width == width
    assert encoding.tokens.shape == (2, num_tokens, token_width)
    assert encoding.pooled.shape == (2, width)


def test_tokens_of_a_convolutional_model_are_its_last_map_row_by_row() -> None:
    encoder = TimmEncoder("test_resnet", image_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    features = encoder.trunk.forward_features(x)
    encoding = encoder(x)
    assert torch.equal(encoding.tokens[:, 3], features[:, :, 1, 1])
    assert torch.equal(encoding.tokens[:, 1], features[:, :, 0, 1])
    torch.testing.assert_close(encoding.pooled, features.mean((2, 3)))
    assert encoder.has_batch_norm and not tiny.vit().has_batch_norm


def test_tokens_of_a_model_with_channels_last_keep_their_channels() -> None:
    args = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
    encoder = TimmEncoder("swin_tiny_patch4_window7_224", 32, args).eval()
    x = torch.randn(2, 3, 32, 32)
    features = encoder.trunk.forward_features(x)
    assert features.shape == (2, 4, 4, 16)
    assert torch.equal(encoder(x).tokens[:, 4 + 2], features[:, 1, 2])


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_r_s16_p8_224"])
def test_models_in_which_patches_meet_before_the_blocks_refuse_masks(name: str) -> None:
    with torch.device("meta"):
        encoder = TimmEncoder(name, image_size=64)
        with pytest.raises(ValueError, match="cannot drop patches; expected a plain ViT"):
            encoder(torch.zeros(2, 3, 64, 64), ragged_mask([2, 2]))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_bse_patch16_224", {}, r"'vit_bse_patch16_224'; expected a model of timm, such as vit_base_patch16_224, "),
        ("test_vit", {"deepth": 3}, r"timm refuses model.image.args \{'deepth': 3\} for 'test_vit': .*'deepth'"),
        ("test_vit", {"num_heads": 5}, r"timm refuses model.image.args \{'num_heads': 5\} for 'test_vit'"),
        ("test_resnet", {"deepth": 3}, r"timm refuses model.image.args \{'deepth': 3\} .*'deepth'"),
        ("test_vit", {"img_size": 64}, r"timm refuses model.image.args \{'img_size': 64\} .*multiple values"),
    ],
)
def test_wrong_names_and_arguments_are_told_in_one_line(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TimmEncoder(name, 32, args)
    assert "\n" not in str(error.value)


def test_clip_initialisation_has_the_deviations_of_open_clips_tower() -> None:
    args = {"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    ours = dict(TimmEncoder("vit_base_patch16_clip_224", 64, args, init="clip").trunk.named_parameters())
    theirs = dict(VisionTransformer(64, 8, 192, 2, 3, 4.0, output_dim=128).named_parameters())
    renamed = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
               "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.", "norm1": "ln_1", "norm2": "ln_2",
               "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "fc1": "c_fc", "fc2": "c_proj"}  # fmt: skip
    compared = 0
    for name, parameter in ours.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        reference = theirs[name if not name.startswith("norm.") else name.replace("norm", "ln_post")]
        assert parameter.numel() == reference.numel()
        # A deviation estimated from n numbers has a standard error of about 1 / sqrt(2 n) of itself.
        tolerance = 5 / parameter.numel() ** 0.5
        assert parameter.std().item() == pytest.approx(reference.std().item(), rel=tolerance), name
        assert parameter.mean().item() == pytest.approx(reference.mean().item(), abs=tolerance), name
        compared += 1
    assert compared == len(theirs) - 1  # all but the projection, which is the model's


def test_clip_initialisation_is_refused_by_other_models() -> None:
    with pytest.raises(ValueError, match=r"^model.image.init is 'clip' for 'test_resnet'; expected a plain ViT"):
        TimmEncoder("test_resnet", 32, init="clip")


@pytest.mark.parametrize("args", POOLS)
@pytest.mark.parametrize("size", [16, 48])
def test_other_image_sizes_are_timms_with_its_positions_interpolated(args: dict[str, object], size: int) -> None:
    encoder = tiny.vit(**args).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    reference = tiny.vit(dynamic_img_size=True, **args).trunk.double()
    reference.load_state_dict(encoder.trunk.state_dict())
    torch.testing.assert_close(encoder(x).pooled, reference(x), rtol=1e-12, atol=1e-12)
    spread = encoder.trunk.pos_embed.detach()[:, -tiny.NUM_PATCHES :]
    assert spread.std(dim=1).mean() > 0.05, "positions that matter"
    everything = torch.arange((size // 8) ** 2).expand(2, -1)
    mask = PatchMask(everything, None, torch.zeros_like(everything, dtype=torch.bool))
    torch.testing.assert_close(encoder(x, mask).pooled, encoder(x).pooled)


def test_mae_initialisation_has_fixed_sine_cosine_positions_and_xavier_weights() -> None:
    args = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2}
    encoder = TimmEncoder("vit_base_patch16_224", 32, args, init="mae")
    positions = encoder.trunk.pos_embed
    assert not positions.requires_grad and not positions[:, 0].any()
    torch.testing.assert_close(positions[:, 1:], sincos_positions((4, 4), 48))
    bound = (6 / (48 + 3 * 48)) ** 0.5
    assert 0.95 * bound < encoder.trunk.blocks[0].attn.qkv.weight.abs().max() <= bound
    bound = (6 / (48 + 3 * 64)) ** 0.5
    assert 0.95 * bound < encoder.trunk.patch_embed.proj.weight.abs().max() <= bound
    assert encoder.trunk.cls_token.std() < 0.03
    with pytest.raises(ValueError, match="init is 'mae' for 'test_resnet'; expected a plain ViT"):
        TimmEncoder("test_resnet", 32, init="mae")


def test_an_image_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.image.image_size is 30; expected a multiple of a patch's 8 pixels"):
        tiny.vit(image_size=30)
