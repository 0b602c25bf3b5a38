"""A checkpoint as a folder of Hugging Face's, which `transformers` loads: weights, tokenizer, config, model card.

    model.safetensors, or model-00001-of-0000N.safetensors and an index
    config.json, generation_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json, README.md

The folder appears under its name when it is whole. Weights are read, verified and written one file at a time: memory
holds one file's tensors and what safetensors makes of them, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs import ConfigError
from data_pipeline.progress import Count, Elapsed
from data_pipeline.shards import sync_file, sync_folder
from data_pipeline.tokenizer import END_OF_TEXT, Tokenizer
from pretrain import checkpoint, disk
from pretrain.checkpoint import Committed, Damaged, SaveError
from pretrain.model_card import model_card
from pretrain.models.gpt import GPT, Gpt
from pretrain.models.hugging_face import OURSELVES, approximation, read_config, theirs_config, to_theirs, weight_files
from pretrain.restore import named_checkpoints, opened, restore, run_tokenizer
from pretrain.run import TrainRun

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILE_BYTES = 2 * 2**30  # of weights in one file
ROWS, MOST_TOKENS = 5, 1024  # of the comparison
TOLERANCE = 1e-3  # of logits in fp32; the two add up in another order


@dataclass(frozen=True)
class Exported:
    """What lies in a folder now. `difference`: the largest one between its logits and ours, where it was looked for."""

    folder: Path
    files: int
    bytes: int
    approximation: str | None
    difference: float | None = None
    was_there: bool = False


def export(
    name: str, out: Path, precision: Precision = "fp32", file_bytes: int = FILE_BYTES, check: bool = False
) -> Exported:
    """Write the checkpoint of RUN or RUN@step to `out`. With `check`, it is loaded with transformers and compared.

    The same once more is nothing to do. Raises ConfigError, and SaveError where it cannot be written or computes
    something else.
    """
    run, folders = named_checkpoints(name)
    committed = opened(folders[0])
    try:
        config = theirs_config(run.model)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    tokenizer = run_tokenizer(run)
    config |= _identity(run, committed, tokenizer, precision)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not _holds(out, config):
            raise ConfigError(f"{out}: exists and holds something else; give another folder, or remove it")
        return _counted(out, approximation(run.model), None, was_there=True)
    try:
        with _whole(out) as folder:
            _write(folder, run, committed, tokenizer, config, file_bytes)
            difference = _compared(folder, run, committed, precision) if check else None
            card = model_card(run, committed, precision, approximation(run.model), difference)
            _text(folder / "README.md", card)
    except OSError as error:
        raise SaveError(f"{disk.explain(error, out.parent, _size(run.model, precision))}: {out} not written") from None
    return _counted(out, approximation(run.model), difference)


def _identity(run: TrainRun, committed: Committed, tokenizer: Tokenizer, precision: Precision) -> dict[str, Any]:
    """What a config.json has besides the shape: by it an export is known again."""
    shape: dict[str, Any] = theirs_config(run.model)
    position = committed.position
    return {
        "dtype": str(DTYPES[precision]).removeprefix("torch."),
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        OURSELVES: {
            **shape[OURSELVES],
            "run": run.name,
            "step": position.step,
            "branch": committed.branch,
            "tokens": position.tokens,
            "manifest_sha256": committed.manifest_hash,
            "tokenizer_sha256": tokenizer.sha256,
        },
    }


def _holds(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder is this export: they appear whole, so its config and the names of its weights are enough."""
    try:
        return read_config(folder) == json.loads(json.dumps(config)) and bool(weight_files(folder))
    except ConfigError:
        return False


