"""What is refused before a weight byte is read: half a save, two saves in one folder, another model."""

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin.checkpoint import file_source, open_folder
from reload_plugin.checkpoint.config import check_config, differences, start_config
from reload_plugin.checkpoint.formats import safetensors_files
from reload_plugin.checkpoint.formats.safetensors_files import SafetensorsSource
from reload_plugin.errors import SourceError
from reload_plugin.transaction.engine_state import state_of
from tests import checkpoints, oracle
from tests.checkpoints import edit_config, read_tensors
from tests.zoo import LLAMA, QWEN2, case_named

# --- an index and its files ---

SHARDS = {
    "model-1.safetensors": {"a.weight": torch.arange(3), "b.weight": torch.ones(2)},
    "model-2.safetensors": {"c.weight": torch.zeros(1)},
}
TABLE = {name: file for file, tensors in SHARDS.items() for name in tensors}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for file, tensors in SHARDS.items():
        save_file(tensors, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": TABLE}))
    return tmp_path


def opened(folder: Path, load_format: str = "auto") -> SafetensorsSource:
    from vllm.config.load import LoadConfig

    config = SimpleNamespace(load_config=LoadConfig(load_format=load_format))
    return open_folder(str(folder), config, None, torch.nn.Module())


def names(source: SafetensorsSource) -> set[str]:
    return {info.name for info in source.infos()}


def test_an_index_that_agrees_with_its_files_is_obeyed(sharded: Path) -> None:
    save_file({"old.weight": torch.zeros(1)}, sharded / "left-behind.safetensors")
    assert names(opened(sharded)) == set(TABLE)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (TABLE | {"d": "model-3.safetensors"}, r"index\.json names model-3\.safetensors that are not there"),
        (TABLE | {"d": "../x", "e": "/etc/passwd"}, r"names \.\./x and 1 more files that are not there"),
        (TABLE | {"d.weight": "model-2.safetensors"}, r"model-2\.safetensors holds d\.weight; it does not"),
        (TABLE | {"a.weight": "model-2.safetensors"}, r"model-2\.safetensors holds a\.weight; it does not"),
        ({"a.weight": "model-1.safetensors"}, r"model-1\.safetensors holds b\.weight that .* does not list"),
        ({}, "holds no weights|holds a.weight"),
    ],
)
def test_an_index_that_says_something_else_is_refused(sharded: Path, table: dict, says: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(SourceError, match=says) as caught:
        opened(sharded)
    assert "Save or copy it again" in str(caught.value) or "Give a folder" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"[]",
            b"{}",
            b"\xff",
            b"NaN",
            b'{"weight_map": []}',
            b'{"weight_map": {"a": 1}}',
            b"[" * 9000,
        ),
        b'{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}',
    ],
    ids=repr,
)
def test_an_index_that_is_none_is_refused(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(SourceError, match=rf"{INDEX} is not a safetensors index.*Save or copy it again"):
        opened(sharded)


def test_the_index_that_a_cold_start_obeys_is_the_one_that_counts(sharded: Path) -> None:
    """Mistral's folders hold the weights twice; the index of the files that are not read may be anything."""
    save_file({"x": torch.zeros(1)}, sharded / "consolidated.safetensors")
    (sharded / INDEX).write_text("{}")
    assert names(opened(sharded)) == {"x"}
    with pytest.raises(SourceError, match="not a safetensors index"):
        opened(sharded, "safetensors")
    (sharded / "consolidated.safetensors.index.json").write_text(
        '{"weight_map": {"y": "consolidated.safetensors"}}'
    )
    with pytest.raises(SourceError, match="holds y; it does not"):
        opened(sharded)


# --- headers ---


def header(*entries: tuple[str, object], **more: object) -> dict:
    return {name: {"dtype": "U8", "shape": [2], "data_offsets": place} | more for name, place in entries}


BAD_HEADERS = [
    (header(("a", [0, 2]), ("b", [3, 5])), "b begins at byte 3 of the data and leaves a gap"),
    (header(("a", [0, 2]), ("b", [1, 3])), "b begins at byte 1 of the data and overlaps"),
    (header(("a", [2, 4])), "a begins at byte 2"),
    (header(("a", [2, 0])), r"a has the data_offsets \[2, 0\]"),
    (header(("a", [-2, 0])), r"a has the data_offsets \['-2', 0\]"),
    (header(("a", [0, 2**64])), "a has the data_offsets"),
    (header(("a", [0.0, 2])), r"a has the data_offsets \[0\.0, 2\]"),
    (header(("a", [0, 2, 4])), "a has the data_offsets"),
    (header(("a", None)), "a has the data_offsets None"),
    (header(("a", [0, 3])), r"a has the shape \[2\] in U8 and 3 bytes"),
    (header(("a", [0, 2]), shape=[-1, -2]), "a has the shape"),
    (header(("a", [0, 2]), shape=[2.0]), r"a has the shape \[2\.0\]"),
    (header(("a", [0, 2]), shape=[True]), r"a has the shape \[True\]"),
    (header(("a", [0, 2]), shape=[float("nan")]), "NaN is not JSON"),
    (header(("a", [0, 0]), shape=[0, 2**62, 2**62]), "a has the shape .* which no tensor has"),
    (header(("a", [0, 2]), dtype="U9"), "a in .* has the dtype U9"),
    (header(("a", [0, 2]), dtype=["U8"]), r"a in .* has the dtype \['U8'\]"),
    ({"a": 3}, "a has no description"),
    ({"__metadata__": {"format": 3}}, "__metadata__ is not a table of strings"),
    (["a"], "not"),
]


@pytest.mark.parametrize(("content", "says"), BAD_HEADERS, ids=lambda part: str(part)[:40])
def test_a_header_that_cannot_be_is_refused_by_name(tmp_path: Path, content: object, says: str) -> None:
    file = tmp_path / "model.safetensors"
    text = json.dumps(content).encode()
    said = []
    for size in range(5):
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)
        with pytest.raises(SourceError, match=r"model\.safetensors.*(again|another)") as caught:
            SafetensorsSource([str(file)], "")
        said.append(str(caught.value))
    assert any(re.search(says, line) for line in said), said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [], "data_offsets": [0, 1]}}', "'dtype' twice"),
        (b'{"a": 1, "a": 1}', "'a' twice"),
        (b'{"\\ud800": 1}', "surrogates"),
        (b'{"\xff": 1}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b"[" * 100_000, "not a JSON object"),
        (b" {}", "not a JSON object"),
        (b"{3: 1}", "something else than a name before character 2"),
        (b'{"a" 1}', "no colon at character 5"),
        (b'{"a": 1 "b": 1}', "no comma at character 8"),
        (b'{"a": 1,}', "Expecting value"),
        (b'{"a": 1} {', "goes on at character 9"),
        (b'{"a": 1', "no comma at character 7"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a has no description|too large"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(SourceError, match=says):
        SafetensorsSource([str(file)], "")


def test_a_header_that_claims_more_than_there_is_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 10) + b"{}")
    with pytest.raises(SourceError, match="claims 10 bytes and the file has 10"):
        SafetensorsSource([str(file)], "")
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", 200_000_000))
        handle.truncate(300_000_000)
    with pytest.raises(SourceError, match="claims 200,000,000 bytes"):
        SafetensorsSource([str(file)], "")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe, gone = tmp_path / "pipe.safetensors", tmp_path / "gone.safetensors"
    os.mkfifo(pipe)
    gone.symlink_to(tmp_path / "nowhere")
    for path in (pipe, gone, tmp_path):
        with pytest.raises(SourceError, match=str(path)):
            SafetensorsSource([str(path)], "")
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(SourceError, match="is not a safetensors index"):
        opened(tmp_path)


