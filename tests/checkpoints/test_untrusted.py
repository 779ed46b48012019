"""Runs' directories of others: nothing in them is executed, followed elsewhere or larger than it says."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.__main__ import main as analysis
from mmpretrain import evaluate
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config import config_yaml
from mmpretrain.config.schema import EvalDataConfig, EvaluateConfig
from mmpretrain.reporting import report
from mmpretrain.reporting.progress import print_results
from mmpretrain.reporting.records import read_metrics
from mmpretrain.training import resume
from tests import runs
from tests.saved_runs import SMALL, save_run, save_whole_run

OPEN_CLIP = {"_target_": "mmpretrain.models.open_clip.open_clip_model", "name": "ViT-B-32"}
TOKENIZERS = "mmpretrain.data.tokenizer"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    # Small: the tokenizer has more words than the model, which is only found once both are built.
    save_whole_run(tmp_path / "run")
    return tmp_path / "run"


def poison(run: Path, path: str, value: Any) -> None:
    """Change one value of a run's config.yaml."""
    file = run / "config.yaml"
    node = plain = yaml.safe_load(file.read_text())
    *parents, name = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value
    file.write_text(yaml.safe_dump(plain))


def refusal(run: Path, error: type[Exception] = ValueError, **options: Any) -> str:
    """What loading a run says in one line."""
    with pytest.raises(error) as raised:
        load_checkpoint(run, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------- code


@st.composite
def nestings(draw: st.DrawFn, planted: Any) -> Any:
    """Dictionaries and lists of any depth that hold `planted` somewhere."""
    node = planted
    for _ in range(draw(st.integers(0, 6))):
        beside = draw(st.lists(st.one_of(st.none(), st.integers(0, 9), st.text(max_size=3)), max_size=2))
        if draw(st.booleans()):
            place = draw(st.integers(0, len(beside)))
            node = [*beside[:place], node, *beside[place:]]
        else:
            node = {**{f"k{i}": value for i, value in enumerate(beside)}, draw(st.sampled_from(["a", "args"])): node}
    return node


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_whole_run(folder)
    return folder


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_planted_target_is_found_in_any_container_and_not_run(shared_run: Path, data: st.DataObject) -> None:
    mark = shared_run.parent / "ran"
    target = data.draw(
        st.sampled_from(
            [
                {"_target_": "os.mkdir", "path": str(mark)},
                {"_target_": "os.mkdir", "path": str(mark), "_partial_": True},
                {"_target_": "mmpretrain.models.vit.torch.os.mkdir", "path": str(mark)},
                {"_target_": "mmpretrain.models_evil.mkdir", "path": str(mark)},
                {"_target_": ["os", "mkdir"], "path": str(mark)},
                {"_target_": {"_target_": "os.mkdir", "path": str(mark)}},
            ]
        )
    )
    before = (shared_run / "config.yaml").read_text()
    place = data.draw(
        st.sampled_from(
            ["model", "model.image", "model.image.args.x", "model.text.depth", "data.tokenizer.context_length"]
        )
    )
    poison(shared_run, place, data.draw(nestings(target)))
    try:
        message = refusal(shared_run)
    finally:
        (shared_run / "config.yaml").write_text(before)
    assert not mark.exists()
    assert "_target_ is " in message and "which came with the checkpoint" in message


# ---------------------------------------------------------------------------------------------- other files, the network

LEAD_ELSEWHERE = [
    ("model", {**OPEN_CLIP, "name": "local-dir:/srv/model"}),
    ("model", {**OPEN_CLIP, "name": "hf-hub:owner/model"}),
    ("model", {**OPEN_CLIP, "vision": {"timm_model_name": "hf-hub:owner/model"}}),
    ("model", {**OPEN_CLIP, "vision": {"timm_model_name": "local-dir:/srv/model"}}),
    ("model", {**OPEN_CLIP, "text": {"hf_model_name": "owner-of-code"}}),
    ("model.image.name", "hf-hub:owner/model"),
    ("model.image.args", {"act_layer": "../x"}),
    ("data.tokenizer", {"_target_": f"{TOKENIZERS}.tokenizer_of", "path": "/srv/tokenizer"}),
    ("data.tokenizer", {"_target_": f"{TOKENIZERS}.tokenizer_of", "name": "local-dir:/srv/model"}),
    ("data.tokenizer", {"_target_": f"{TOKENIZERS}.FileTokenizer", "path": "/srv/tokenizer.json"}),
    ("data.tokenizer", {"_target_": f"{TOKENIZERS}.HuggingFaceTokenizer", "name": "/srv/tokenizer"}),
]


@pytest.mark.parametrize(("place", "value"), LEAD_ELSEWHERE)
def test_a_name_that_leads_to_other_files_is_refused(run: Path, place: str, value: Any) -> None:
    poison(run, place, value)
    message = refusal(run)
    assert "leads to files elsewhere" in message and "trust=[" in message


def test_a_tokenizer_inside_another_nodes_argument_is_refused_too(run: Path) -> None:
    inner = {"_target_": f"{TOKENIZERS}.FileTokenizer", "path": "/srv/tokenizer.json"}
    poison(run, "data.tokenizer", {"_target_": f"{TOKENIZERS}.ClipTokenizer", "context_length": inner})
    assert "data.tokenizer.context_length.path is '/srv/tokenizer.json'" in refusal(run)
    poison(run, "model.image.args", {"x": inner})
    assert "model.image.args.x._target_ is" in refusal(run)


def test_a_tokenizer_of_the_run_runs_no_code_and_stays_small(run: Path) -> None:
    kept, mark = run / "tokenizer", run.parent / "ran"
    kept.mkdir()
    poison(run, "data.tokenizer", {"_target_": f"{TOKENIZERS}.tokenizer_of", "path": "anywhere"})
    (kept / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (kept / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "data.tokenizer" in refusal(run)
    assert not mark.exists()
    (kept / "tokenizer_config.json").unlink()
    vocabulary = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2, "a": 4_294_967_295}
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[EOS]", "type_id": 0}}
    ends = {"type": "TemplateProcessing", "single": [text, end], "pair": [text, end]}
    parts: dict[str, Any] = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    known = {"[EOS]": {"id": "[EOS]", "ids": [1], "tokens": ["[EOS]"]}}
    for tokens, message in (({}, "PanicException"), (known, "ids up to 4294967295")):
        (kept / "tokenizer.json").write_text(
            json.dumps({**parts, "post_processor": {**ends, "special_tokens": tokens}})
        )
        assert message in refusal(run)
    os.mkfifo(kept / "vocab.txt")
    assert "vocab.txt is no regular file" in refusal(run)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("data.val", [1], "data.val is [1]; expected Mapping"),
        ("data.val", {"a": {"shard": "x"}}, "data.val.a has 'shard'; did you mean 'shards'?"),
        ("data.val", {"a": {"shards": "x", "caption": 1}}, "data.val.a.caption is 1; expected str | None"),
        ("data.val", {"a": {"shards": ["${oc.env:HOME}"]}}, "data.val.a.shards[0] is '${oc.env:HOME}'"),
        (
            "data.val",
            {"a": {"source": {"_target_": "os.system", "command": "true"}}},
            "data.val.a.source._target_ is 'os.system', which came with the checkpoint",
        ),
        (
            "data.val",
            {"a": {"source": {"_target_": f"{TOKENIZERS}.HuggingFaceTokenizer", "name": "owner/model"}}},
            f"trust=[{TOKENIZERS}]",
        ),
        (
            "data.val",
            {"a": {"source": {"_target_": "mmpretrain.data.parquet.ParquetSource", "path": "x", "colour": 1}}},
            "unknown configuration key 'data.val.a.source.colour'",
        ),
        ("data.val", {"a": {"source": {"path": "x"}}}, "data.val.a.source has no _target_"),
        ("data.root", 5, "data.root is 5; expected str"),
        ("trainer.precision", "fp64", "trainer.precision is 'fp64'; expected one of bf16, fp16, fp32"),
        ("data.val_batch_size", -1, "data.val_batch_size is -1; expected a number at least 1"),
    ],
)
def test_an_evaluation_of_what_no_run_wrote_is_refused_in_one_line(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    sound = {"data.root": "/srv", "data.val": {}, "data.val_batch_size": 8}
    save_run(tmp_path)  # with as many words as the tokenizer
    for key, saved in {**sound, place: value}.items():
        poison(tmp_path, key, saved)
    data = EvalDataConfig(workers=0, val_batch_size=None)
    cfg = EvaluateConfig(str(tmp_path), device="cpu", ema=False, precision=None, data=data)
    with pytest.raises(ValueError, match=r".") as raised:
        evaluate.run(cfg)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_is_read_once_it_is_named_by_its_user(run: Path, tmp_path: Path) -> None:
    poison(run, "model", {**OPEN_CLIP, "name": f"local-dir:{tmp_path}"})
    assert "expected a model of open_clip" in refusal(run, trust=[f"local-dir:{tmp_path}"])


def test_the_environment_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "geheim")
    poison(run, "model.image.name", "${oc.env:SECRET}")
    message = refusal(run)
    assert "model.image.name is '${oc.env:SECRET}'" in message and "geheim" not in message


