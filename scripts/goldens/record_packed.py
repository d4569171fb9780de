"""Record matrices as the libraries that quantize them store them, and what these libraries dequantize them to.

    python scripts/goldens/record_packed.py [NAME ...]

Needs torch, transformers, compressed-tensors, bitsandbytes, torchao, autoawq, hqq and optimum-quanto, or those of the
formats NAME, on a processor (no GPU). Writes
tests/goldens/packed/NAME.safetensors, the quantized matrices of a tiny Llama of one layer, and NAME.json: its
quantization_config, and of each matrix the type that the library gives and the first 64 bits of the SHA-256 of its
bytes. GPTQ's are in the goldens of conversion: its own library needs a GPU to be installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "packed"
# Rows of 96 numbers: three groups of 32, and blocks of 64 that begin within rows.
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
Packed = tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The matrices of the layer: of about the size of trained ones, with a row of zeros but one, and a few outliers."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) * 0.05
        weight[3, 1:] = 0
        weight[5, ::17] *= 20
        made[f"model.layers.0.{name}.weight"] = weight.to(dtype)
    return made


def compressed(kind: str, dtype: torch.dtype, ordered: bool = False, **arguments: Any) -> Packed:
    """By compressed-tensors' compressor of the format `kind`; `ordered` as GPTQ orders columns."""
    import compressed_tensors.compressors  # noqa: F401
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
    compressor = BaseCompressor.load_from_registry(kind)
    tensors, dense = {}, {}
    for name, weight in weights(dtype).items():
        base = name.removesuffix("weight")
        size = args.group_size or weight.shape[1]
        if args.strategy == "block":
            high, wide = args.block_structure
            grid = torch.nn.functional.pad(weight, (0, -weight.shape[1] % wide, 0, -weight.shape[0] % high))
            groups = grid.reshape(grid.shape[0] // high, high, -1, wide).transpose(1, 2).flatten(2)
        elif args.strategy == "tensor":
            groups = weight.reshape(1, -1)
        else:
            groups = weight.reshape(weight.shape[0], -1, size)
        whole = None
        state = {"weight": weight}
        if args.strategy == "tensor_group":
            whole = generate_gparam(weight.min(), weight.max())
            state["weight_global_scale"] = whole
        scale, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
        state |= {"weight_scale": scale, "weight_zero_point": zeros}
        if ordered:
            generator = torch.Generator().manual_seed(2)
            index = torch.arange(weight.shape[1]) // size
            state["weight_g_idx"] = index[torch.randperm(len(index), generator=generator)].to(torch.int32)
        packed = compressor.compress(state, scheme)
        plain = compressor.decompress(packed, scheme)["weight"]
        if ordered:
            # The library's compressor leaves the order of columns to whoever multiplies.
            packed["weight_g_idx"] = state["weight_g_idx"]
            integers = compressor.decompress(packed | {"weight_scale": torch.ones_like(scale)}, scheme)["weight"]
            plain = integers * scale[:, packed["weight_g_idx"].long()]
        dense[name] = plain
        tensors |= {base + part: tensor.contiguous() for part, tensor in packed.items() if tensor is not None}
    config = {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}},
    }  # fmt: skip
    return config, tensors, dense