def _counted(folder: Path, note: str | None, difference: float | None, was_there: bool = False) -> Exported:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return Exported(folder, len(sizes), sum(sizes), note, difference, was_there)


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end. What an export that was killed has left is made over."""
    folder = out.parent / f".{out.name}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another export is being written there; wait for it") from None
        except OSError:
            pass  # a file system without locks
        for path in folder.iterdir():
            path.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for path in folder.iterdir():
            sync_file(path)
        sync_folder(folder)
        folder.rename(out)  # refused by the system where `out` holds anything
        sync_folder(out.parent)
    finally:
        os.close(descriptor)


def _write(
    folder: Path, run: TrainRun, committed: Committed, tokenizer: Tokenizer, config: dict[str, Any], file_bytes: int
) -> None:
    precision: Precision = "bf16" if config["dtype"] == "bfloat16" else "fp32"
    needs = _size(run.model, precision)
    if (line := disk.shortage(folder, needs, 10 + needs // file_bytes)) is not None:
        raise SaveError(f"{line}: {folder.name.removeprefix('.').removesuffix('.tmp')} not written")
    end = tokenizer.end_of_text
    _json(folder / "config.json", config)
    _json(folder / "generation_config.json", {f"{name}_token_id": end for name in ("bos", "eos", "pad")})
    marks = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk", "pad")}
    _json(folder / "special_tokens_map.json", marks)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": run.model.context}
    _json(folder / "tokenizer_config.json", {**kind, **marks, "clean_up_tokenization_spaces": False})
    (folder / "tokenizer.json").write_bytes(tokenizer.data)
    try:
        _write_weights(folder, committed, config["model_type"], DTYPES[precision], needs, file_bytes)
    except Damaged as error:
        raise ConfigError(f"{error}; give RUN@step of another checkpoint") from None


def _write_weights(
    folder: Path, committed: Committed, kind: str, dtype: torch.dtype, total: int, file_bytes: int
) -> None:
    from safetensors.torch import save_file

    places: dict[str, int] = {}
    written, held, held_bytes, files = 0, dict[str, Tensor](), 0, 0

    def flush() -> None:
        nonlocal held, held_bytes, files
        if not held:
            return
        path = folder / f"part-{files}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read it
        sync_file(path)
        places.update(dict.fromkeys(held, files))
        held, held_bytes, files = {}, 0, files + 1

    with Count() as show:
        for name, value in to_theirs(checkpoint.read_weights(committed), kind):
            tensor = value.to(dtype).contiguous()
            size = tensor.numel() * tensor.element_size()
            if held_bytes + size > file_bytes:
                flush()
            held[name], held_bytes, written = tensor, held_bytes + size, written + size
            del tensor, value
            show(written, total, "export", "bytes")
        flush()
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    names = names if files > 1 else ["model.safetensors"]
    for i, file_name in enumerate(names):
        (folder / f"part-{i}.safetensors").rename(folder / file_name)
    if files > 1:
        weight_map = {name: names[place] for name, place in places.items()}
        _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": written}, "weight_map": weight_map})


def _size(model: Gpt, precision: Precision) -> int:
    return model.parameter_count() * DTYPES[precision].itemsize


def _compared(folder: Path, run: TrainRun, committed: Committed, precision: Precision) -> float:
    """The largest difference between the logits of transformers and ours, on rows of random tokens.

    Ours are cast to the precision of the export, and both compute in fp32. Raises SaveError where they differ.
    """
    ours = restore(run, committed, torch.device("cpu")).model
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(DTYPES[precision]))
    length = min(run.model.context, MOST_TOKENS, run.model.band or MOST_TOKENS)
    difference = compare(folder, ours, length)
    if not difference <= TOLERANCE:  # NaN too
        raise SaveError(f"transformers computes other logits, by up to {difference:.3g}: not written")
    return difference


@torch.no_grad()
def compare(folder: Path, ours: GPT, length: int) -> float:
    """The largest difference of logits in fp32 between a folder, loaded with transformers, and a model of ours.

    Raises ConfigError where transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            "--check needs transformers, which is not installed: pip install 'longhaul[evaluate]'"
        ) from None
    with Elapsed("export: loaded with transformers, and compared", at_once=True):
        return _difference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ours, length)


def _difference(theirs: Any, ours: GPT, length: int) -> float:
    theirs.train(False)
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for _ in range(ROWS):
        tokens = torch.randint(ours.config.vocab_size, (1, length), generator=generator)
        largest = max(largest, float((theirs(tokens).logits - ours(tokens)).abs().max()))
    return largest


def _json(path: Path, value: dict[str, Any]) -> None:
    _text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