def _load_while_watched(run: str, output: str) -> None:
    """In a process of its own: load poisoned runs, and write down what was said and what went to the network."""
    asked: list[str] = []
    sys.addaudithook(
        lambda event, _: asked.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None
    )
    said = []
    for place, value in [
        *LEAD_ELSEWHERE,
        ("data.tokenizer", {"_target_": f"{TOKENIZERS}.HuggingFaceTokenizer", "name": "owner/not-in-any-cache"}),
        ("data.tokenizer", {"_target_": f"{TOKENIZERS}.tokenizer_of", "name": "ViT-B-16-SigLIP"}),
        ("model", {**OPEN_CLIP, "name": "roberta-ViT-B-32"}),
        ("model.image.args.pretrained", True),
    ]:
        before = Path(run, "config.yaml").read_text()
        poison(Path(run), place, value)
        try:
            load_checkpoint(run)
        except ValueError as error:
            said.append(str(error))
        Path(run, "config.yaml").write_text(before)
    Path(output).write_text(json.dumps({"asked": asked, "said": said}))


def test_loading_never_asks_the_network(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = runs.start(_load_while_watched, str(run), str(tmp_path / "said.json"))
    process.join(runs.DEADLINE_SECONDS)
    assert process.exitcode == 0
    seen = json.loads((tmp_path / "said.json").read_text())
    assert seen["asked"] == []
    assert len(seen["said"]) >= len(LEAD_ELSEWHERE) + 3
    assert all("\n" not in message for message in seen["said"])


# ---------------------------------------------------------------------------------------------- sizes

ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "has an alias (*a0 in line 2); expected values written out"),
        ("a: " + "[" * 60, "nests deeper than 50 levels in line 1"),
        ("a: " + "[" * 100_000, "line 1"),
        ("a: " + "{b: " * 2_000, "line 1"),
        ("a: b\n" * 300_000, "has 1500000 bytes; expected at most"),
        ("a: 1" + "0" * 5_000, "has an invalid value"),
        ("a: !!binary aGk=", "config.yaml: a is b'hi'; expected a text"),
        ("a: !!python/object/apply:os.system [ls]", "is no YAML of a run"),
        ("a: !!set {x}", "is no YAML of a run"),
        ("a: [1, 2", "is no YAML of a run"),
        ("a: ${", "is no YAML of a run"),
        ("? [1]\n: 2", "is no YAML of a run"),
        ("1.5: a", "has the key 1.5; expected names"),
        ("- a", "holds no keys"),
        ("", "has no 'data'"),
        ("model: 1\nobjective: 1\ndata: 1\n", "objective and data have no keys"),
        ("a: \udce9", "is not UTF-8"),
    ],
)
def test_a_configuration_that_no_run_wrote_is_refused(run: Path, text: str, message: str) -> None:
    (run / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in refusal(run)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.text.depth", 10**9, "model.text.depth is 1000000000; expected at most 65536"),
        ("model.text.depth", 10**4, "the model has more weights than the checkpoint"),
        ("model.text.vocab_size", 10**12, "model.text.vocab_size is 1000000000000; expected at most"),
        ("model.text.mlp_ratio", 1e9, "the model has more weights than the checkpoint"),
        ("model.text.mlp_ratio", 1e300, "model cannot be built (TypeError"),
        ("model.image.image_size", 60_000, "the model has more weights than the checkpoint"),
        ("model.text", 5, "model.text is a int; expected a torch.nn.Module"),
        ("model.image.args", [1], "cannot be built"),
        ("model", [1], "model is a list; expected a model of images and texts"),
        (
            "model",
            {"_target_": "mmpretrain.models.text.TextTransformer"},
            "the model has more weights than the checkpoint",
        ),
        ("data.tokenizer", None, "data.tokenizer is None; expected keys"),
        ("data.tokenizer.context_length", "x", "data.tokenizer cannot be built (TypeError"),
    ],
)
def test_a_model_is_never_larger_than_its_weights(run: Path, place: str, value: Any, message: str) -> None:
    poison(run, place, value)
    assert message in refusal(run)