# --- files of two saves ---


def replaced(file: Path) -> None:
    """The same bytes in a new file, under the same name."""
    shutil.copy(file, file.parent / "next")
    os.utime(file.parent / "next", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    (file.parent / "next").replace(file)


def shortened(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [replaced, shortened, touched, Path.unlink])
@pytest.mark.parametrize("when", ["opened", "reading"])
@pytest.mark.parametrize("which", [*SHARDS])
def test_a_file_that_changes_is_noticed_whichever_and_whenever(
    sharded: Path, change: Callable[[Path], None], when: str, which: str
) -> None:
    source = opened(sharded)
    reading = source.read()
    if when == "reading":
        next(reading)
    change(sharded / which)
    with pytest.raises(SourceError, match=which):
        list(reading)
    assert not source.unchanged()


def test_a_file_that_is_replaced_and_put_back_is_noticed_when_it_is_opened(sharded: Path) -> None:
    """The stamp is that of the descriptor that is read from, not of whatever the name means at the end."""
    source, file = opened(sharded), sharded / "model-1.safetensors"
    (sharded / "aside").hardlink_to(file)
    replaced(file)
    reading = source.read()
    with pytest.raises(SourceError, match="changed while it was read"):
        next(reading)
    (sharded / "aside").replace(file)
    assert source.unchanged()
    assert {name for name, _ in source.read()} == set(TABLE)


def test_a_replacement_between_stamp_and_header_cannot_be(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stamp and header come from one descriptor; a file renamed over it in between has another stamp."""
    parse, file = safetensors_files._layout_of, sharded / "model-1.safetensors"

    def late(text: bytes) -> object:
        if b"a.weight" in text:
            replaced(file)
        return parse(text)

    monkeypatch.setattr(safetensors_files, "_layout_of", late)
    source = opened(sharded)
    assert not source.unchanged()
    with pytest.raises(SourceError, match="changed while it was read"):
        list(source.read())


# --- the config of another model ---

START = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "bfloat16",
}
WITHOUT_ROPE = {key: value for key, value in START.items() if key != "rope_parameters"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
LISTED_DTYPE = {"dtype": "float32", "torch_dtype": "float32"}

SAME = {
    "the very same": START,
    "where it came from": START | {"_name_or_path": "x", "transformers_version": "4.1"} | LISTED_DTYPE,
    "tokens and training": START | {"eos_token_id": 7, "use_cache": False, "attention_dropout": 0.1},
    "labels": START | {"id2label": {"0": "a"}, "label2id": {"a": 0}},
    "defaults spelt out": START | {"hidden_act": "silu", "attention_bias": False, "head_dim": 32},
    "defaults left out": {key: value for key, value in START.items() if key != "rms_norm_eps"},
    "old spelling of the rotary base": WITHOUT_ROPE | {"rope_theta": 10000},
    "no rotary base": WITHOUT_ROPE,
    "number written as float": START | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    "no architectures": START | {"architectures": None},
    "no quantization": START | {"quantization_config": None},
}
OTHER = {
    "vocab_size": START | {"vocab_size": 320},
    "hidden_size": START | {"hidden_size": 256},
    "rms_norm_eps": START | {"rms_norm_eps": 1e-5},
    "tie_word_embeddings": START | {"tie_word_embeddings": True},
    "rope_parameters.rope_theta": WITHOUT_ROPE | {"rope_theta": 500000.0},
    "attention_bias": START | {"attention_bias": True},
    "architectures": START | {"architectures": ["MistralForCausalLM"]},
    "model_type": START | {"model_type": "qwen2"},
    "quantization_config.bits": START | {"quantization_config": GPTQ},
    "num_experts": START | {"num_experts": 4},
    "hidden_act": START | {"hidden_act": ["not", "a", "name"]},
}


@pytest.mark.parametrize("found", SAME.values(), ids=SAME)
def test_a_config_of_the_same_model_passes(found: dict) -> None:
    assert differences(START, found) == {}
    assert differences(found, START) == {}


@pytest.mark.parametrize("key", OTHER)
def test_a_config_of_another_model_is_told_by_the_setting(key: str) -> None:
    found = differences(START, OTHER[key])
    assert key in found
    assert found[key][0] != found[key][1]
    assert key in differences(OTHER[key], START)
    others = found.keys() - {key, "head_dim"}  # which follows from the hidden size
    assert not others or key in ("model_type", "quantization_config.bits")


def test_settings_inside_a_quantization_count_but_not_how_it_was_made() -> None:
    quantized = START | {"quantization_config": GPTQ | {"meta": {"by": "a"}, "dtype": "int"}}
    again = START | {"quantization_config": GPTQ | {"meta": {"by": "b"}, "dtype": "int"}}
    assert differences(quantized, again) == {}
    assert set(
        differences(quantized, START | {"quantization_config": GPTQ | {"bits": 8, "dtype": "int"}})
    ) == {"quantization_config.bits"}
    assert set(differences(quantized, START | {"quantization_config": GPTQ})) == {"quantization_config.dtype"}


def test_what_nobody_has_a_class_for_is_compared_as_it_is_written() -> None:
    mine = {
        "model_type": "of my own",
        "depth": 2,
        "inner": {"eps": 1.0, "dtype": "x"},
        "limits": [0.0, float("nan")],
    }
    assert differences(mine, mine | {"use_cache": True, "inner": {"eps": 1, "dtype": "y"}}) == {}
    assert differences(mine, mine | {"inner": {"eps": 2.0}}) == {"inner.eps": (1.0, 2.0)}
    assert differences(mine, {}) != {}


def test_what_the_engine_overrides_does_not_count() -> None:
    def engine(overrides: object) -> SimpleNamespace:
        return SimpleNamespace(hf_overrides=overrides)

    assert differences(START, OTHER["vocab_size"], engine({"vocab_size": 999})) == {}
    assert differences(START, OTHER["vocab_size"], engine({"hidden_size": 999})) != {}
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}
    assert differences(START, OTHER["rope_parameters.rope_theta"] | theta, engine(theta)) == {}

    def overriding(config: SimpleNamespace) -> SimpleNamespace:
        config.vocab_size = 999
        return config

    assert differences(START, OTHER["vocab_size"], engine(overriding)) == {}
    assert set(differences(START, OTHER["hidden_size"], engine(overriding))) == {"hidden_size", "head_dim"}


def written(folder: Path, name: str, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_config_is_read_where_vllm_reads_it(tmp_path: Path) -> None:
    model = SimpleNamespace(model=str(written(tmp_path / "a", "config.json", START)))
    assert start_config(model) == START | {"quantization_config": None}
    written(tmp_path / "a", "hf_quant_config.json", GPTQ)
    assert start_config(model)["quantization_config"] == GPTQ
    assert start_config(SimpleNamespace(model="")) is None
    assert start_config(SimpleNamespace(model=str(tmp_path))) is None
    assert start_config(SimpleNamespace(model=model.model, hf_config_path="elsewhere")) is None
    infinite = written(tmp_path / "b", "config.json", '{"limits": [{"__float__": "Infinity"}, Infinity]}')
    assert start_config(SimpleNamespace(model=str(infinite)))["limits"] == [float("inf")] * 2


def test_a_folder_without_a_config_is_just_weights(tmp_path: Path) -> None:
    check_config(str(tmp_path), None, START)
    check_config(str(tmp_path / "model.safetensors"), None, START)
    check_config(str(written(tmp_path / "x", "config.json", OTHER["vocab_size"])), None, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": "\ud800"'.encode("utf-8", "replace").decode()])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"config\.json is not a model's config.*take it away"):
        check_config(str(written(tmp_path / "x", "config.json", text)), None, START)


def test_a_config_that_nests_too_deeply_is_refused(tmp_path: Path) -> None:
    depth = sys.getrecursionlimit() * 7 // 10  # can be parsed; torch's compiler raises the limit
    deep = json.dumps(START)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(SourceError, match="nested too deeply"):
        check_config(str(written(tmp_path / "x", "config.json", deep)), None, START)


def test_all_differences_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    many = START | {f"setting_{i:02}": i for i in range(20)} | {"architectures": ["Other"]}
    with pytest.raises(SourceError) as caught:
        check_config(str(written(tmp_path / "x", "config.json", many)), None, START)
    said = str(caught.value)
    assert 'architectures is ["Other"] and was ["LlamaForCausalLM"], setting_00 is 0 and was missing' in said
    assert "setting_06" in said
    assert "setting_07" not in said
    assert "and 13 more. Start an engine on that folder" in said


# --- with an engine ---


@dataclass
class Engine:
    llm: object
    folders: dict[str, Path]
    on_a: oracle.Snapshot
    case: object

    def reload(self, path: Path | None) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)} if path else {})

    def assert_on_a(self) -> None:
        now = oracle.snapshot(self.llm, self.case)
        assert oracle.compare_values("", now, self.on_a) == []
        assert oracle.compare_places("", self.on_a, now) == []


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    case = case_named("llama")
    folders = oracle.write(case, tmp_path_factory.mktemp("checkpoints"))
    with oracle.running(case, folders["A"]) as llm:
        yield Engine(llm, folders, oracle.snapshot(llm, case), case)


def tuned_vocabulary(engine: Engine, folder: Path) -> None:
    checkpoints.write_transformers(folder, LLAMA | {"vocab_size": 320}, oracle.SEED_B)


def quantized(engine: Engine, folder: Path) -> None:
    checkpoints.write_w8a8_dynamic(folder, LLAMA, oracle.SEED_B)


def of_another_architecture(engine: Engine, folder: Path) -> None:
    checkpoints.write_transformers(folder, QWEN2, oracle.SEED_B)


def of_another_theta(engine: Engine, folder: Path) -> None:
    """Fits by every shape, and computes something else."""
    shutil.copytree(engine.folders["B"], folder, dirs_exist_ok=True)
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


def with_an_index_of_another_save(engine: Engine, folder: Path) -> None:
    shutil.copytree(engine.folders["B"], folder, dirs_exist_ok=True)
    table = dict.fromkeys(read_tensors(folder), "model.safetensors")
    table["model.layers.9.mlp.up_proj.weight"] = "model.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))


REFUSED = {
    tuned_vocabulary: "vocab_size is 320 and was 256",
    quantized: r"quantization_config\..* and was missing",
    of_another_architecture: r'architectures is \["Qwen2ForCausalLM"\] and was .*, model_type is "qwen2"',
    of_another_theta: r"rope_theta is 500000\.0 and was 10000\.0",
    with_an_index_of_another_save: "holds model.layers.9.mlp.up_proj.weight; it does not",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_an_engine_refuses_before_it_reads(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Engine, Path], None]
) -> None:
    make(engine, tmp_path)
    monkeypatch.setattr(file_source, "read_in_batches", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(SourceError, match=REFUSED[make]) as caught:
        engine.reload(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "The engine serves what it served before" in str(caught.value)
    engine.assert_on_a()


def test_an_engine_takes_a_config_that_differs_in_nothing_that_counts(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.folders["A"], tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw.pop("hidden_act")
    raw |= {"transformers_version": "4.40.0", "torch_dtype": "float32", "eos_token_id": 9, "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    engine.reload(engine.folders["B"])
    assert oracle.differing_answers(oracle.answer(engine.llm), engine.on_a.answers)
    engine.reload(tmp_path)
    engine.assert_on_a()
    (tmp_path / "config.json").unlink()
    engine.reload(tmp_path)
    engine.reload(tmp_path / "model.safetensors")
    engine.assert_on_a()


def test_the_config_counts_as_it_was_when_the_engine_started(engine: Engine) -> None:
    """A trainer may write the next model into the folder that the engine was started from."""
    own = engine.folders["A"] / "config.json"
    before = own.read_text()
    start = state_of(oracle.model_of(engine.llm)).start
    assert {**start.config, "quantization_config": None} == json.loads(before) | {"quantization_config": None}
    try:
        edit_config(engine.folders["A"], rms_norm_eps=0.5)
        with pytest.raises(SourceError, match=r"rms_norm_eps is 0\.5 and was 1e-06"):
            engine.reload(None)
    finally:
        own.write_text(before)
    engine.assert_on_a()


def test_a_file_that_is_replaced_during_a_reload_leaves_the_engine_as_it_was(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(engine.folders["B"], tmp_path, dirs_exist_ok=True)
    read = file_source.read_in_batches

    def replacing(
        batches: object, handles: object, paths: dict[str, str], *others: object
    ) -> Iterator[object]:
        for number, item in enumerate(read(batches, handles, paths, *others)):
            if number == 0 and any(str(tmp_path) in path for path in paths.values()):
                replaced(tmp_path / "model.safetensors")
            yield item

    monkeypatch.setattr(file_source, "read_in_batches", replacing)
    with pytest.raises(SourceError, match="changed while it was read"):
        engine.reload(tmp_path)
    engine.assert_on_a()
