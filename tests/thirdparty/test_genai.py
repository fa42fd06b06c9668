"""Files that onnxruntime-genai builds of tiny models of random weights: read, rewritten, and the same results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moec
from tests.onnx.reading import outputs

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}
WINDOW = 16


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=16, sliding_window=WINDOW)
    return transformers.GptOssForCausalLM(config)


def lfm2_moe() -> Any:
    """A short convolution, then attention with a mixture whose router is a sigmoid with a bias."""
    config = transformers.Lfm2MoeConfig(
        **SIZES, moe_intermediate_size=64, num_experts=4, num_dense_layers=1, layer_types=["conv", "full_attention"]
    )
    return transformers.Lfm2MoeForCausalLM(config)


def built(model: Any, folder: Path, precision: str) -> Path:
    """The file that the package's model builder makes for the CPU."""
    builder = pytest.importorskip("onnxruntime_genai.models", reason="onnxruntime-genai is not installed")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model.eval().save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    tokens = {"unk_token": "w0", "eos_token": "w1", "bos_token": "w2", "pad_token": "w1"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder / "model")
    script = Path(builder.__path__[0]) / "builder.py"
    to: list[Any] = [
        "-i",
        folder / "model",
        "-o",
        folder / "built",
        "-p",
        precision,
        "-e",
        "cpu",
        "-c",
        folder / "cache",
    ]
    subprocess.run([sys.executable, script, *to], check=True, capture_output=True)
    return folder / "built" / "model.onnx"


def feed(tokens: int, past: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    caches = {name: np.zeros(shape, np.float32) for name, shape in past.items()}
    ids = np.random.default_rng(tokens).integers(3, SIZES["vocab_size"], (1, tokens))
    return {"input_ids": ids, "attention_mask": np.ones((1, tokens), np.int64)} | caches


def test_gpt_oss(tmp_path: Path) -> None:
    """Its sliding cache has as many places as its window, which the file does not say: inputs are handed over."""
    torch.manual_seed(0)
    source = built(gpt_oss(), tmp_path, "fp32")
    with pytest.raises(moec.MoecError, match="MOEC708"):
        moec.export(source, tmp_path / "out.onnx")
    past = {f"past_key_values.{i}.{part}": (1, 2, WINDOW * (1 - i), 16) for i in range(2) for part in ("key", "value")}
    np.savez(tmp_path / "inputs.npz", **feed(20, past))
    report = moec.export(source, tmp_path / "out.onnx", inputs=tmp_path / "inputs.npz")
    assert [layer.status for layer in report.layers if layer.kind == "moe"] == ["rewritten"] * 2
    assert all("clamped at 7" in layer.evidence[1] for layer in report.rewritten)
    check_same(source, tmp_path / "out.onnx", feed(31, past))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_lfm2_moe(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = built(lfm2_moe(), tmp_path, precision)
    if precision == "int4":
        with pytest.raises(moec.MoecError, match=r'MOEC705.*quantize="int8" writes them anew'):
            moec.export(source, tmp_path / "out.onnx")
        report = moec.export(source, tmp_path / "out.onnx", quantize="int8")
        assert report.whole_model_error is not None
        assert report.whole_model_error < 0.035
    else:
        report = moec.export(source, tmp_path / "out.onnx")
        assert report.whole_model_error is not None
        assert report.whole_model_error < 2e-6
    assert [layer.status for layer in report.layers if layer.kind == "moe"] == ["rewritten"]


def check_same(source: Path, out: Path, inputs: dict[str, Any]) -> None:
    for mine, theirs in zip(outputs(out, inputs), outputs(source, inputs), strict=True):
        assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)