def test_a_header_of_huge_tensors_is_refused(run: Path) -> None:
    header = b'{"model.x": {"dtype": "F32", "shape": [9000000000000], "data_offsets": [0, 36000000000000]}}'
    path = run / "checkpoints" / "step_00000005"
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    sign(path)
    assert "model.safetensors holds no tensors" in refusal(run)


def sign(path: Path) -> None:
    """Make a checkpoint's manifest agree with its files."""
    files = [file for file in path.iterdir() if file.name != "manifest.json" and file.is_file()]
    manifest = {file.name: {"sha256": store._sha256(file), "bytes": file.stat().st_size} for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------------------------------------- other files of a run


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 100_000,
        '{"a": ' * 100_000,
        "[]",
        '{"state.json": 3}',
        '{"state.json": {"bytes": "1", "sha256": "x"}}',
        json.dumps({"../../../outside": {"bytes": 1, "sha256": "x"}}),
        json.dumps({"/etc/passwd": {"bytes": 1, "sha256": "x"}}),
        '{"a": 1' + "0" * 5000 + "}",
        "\x00",
    ],
)
def test_a_manifest_that_no_run_wrote_reads_no_other_file(run: Path, manifest: str) -> None:
    (run / "checkpoints" / "step_00000005" / "manifest.json").write_text(manifest)
    message = refusal(run / "checkpoints" / "step_00000005")
    assert "manifest.json cannot be read (" in message and len(message) < 500


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "..", "", "step_1\nstep_2", "step_" + "1" * 1000])
@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_latest_and_best_name_a_checkpoint_beside_them(run: Path, pointer: str, name: str) -> None:
    (run / "checkpoints" / pointer).write_text(name)
    message = refusal(run / "checkpoints" / pointer)
    assert "expected a checkpoint beside it" in message or "expected at most 200" in message


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/latest", "checkpoints/step_00000005/manifest.json"])
def test_a_pipe_is_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    where = run / name if name.endswith("latest") else run
    assert "is no regular file" in refusal(where) or "verifies" in refusal(where)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": "x", "samples": 1}, "step is 'x'; expected a non-negative integer"),
        ({"step": 1e999, "samples": 1}, "step is inf; expected a non-negative integer"),
        ({"step": 10**30, "samples": 1}, "expected a non-negative integer"),
        ({"step": 1}, "has no 'samples'"),
        ({"step": 1, "samples": 1, "fingerprint": [], "optimizer": {}}, "fingerprint is []"),
        ({"step": 1, "samples": 1, "fingerprint": {}, "optimizer": {}, "results": {"a": "b"}}, "results is"),
        ({"step": 1, "samples": 1, "fingerprint": {}, "optimizer": {}, "evil": 1}, "evil is 1"),
    ],
)
def test_a_state_that_no_run_wrote_is_refused(run: Path, state: dict[str, Any], message: str) -> None:
    path = run / "checkpoints" / "step_00000005"
    (path / "state.json").write_text(json.dumps(state))
    sign(path)
    with pytest.raises(ValueError, match=r".") as raised:
        resume.read_state(path)
    assert message in str(raised.value)


