"""Recognizes checkpoints that hold no plain float model, to say what they are and what to do.

They are quantized, adapters without their base model, or saved with names that a wrapper gave to the tensors.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from qvlm_export.calibrate.errors import UserError

UNQUANTIZED = "give the float16 or bfloat16 checkpoint that it was made from; it is quantized here, by --scheme"
# quant_method of transformers' quantization_config -> what it is called.
_UNNAMED = {"compression_config": "compressed-tensors", "quantization": "MLX"}  # key of config.json without a quant_method
QUANTIZATIONS = {
    "awq": "AWQ", "gptq": "GPTQ", "auto-round": "AutoRound", "bitsandbytes": "bitsandbytes", "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)", "compressed-tensors": "compressed-tensors", "modelopt": "ModelOpt", "quanto": "Quanto",
    "torchao": "torchao", "hqq": "HQQ", "eetq": "EETQ", "aqlm": "AQLM", "higgs": "HIGGS", "mxfp4": "MXFP4", "spqr": "SpQR",
    "vptq": "VPTQ", "bitnet": "BitNet", "quark": "Quark",
}  # fmt: skip
# Ends of tensor names -> what stores such tensors. The first that a checkpoint has names it.
QUANTIZED_TENSORS = {
    ".qweight": "GPTQ or AWQ weights",
    ".weight_packed": "packed compressed-tensors weights",
    ".absmax": "bitsandbytes weights",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes weights",
    ".SCB": "bitsandbytes INT8 weights",
    ".weight_scale_inv": "FP8 weights",
    ".weight_scale": "quantized weights",
    ".weight_quantizer._amax": "ModelOpt quantizers",
    ".biases": "MLX weights",
}
ADAPTER_TENSORS = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.")
# Beginnings of tensor names -> what writes them, and how to save the model without.
WRAPPERS = {  # also inside a name, where a part of the model was wrapped
    "module.": ("DataParallel or DeepSpeed", "save model.module"),
    "_orig_mod.": ("torch.compile", "save model._orig_mod"),
    "_fsdp_wrapped_module.": ("FullyShardedDataParallel", "save the full state dict of FSDP"),
    "base_model.model.": ("PEFT", "merge the adapter with merge_and_unload() and save the model that it returns"),
}
ADAPTER_CONFIG = "adapter_config.json"
MERGE_OR_REMOVE = "merge it with PEFT's merge_and_unload() and give the result, or remove the file where weights are merged"
# Files of folders without a model: pattern of the name, what it is, what to do.
INCOMPLETE = (
    (ADAPTER_CONFIG, "a LoRA adapter", "merge it into its base model (PEFT's merge_and_unload) and give the result"),
    ("non_lora_trainables.bin", "a LoRA adapter", "merge it into its base model and give the result"),
    ("mm_projector.bin", "a pretrained projector alone", "give the folder of the finetuned model"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed ZeRO", "run its zero_to_fp32.py and give the folder that it writes"),
    ("*.distcp", "a distributed checkpoint of torch", "convert it with torch.distributed.checkpoint.format_utils"),
    ("*.gguf", "GGUF weights, which are quantized", UNQUANTIZED),
    ("consolidated.00.pth", "weights in Meta's format", "convert them to a Hugging Face folder"),
    ("consolidated.safetensors", "weights in Mistral's format", "give the Hugging Face folder of the model"),
    ("tf_model.h5", "TensorFlow weights", "give a folder with PyTorch weights"),
    ("flax_model.msgpack", "Flax weights", "give a folder with PyTorch weights"),
)


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError where config.json describes a quantized model. where: its path."""
    for owner in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            described = owner.get(key) if isinstance(owner, Mapping) else None
            if isinstance(described, Mapping) and described:
                method = described.get("quant_method") or _UNNAMED.get(key, "by an unnamed method")
                what = f"the model is quantized already ({_name_method(method, described)})"
                raise UserError(
                    f"{where}: {what}; {UNQUANTIZED}; where its weights are floats, take {key} out of config.json"
                )


def _name_method(method: object, described: Mapping[str, Any]) -> str:
    bits = described.get("bits") or described.get("w_bit")
    if described.get("load_in_4bit"):
        bits = 4
    elif described.get("load_in_8bit"):
        bits = 8
    return f"{QUANTIZATIONS.get(str(method), method)}{f', {bits} bits' if isinstance(bits, int) else ''}"


def explain_names(names: Iterable[str]) -> str | None:
    """Returns what a checkpoint with tensors of these names is, and what to do, in words; None for a plain model."""
    names = list(names)
    for prefix, (writer, remedy) in WRAPPERS.items():
        if any(name.startswith(prefix) or f".{prefix}" in name for name in names):
            return f"names of tensors hold {prefix}, as {writer} saves them; {remedy}, or take {prefix} out of the names"
    if any(part in f".{name}" for name in names for part in ADAPTER_TENSORS):
        return "holds an adapter (LoRA) that is not merged; merge it with PEFT's merge_and_unload() and give the result"
    for end, what in QUANTIZED_TENSORS.items():
        if any(name.endswith(end) for name in names):
            return f"holds {what}; {UNQUANTIZED}"
    return None


def explain_files(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns what a folder without a model holds, and what to do; None for nothing known. names: of its files."""
    names = sorted(names)
    for pattern, what, remedy in INCOMPLETE:
        if found := fnmatch.filter(names, pattern):
            return f"{what} ({found[0]})", remedy
    return None