def transformers_model(settings: Any, dtype: torch.dtype, plain: Callable[[Any], torch.Tensor]) -> Packed:
    """By transformers with quantization `settings`; `plain` dequantizes a module."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=320, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    with tempfile.TemporaryDirectory() as name:
        model = LlamaForCausalLM(config).to(dtype)
        model.load_state_dict(weights(dtype), strict=False)
        model.save_pretrained(f"{name}/dense")
        model = AutoModelForCausalLM.from_pretrained(
            f"{name}/dense", quantization_config=settings, dtype=dtype, device_map="cpu"
        )
        model.save_pretrained(f"{name}/packed")
        stored = load_file(f"{name}/packed/model.safetensors")
        saved = json.loads(Path(f"{name}/packed/config.json").read_text())
        dense = {
            f"{path}.weight": plain(module)
            for path, module in model.named_modules()
            if path.endswith("_proj") and hasattr(module, "weight")
        }
    return saved["quantization_config"], {n: t for n, t in stored.items() if "_proj." in n}, dense


def bitsandbytes(dtype: torch.dtype, **settings: Any) -> Packed:
    """By bitsandbytes, through transformers."""
    import bitsandbytes.functional as library
    from transformers import BitsAndBytesConfig

    def plain(module: Any) -> torch.Tensor:
        if settings.get("load_in_4bit"):
            return library.dequantize_4bit(module.weight.data, module.weight.quant_state)
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return library.int8_vectorwise_dequant(module.weight.data, scales)

    return transformers_model(BitsAndBytesConfig(**settings), dtype, plain)


def torchao(config: Callable[[Any], Any], dtype: torch.dtype) -> Packed:
    """By torchao, through transformers."""
    import torchao.quantization
    from transformers import TorchAoConfig

    made = config(torchao.quantization)
    return transformers_model(TorchAoConfig(made), dtype, lambda module: module.weight.dequantize())


def awq(version: str = "gemm") -> Packed:
    """By AutoAWQ's module, dequantized by its own function. The package's own imports need all that trains.

    Of the version "gemv", which it dequantizes on a GPU alone, the integers and their scales are those of "gemm".
    """
    if "awq" not in sys.modules:
        package = types.ModuleType("awq")
        package.__path__ = list(importlib.util.find_spec("awq").submodule_search_locations)
        sys.modules["awq"] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    tensors, dense = {}, {}
    for name, weight in weights(torch.float16).items():
        base, size = name.removesuffix("weight"), 32
        groups = weight.float().reshape(weight.shape[0], -1, size)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low).clamp(min=1e-5) / 15).half()
        zeros = (-torch.round(low / scales.float())).clamp(0, 15)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        made = WQLinear_GEMM.from_linear(linear, 4, size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
        stored = made
        if version == "gemv":
            stored = WQLinear_GEMV.from_linear(linear, 4, size, scales=scales, zeros=zeros)
        tensors |= {base + part: getattr(stored, part) for part in ("qweight", "qzeros", "scales")}
        dense[name] = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, size).t()
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": version, "zero_point": True}, tensors, dense


def hqq(dtype: torch.dtype, moved: bool = False, **settings: Any) -> Packed:
    """By HQQ's module. `moved`, its scales and zeros have the type that moving it to a device gives them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    tensors, dense = {}, {}
    for name, weight in weights(dtype).items():
        base = name.removesuffix("weight")
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        linear.weight.data = weight
        layer = HQQLinear(linear, BaseQuantizeConfig(**settings), compute_dtype=dtype, device="cpu")
        if moved:
            layer.W_q.data, layer.meta = Quantizer.to_inplace(layer.W_q.data, layer.meta, "cpu")
        tensors |= {base + part: tensor for part, tensor in layer.state_dict().items()}
        dense[name] = layer.dequantize()
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": settings}}, tensors, dense


