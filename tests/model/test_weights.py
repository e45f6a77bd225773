"""Checkpoints: three key layouts, strictly; sharded, and of the true sizes on the meta device."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from model import tiny
from model.config import HuluMedConfig, HuluMedQwen2Config, HuluMedQwen3Config
from model.modeling import HuluMedForConditionalGeneration

LAYOUTS = ["released", "original", "video_llama_3"]


def renamed(key: str, layout: str) -> str:
    """A key of the released Hugging Face layout in another one."""
    if layout == "original":
        return key.replace("model.vision_encoder.", "model.vision_encoder.vision_encoder.")
    if layout == "video_llama_3" and key.startswith("model."):
        for ours, theirs in (("vision_encoder", "vision_model"), ("mm_projector", "projector")):
            if key.startswith(f"model.{ours}."):
                return key.replace(f"model.{ours}.", f"model.{theirs}.")
        return key.replace("model.", "model.language_model.", 1)
    return key


def write_layout(source: Path, target: Path, layout: str, family: str) -> None:
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file({renamed(k, layout): v for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if layout == "original":
        config["vision_encoder"] = "./hulumed_vision"  # a path, beside the sizes
    if layout == "video_llama_3":
        vision = config.pop("vision_encoder_config")
        vision |= {"model_type": "video_llama_3_vision", "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
        image = config.pop("image_token_index")
        config = {
            "model_type": "video_llama_3", "image_token_id": image, "vision_config": vision,
            "text_config": {**config, "model_type": family},
        }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("source") / request.param
    tiny.write(folder, family=request.param)
    return folder, request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_round_trips_bit_for_bit(source: tuple[Path, str], layout: str, tmp_path: Path) -> None:
    folder, family = source
    write_layout(folder, tmp_path / "in", layout, family)
    model = HuluMedForConditionalGeneration.from_pretrained(tmp_path / "in")
    assert model.config.model_type == f"hulumed_{family}"
    model.save_pretrained(tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys(), "what is saved is the released layout"
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    again = HuluMedForConditionalGeneration.from_pretrained(tmp_path / "out")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_transformers_own_model_loads(source: tuple[Path, str], tmp_path: Path) -> None:
    """A checkpoint that video_llama_3 itself saved, and the same hidden states from both."""
    from transformers import VideoLlama3ForConditionalGeneration

    folder, family = source
    write_layout(folder, tmp_path / "in", "video_llama_3", family)
    theirs = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = HuluMedForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    u8 = torch.randint(0, 256, (32, 588), dtype=torch.uint8)
    grid, merge = torch.tensor([[2, 4, 4]]), torch.tensor([2])
    with torch.no_grad():
        got = ours.visual_features(u8, grid, [2])
        expected = theirs.model.get_image_features((u8.float() / 255 - 0.5) / 0.5, grid, merge).pooler_output
    torch.testing.assert_close(got, torch.cat(tuple(expected)), rtol=1e-5, atol=1e-5)


def test_the_auto_classes_know_it(source: tuple[Path, str]) -> None:
    folder, family = source
    expected = {"qwen2": HuluMedQwen2Config, "qwen3": HuluMedQwen3Config}[family]
    assert type(AutoConfig.from_pretrained(folder)) is expected
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert isinstance(auto.from_pretrained(folder), HuluMedForConditionalGeneration)


def test_sharded_dtype_and_device_map(source: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = source
    whole = HuluMedForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = HuluMedForConditionalGeneration.from_pretrained(
        tmp_path / "shards", dtype=torch.bfloat16, device_map="cpu", backend="reference"
    )
    assert again.dtype == torch.bfloat16
    assert again.backend == "reference"
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    next((tmp_path / "shards").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(OSError, match=r"index\.json: has shard .*, expected a file beside it"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(OSError, match="expected a file beside it"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "shards")
    index.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "shards")


def test_missing_and_left_over_keys_are_listed(source: tuple[Path, str], tmp_path: Path) -> None:
    folder, family = source
    write_layout(folder, tmp_path / "in", "released", family)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(2)
    del tensors["model.vision_encoder.post_layernorm.bias"]
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="expected the keys of") as caught:
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "in")
    for text in (str(tmp_path), "1 missing keys (model.vision_encoder.post_layernorm.bias)", "model.extra.weight"):
        assert text in str(caught.value)


def test_keys_of_another_shape_are_listed(source: tuple[Path, str], tmp_path: Path) -> None:
    folder, family = source
    write_layout(folder, tmp_path / "in", "released", family)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 mismatched keys .*model\.norm\.weight"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "in")


def test_a_pickle_is_not_opened(source: tuple[Path, str], tmp_path: Path) -> None:
    folder, family = source
    write_layout(folder, tmp_path / "in", "released", family)
    torch.save(load_file(tmp_path / "in" / "model.safetensors"), tmp_path / "in" / "pytorch_model.bin")
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 16384}, "mismatched keys (model.embed_tokens.weight ["),
        ({"vocab_size": 10**16}, "1 mismatched keys (model.embed_tokens.weight ["),
        ({"num_hidden_layers": 300, "layer_types": None}, "missing keys (model.layers.10.input_layernorm.weight"),
        ({"hidden_size": 2**40, "intermediate_size": 2**40}, "has a config that makes no model (RuntimeError"),
        ({"pad_token_id": 10**9}, "has a config that makes no model (AssertionError"),
    ],
)
def test_a_config_larger_than_its_weights_is_refused_before_they_are_read(
    change: dict, says: str, source: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, family = source
    write_layout(folder, tmp_path / "in", "released", family)
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: pytest.fail("was reached")))
    with pytest.raises(ValueError, match="expected") as caught:
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "in")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_and_its_shards_agree(source: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = source
    tensors = load_file(folder / "model.safetensors")
    keys = sorted(tensors)
    shutil.copy(folder / "config.json", tmp_path)
    places = {key: f"{'ab'[i % 2]}.safetensors" for i, key in enumerate(keys)}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({k: v for k, v in tensors.items() if places[k] == shard}, tmp_path / shard, {"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    good = {"metadata": {}, "weight_map": places}
    index.write_text(json.dumps(good))
    assert HuluMedForConditionalGeneration.from_pretrained(tmp_path)
    moved, unlisted = {**places, keys[0]: "b.safetensors"}, {k: v for k, v in places.items() if k != keys[0]}
    for bad, says in [
        ({**good, "weight_map": moved}, rf"a\.safetensors: has not the keys its index says \({keys[0]}\)"),
        ({**good, "weight_map": unlisted}, rf"a\.safetensors: has not the keys its index says \({keys[0]}\)"),
        ({**good, "weight_map": {}}, r"index\.json: has no weight_map or an empty one"),
        ({**good, "weight_map": [1]}, r"index\.json: has no weight_map"),
        ([], r"index\.json: has no weight_map"),
        ({"weight_map": places}, r"index\.json: has no metadata"),
    ]:
        index.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=says):
            HuluMedForConditionalGeneration.from_pretrained(tmp_path)
    index.write_text(json.dumps(good))
    twice = {k: v for k, v in tensors.items() if places[k] == "a.safetensors" or k == keys[1]}
    save_file(twice, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"has not the keys its index says \({keys[1]}\)"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path)


def test_a_key_in_two_layouts_at_once_is_refused(source: tuple[Path, str], tmp_path: Path) -> None:
    folder, family = source
    write_layout(folder, tmp_path / "in", "released", family)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 repeated keys \(model\.norm\.weight\)"):
        HuluMedForConditionalGeneration.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llava"}, "model_type 'llava'"),
        ({"image_token_index": None}, "no image_token_index"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vision_encoder_config": {"hidden_size": 145}}, "HuluMedVisionConfig"),
        ({"vision_encoder_config": [1]}, "vision_encoder_config of type list"),
        ({"vision_encoder_config": {"hiden_size": 5}}, "key 'hiden_size', expected 'hidden_size'"),
        ({"use_token_compresion": False}, "key 'use_token_compresion'"),
        ({"image_token_index": 10_000_000}, "image_token_index 10000000"),
        ({"image_token_index": -5}, "image_token_index -5"),
        ({"pruning": "bounded"}, "pruning has value 'bounded'"),
        ({"pruning": {"rule": "zzz"}}, "rule has value 'zzz'"),
        ({"hidden_size": -64}, "hidden_size -64"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0, expected at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4, expected a multiple of num_key_value_heads = 3"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers 1000000000, expected 1 to 1000"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"vision_encoder_config": {"num_attention_heads": 0}}, "num_attention_heads 0"),
        ({"vision_encoder_config": {"patch_size": 0}}, "patch_size 0"),
        ({"vision_encoder_config": {"rope_theta": -1.0}}, "rope_theta -1.0"),
        ({"image_token_index": "x"}, "image_token_index 'x'"),
        ({"dtype": "int8"}, "dtype torch.int8"),
        ({"dtype": 3}, "dtype 3"),
        ({"pruning": {"rule": ["previous"]}}, "rule has value ['previous']"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights 'adapter_model.bin'"),
        ({"transformers_weights": "../other/model.safetensors"}, "transformers_weights '../other"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config {"),
        ({"attn_implementation": "who/ever"}, "attn_implementation 'who/ever'"),
        ({"vision_encoder_config": {"_attn_implementation": "who/ever"}}, "attn_implementation 'who/ever'"),
    ],
)
def test_wrong_config_keys_name_the_file(change: dict, says: str, source: tuple[Path, str], tmp_path: Path) -> None:
    config = json.loads((source[0] / "config.json").read_text()) | change
    if "use_token_compresion" in change:
        del config["use_token_compression"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: has") as caught:
        HuluMedConfig.from_pretrained(tmp_path)
    assert says in str(caught.value)


# --- the true sizes -----------------------------------------------------------------------------------------

VISION = {"E": 1152, "F": 4304, "layers": 27}
TRUE = {
    "7B": {"family": "qwen2", "d": 3584, "layers": 28, "heads": 28, "kv": 4, "ffn": 18944, "tied": False},
    "4B": {"family": "qwen3", "d": 2560, "layers": 36, "heads": 32, "kv": 8, "ffn": 9728, "tied": True},
}
HEAD_DIM = 128  # of both decoders
VOCAB = 152064


def released_shapes(size: str) -> dict[str, list[int]]:
    """Keys and shapes of a released checkpoint, written down from its description, not from our modules."""
    s, E, F = TRUE[size], VISION["E"], VISION["F"]
    d, q, kv = s["d"], s["heads"] * HEAD_DIM, s["kv"] * HEAD_DIM
    v = "model.vision_encoder."
    shapes = {f"{v}embeddings.patch_embedding.weight": [E, 3, 14, 14], f"{v}embeddings.patch_embedding.bias": [E]}
    for i in range(VISION["layers"]):
        layer = f"{v}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": [E, E], f"{layer}self_attn.{name}.bias": [E]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": [E], f"{layer}{name}.bias": [E]}
        shapes |= {f"{layer}mlp.fc1.weight": [F, E], f"{layer}mlp.fc1.bias": [F]}
        shapes |= {f"{layer}mlp.fc2.weight": [E, F], f"{layer}mlp.fc2.bias": [E]}
    shapes |= {f"{v}post_layernorm.weight": [E], f"{v}post_layernorm.bias": [E]}
    for i, width in ((0, E), (2, d)):
        shapes |= {f"model.mm_projector.readout.{i}.weight": [d, width], f"model.mm_projector.readout.{i}.bias": [d]}
    shapes |= {"model.embed_tokens.weight": [VOCAB, d], "model.norm.weight": [d], "lm_head.weight": [VOCAB, d]}
    for i in range(s["layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{layer}self_attn.{name}.weight"] = [rows, d]
            if s["family"] == "qwen2":
                shapes[f"{layer}self_attn.{name}.bias"] = [rows]
        if s["family"] == "qwen3":
            shapes |= {f"{layer}self_attn.{n}.weight": [HEAD_DIM] for n in ("q_norm", "k_norm")}
        shapes[f"{layer}self_attn.o_proj.weight"] = [d, q]
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}mlp.{name}.weight"] = [s["ffn"], d]
        shapes[f"{layer}mlp.down_proj.weight"] = [d, s["ffn"]]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = [d]
    return shapes


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bf16 zeros that takes no disk: header, then a hole."""
    header, at = {}, 0
    for name, shape in shapes.items():
        n = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


@pytest.mark.parametrize("size", TRUE)
def test_a_checkpoint_of_the_true_size_loads_on_the_meta_device(size: str, tmp_path: Path) -> None:
    s = TRUE[size]
    shapes = released_shapes(size)
    if s["tied"]:
        del shapes["lm_head.weight"]
    write_sparse(tmp_path / "model.safetensors", shapes)
    config = {
        "model_type": f"hulumed_{s['family']}", "hidden_size": s["d"], "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"], "num_key_value_heads": s["kv"], "intermediate_size": s["ffn"],
        "vocab_size": VOCAB, "tie_word_embeddings": s["tied"], "image_token_index": 151665,
        "mm_projector_type": "mlp2x_gelu", "use_token_compression": True,
        "vision_encoder_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                                  "num_attention_heads": 16, "patch_size": 14},
    }  # fmt: skip
    if s["family"] == "qwen3":
        config["head_dim"] = HEAD_DIM
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = HuluMedForConditionalGeneration.from_pretrained(
        tmp_path, device_map="meta", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(p.is_meta for p in model.parameters())
    vision = sum(p.numel() for p in model.model.vision_encoder.parameters())
    assert vision == 412_147_440