RECORDS = [
    ("[1]\n", "line 1: list; expected one object a line"),
    ('{"step": 1, "samples": 16, "a": "x"}\n', "line 1: 'a' is x; expected a number or null"),
    ('{"step": 1, "samples": 16, "a": 1e999}\n', "line 1: 'a' is inf"),
    ('{"step": 1, "samples": 16, "a": 1' + "0" * 4000 + "}\n", "line 1: 'a' is int"),
    ('{"step": 1, "samples": 16, "a": ' + "[" * 100_000 + "\n{}\n", "line 1: not JSON"),
    ('{"samples": 16}\n', "line 1: step is None; expected an integer"),
]


@pytest.mark.parametrize(("text", "message"), RECORDS)
def test_metrics_that_no_run_wrote_are_refused(run: Path, text: str, message: str) -> None:
    (run / "metrics.jsonl").write_text(text)
    for read in (partial(read_metrics, run / "metrics.jsonl"), partial(report.write, run)):
        with pytest.raises(ValueError, match=r".") as raised:
            read()
        assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", b'{"a": "<script>"}'),
        ("results.json", b"[]"),
        ("results.json", b'{"a": ' * 100_000),
        ("quarantine.jsonl", b'{"shard": 1, "key": "a", "reason": "b"}\n'),
        ("quarantine.jsonl", b"{}\n"),
        ("config.yaml", b"a: \xff"),
        ("pictures/x.png", b"<script>"),
    ],
)
def test_a_report_of_what_no_run_wrote_is_refused(run: Path, name: str, content: bytes) -> None:
    (run / "pictures").mkdir()
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=r".") as raised:
        report.write(run)
    assert str(run / name) in str(raised.value)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match="is no regular file"):
        report.write(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "[]"),
        ("results.json", '{"a": {}}'),
        ("config.yaml", ALIASES),
        ("config.yaml", "run: {seed: []}"),
    ],
)
def test_a_comparison_of_what_no_run_wrote_is_refused_in_one_line(
    run: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_text(content)
    assert analysis(["compare", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(run) in line


# ---------------------------------------------------------------------------------------------- what people see

SPOOF = "[/b][red]x\x1b[2J\x07\u202e"


def test_names_and_folders_reach_the_terminal_as_they_are(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (run / "results.json").write_text(json.dumps({SPOOF: 1.0, "$\\frac{$": 2.0}))
    run.with_name("a[").mkdir()
    renamed = run.rename(run.with_name("a[") / "b] :smile:")  # its path has the mark [/b] in it
    print_results(json.loads((renamed / "results.json").read_text()), renamed, {})
    assert analysis(["compare", str(renamed), "--curves", str(run.with_name("curves.png"))]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert shown.count("[/b][red]x\\x1b[2J\\x07\\u202e") == 2
    assert f"checkpoints: {renamed}/checkpoints" in shown
    assert analysis(["compare", str(renamed), "--metric", SPOOF + "!"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_report_shows_names_as_they_are(run: Path) -> None:
    name = 'a/<img src=x onerror="alert(1)">$\\frac{$' + "y" * 500
    (run / "results.json").write_text(json.dumps({name: 1.0}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples": 16, name: 1e304}) + "\n")
    page = report.write(run).read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_a_configuration_of_ones_own_is_still_read(run: Path) -> None:
    assert config_yaml.read(run / "config.yaml")["model"] == SMALL
    assert torch.is_tensor(store.load_tensors(run / "checkpoints" / "step_00000005", "model").popitem()[1])