def quanto(kind: str, dtype: torch.dtype) -> Packed:
    """By Quanto's own way of saving a model. Its config.json says nothing, so the method is added here."""
    import optimum.quanto as library
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=320, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(weights(dtype), strict=False)
    made = library.QuantizedModelForCausalLM.quantize(model, weights=getattr(library, kind))
    with tempfile.TemporaryDirectory() as name:
        made.save_pretrained(name)
        stored = load_file(f"{name}/model.safetensors")
    dense = {
        f"{path}.weight": module.weight.dequantize() for path, module in model.named_modules() if path.endswith("_proj")
    }
    return {"quant_method": "quanto"}, {n: t for n, t in stored.items() if "_proj." in n}, dense


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT, FLOAT = {"type": "int"}, {"type": "float"}
MADE: dict[str, Callable[[], Packed]] = {
    "ct-int4": lambda: compressed("pack-quantized", BF16, **INT, num_bits=4, strategy="group", group_size=32),
    "ct-int4-zeros": lambda: compressed(
        "pack-quantized", F16, **INT, num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "ct-int4-ordered": lambda: compressed(
        "pack-quantized", BF16, True, **INT, num_bits=4, strategy="group", group_size=32
    ),
    "ct-int3-rows": lambda: compressed("pack-quantized", BF16, **INT, num_bits=3, strategy="channel", symmetric=False),
    "ct-int8-packed": lambda: compressed("pack-quantized", BF16, **INT, num_bits=8, strategy="channel"),
    "ct-int8": lambda: compressed("int-quantized", BF16, **INT, num_bits=8, strategy="channel"),
    "ct-int8-zeros": lambda: compressed(
        "int-quantized", F16, **INT, num_bits=8, strategy="channel", symmetric=False
    ),
    "ct-fp8": lambda: compressed("float-quantized", BF16, **FLOAT, num_bits=8, strategy="tensor"),
    "ct-fp8-rows": lambda: compressed("float-quantized", BF16, **FLOAT, num_bits=8, strategy="channel"),
    "ct-fp8-blocks": lambda: compressed(
        "float-quantized", BF16, **FLOAT, num_bits=8, strategy="block", block_structure=[32, 32]
    ),
    "ct-nvfp4": lambda: compressed(
        "nvfp4-pack-quantized", F32, **FLOAT, num_bits=4, strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "ct-mxfp4": lambda: compressed(
        "mxfp4-pack-quantized", F32, **FLOAT, num_bits=4, strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "bnb-nf4": lambda: bitsandbytes(BF16, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-nested": lambda: bitsandbytes(
        BF16, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bnb-fp4": lambda: bitsandbytes(F16, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-int8": lambda: bitsandbytes(F16, load_in_8bit=True),
    "torchao-int8": lambda: torchao(lambda library: library.Int8WeightOnlyConfig(version=2), BF16),
    "torchao-fp8": lambda: torchao(lambda library: library.Float8WeightOnlyConfig(), BF16),
    "torchao-int4-unpacked": lambda: torchao(
        lambda library: library.IntxWeightOnlyConfig(torch.int4, granularity=library.PerGroup(32)), BF16
    ),
    "hqq-int4": lambda: hqq(BF16, nbits=4, group_size=32, axis=1),
    "hqq-int4-columns": lambda: hqq(F16, moved=True, nbits=4, group_size=64, axis=0),
    "hqq-int8": lambda: hqq(BF16, moved=True, nbits=8, group_size=64, axis=1),
    "hqq-int3": lambda: hqq(F16, moved=True, nbits=3, group_size=32, axis=1),
    "hqq-int2": lambda: hqq(BF16, nbits=2, group_size=16, axis=1),
    "hqq-int1": lambda: hqq(F32, nbits=1, group_size=32, axis=0),
    "quanto-int8": lambda: quanto("qint8", BF16),
    "quanto-fp8": lambda: quanto("qfloat8", F16),
    "awq": awq,
    "awq-gemv": lambda: awq("gemv"),
}  # fmt: skip


def digest(tensor: torch.Tensor) -> str:
    """The first 64 bits of the SHA-256 of the tensor's bytes, with zeros that have no sign."""
    return hashlib.sha256((tensor + 0).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def main() -> None:
    """Record the formats named, or all."""
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or MADE:
        config, tensors, dense = MADE[name]()
        save_file(tensors, GOLDENS / f"{name}.safetensors")
        matrices = {key: [str(t.dtype).removeprefix("torch."), list(t.shape), digest(t)] for key, t in dense.items()}
        text = json.dumps({"quantization_config": config, "matrices": matrices}, indent=1)
        (GOLDENS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
