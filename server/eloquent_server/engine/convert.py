"""GGUF to safetensors, as a program: `python -m eloquent_server.engine.convert GGUF DIRECTORY`."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ADVISED_TEMPERATURE = 0.2
ADVISED_TOP_P = 0.9
"What SmolLM2's authors advise in its model card; the GGUF file does not carry it."


def convert(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` to `target` in the Hugging Face layout, weights in float32.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: transformers does not know the file's architecture.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain tensors by now, but save_pretrained refuses while these marks are there.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.update(
        do_sample=True, temperature=ADVISED_TEMPERATURE, top_p=ADVISED_TOP_P
    )
    model.save_pretrained(target, max_shard_size="2GB")
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
