"""Damaged and hostile files for everything that reads files: each must be read, or be refused in one line.

Started in the folder `tests`:

    python -m support.fuzz_readers --mutations 10000        every kind of file, some minutes to hours
    python -m support.fuzz_readers --kind run --only 57     one mutation again, with its traceback

Each mutation is read in a process that may take so much memory and time and no more, so that what would fill a
machine or hang is found, and not suffered. A mutation is told by its kind, the seed and its number.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nmt.config.mapping import from_mapping, read_yaml
from nmt.data.batch_iterator import BatchIterator
from nmt.data.options import BatchingOptions
from nmt.data.pair_blocks import read_blocks
from nmt.data.text_lines import check_file, decode_lines
from nmt.errors import UserError
from nmt.interop.fairseq import convert_checkpoint
from nmt.options import TrainConfig
from nmt.run.plot import open_runs
from nmt.train_loop import train
from nmt.translation.options import TranslationOptions
from nmt.translation.translator import Translator
from support import fairseq_model, fuzz_images
from support import fuzz_mutations as mutations
from support.fairseq_data import write_split

KEPT = Path(__file__).parents[1] / "data" / "checkpoints-2"
SECONDS = 10  # of the processor, for one file
SECONDS_BY_THE_CLOCK = 120  # for what waits; a busy machine must not be taken for that
MEGABYTES = 1500  # beside what the process has when it begins
LONGEST_LINE = 2000
BATCH = 25  # mutations that a process reads

By = dict[str, Sequence[mutations.Mutation]]  # patterns of names of files -> how they are damaged


@dataclass(frozen=True)
class Kind:
    """Files, how they are damaged, and who reads them."""

    make: Callable[[Path], None]
    damage: By
    read: Callable[[Path], object]


def _make_fairseq(folder: Path, *, old: bool) -> None:
    settings = {**fairseq_model.PLAIN, "encoder_layers": 1, "dropout": 0.1}
    state = fairseq_model.make_weights(settings, source_size=16, target_size=24)
    fairseq_model.write_dictionaries(folder, source_size=16, target_size=24)
    written = fairseq_model.under_old_names(state) if old else state
    content = fairseq_model.checkpoint(settings, written, old=old)
    torch.save(content, folder / "checkpoint.pt", _use_new_zipfile_serialization=not old)


def _read_fairseq(folder: Path) -> None:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    convert_checkpoint(folder / "checkpoint.pt", folder, output, source_lang=None, target_lang=None)


def _damage_settings(data: bytes, rng: random.Random) -> bytes:
    """Save a checkpoint with another setting, another tensor, or an odd pickle."""
    settings = dict(fairseq_model.PLAIN)
    state = fairseq_model.make_weights(settings, source_size=16, target_size=24)
    choice = rng.random()
    if choice < 0.6:
        name = rng.choice([*settings, "dropout", "task", "adaptive_input", "encoder", "decoder_output_dim"])
        settings[name] = rng.choice([mutations.odd_value(rng), float(rng.choice([0.5, 6.0])), torch.ones(3)])
    elif choice < 0.9:
        name = rng.choice(list(state))
        tensor = state[name]
        odd = [
            torch.ones(()),
            torch.ones(0),
            tensor[None],
            tensor[:1],
            tensor.mT if tensor.dim() == 2 else tensor[::2],
        ]
        odd += [
            torch.ones(2, 3, 4),
            tensor.expand(64, *tensor.shape),
            tensor.long(),
            tensor.bool(),
            torch.ones(3).expand(5, 3),
        ]
        if rng.random() < 0.3:  # one matrix of query, key and value
            state = fairseq_model.under_old_names(state)
            state["encoder.layers.0.self_attn.in_proj_weight"] = rng.choice([*odd, torch.ones(7, 8)])
        else:
            state[name] = rng.choice(odd)
    content = fairseq_model.checkpoint(settings, state, old=rng.random() < 0.5)
    with io.BytesIO() as file:
        torch.save(content, file)
        saved = file.getvalue()
    if choice < 0.9:
        return saved
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        path.write_bytes(saved)
        return mutations.replaced_pickle(path, rng.choice(mutations.odd_pickles()))


def _make_model(folder: Path) -> None:
    shutil.copytree(KEPT / "run" / "checkpoints" / "update-0000008", folder, dirs_exist_ok=True)


def _read_model(folder: Path) -> None:
    translator = Translator.load(folder)
    translator.translate(["1 2 3", "4 5 6 \x1b 7"], beam=2, max_len_a=0, max_len_b=5)


def _make_data(folder: Path) -> None:
    shutil.copytree(KEPT / "data", folder, dirs_exist_ok=True)


def _read_data(folder: Path) -> None:
    task = TranslationOptions(data=folder, eval_bleu=False).build(None)
    for split in ("train", "valid"):
        examples = task.open_split(split)
        with BatchIterator(examples, BatchingOptions(max_tokens=100), seed=1) as batches:
            for _ in batches:
                pass
    task._references(examples)


def _make_fairseq_data(folder: Path) -> None:
    fairseq_model.write_dictionaries(folder, source_size=16, target_size=24)
    for split in ("train", "valid"):
        write_split(folder, split)


def _read_fairseq_data(folder: Path) -> None:
    task = TranslationOptions(data=folder, eval_bleu=False).build(None)
    for split in ("train", "valid"):
        examples = task.open_split(split)
        examples.collate([examples[number] for number in range(len(examples))])


def _make_text(folder: Path) -> None:
    lines = "".join(f"{number} \u00e4 b\n" for number in range(50)).encode()
    (folder / "train.xx").write_bytes(lines)
    (folder / "train.yy.gz").write_bytes(gzip.compress(lines, mtime=0))


def _read_text(folder: Path) -> None:
    """Read parallel text, as nmt-preprocess does before it begins, and then when it works."""
    paths = [folder / "train.xx", folder / "train.yy.gz"]
    for path in paths:
        check_file(path)
    for block in read_blocks(*paths, block_bytes=100):
        for path, lines in zip(paths, (block.source, block.target), strict=True):
            decode_lines(lines, path, first_line=block.first_line)


def _make_run(folder: Path) -> None:
    shutil.copytree(KEPT, folder, symlinks=True, dirs_exist_ok=True)
    checkpoints = folder / "run" / "checkpoints"
    shutil.copytree(checkpoints / "update-0000008", checkpoints / "update-0000007")


def _read_run(folder: Path) -> None:
    """Go on with a run, as the same command does."""
    os.chdir(folder)
    mapping = {
        **read_yaml(KEPT / "run" / "config.yaml"),
        "max-update": "11",
        "eval-bleu": "no",
        "eval-beam": None,
    }
    mapping |= {"validate-interval-updates": "10", "best-checkpoint-metric": "loss"}
    config = from_mapping(TrainConfig[TranslationOptions], mapping, where="config")
    train(config)


def _read_records(folder: Path) -> None:
    runs, _ = open_runs([folder / "run"])
    for run in runs:
        _ = run.best


def _make_yaml(folder: Path) -> None:
    shutil.copy(KEPT / "run" / "config.yaml", folder / "config.yaml")


def _read_yaml(folder: Path) -> None:
    from_mapping(TrainConfig[TranslationOptions], read_yaml(folder / "config.yaml"), where="config.yaml")


_BYTES = mutations.damage_bytes
_TENSORS = (_BYTES, mutations.damage_safetensors, mutations.damage_safetensors)
_JSON = (_BYTES, mutations.damage_json, mutations.damage_json, mutations.damage_json)
_YAML = (_BYTES, mutations.damage_yaml, mutations.damage_yaml)
_DICT = (_BYTES, mutations.damage_text)
_MODEL: By = {
    "*.safetensors": _TENSORS,
    "config.yaml": _YAML,
    "dict.*.txt": _DICT,
    "sentencepiece.model": (_BYTES,),
    "languages.json": _JSON,
}
KINDS: dict[str, Kind] = {
    "fairseq": Kind(
        lambda folder: _make_fairseq(folder, old=False),
        {
            "checkpoint.pt": (
                _BYTES,
                mutations.damage_zip,
                _damage_settings,
                _damage_settings,
                _damage_settings,
            ),
            "dict.*.txt": _DICT,
        },
        _read_fairseq,
    ),
    "fairseq-old": Kind(
        lambda folder: _make_fairseq(folder, old=True), {"checkpoint.pt": (_BYTES,)}, _read_fairseq
    ),
    "model": Kind(_make_model, _MODEL, _read_model),
    "data": Kind(
        _make_data,
        {
            "*.idx": (_BYTES, mutations.damage_index, mutations.damage_index),
            "*.bin": (_BYTES,),
            "dict.*.txt": _DICT,
            "preprocess.json": _JSON,
            "valid.*y": _DICT,
        },
        _read_data,
    ),
    "fairseq-data": Kind(
        _make_fairseq_data,
        {"*.idx": (_BYTES, mutations.damage_index), "*.bin": (_BYTES,), "dict.*.txt": _DICT},
        _read_fairseq_data,
    ),
    "text": Kind(_make_text, {"train.xx": _DICT, "train.yy.gz": (_BYTES,)}, _read_text),
    "run": Kind(
        _make_run,
        {
            "run/checkpoints/update-0000008/state.json": _JSON,
            "run/checkpoints/update-0000008/optimizer.safetensors": _TENSORS,
            **{
                f"run/checkpoints/update-0000008/{name}": how
                for name, how in _MODEL.items()
                if name[0] != "*"
            },
            "run/metrics.jsonl": (_BYTES, mutations.damage_json_lines),
        },
        _read_run,
    ),
    "records": Kind(_make_run, {"run/metrics.jsonl": (_BYTES, mutations.damage_json_lines)}, _read_records),
    "image-model": Kind(
        fuzz_images.make_model,
        {
            "*.safetensors": _TENSORS,
            "config.yaml": _YAML,
            "classes.txt": _DICT,
            "images.json": _JSON,
            "split.json": _JSON,
        },
        fuzz_images.read_model,
    ),
    "mnist": Kind(
        fuzz_images.make_idx,
        {
            "*.gz": (_BYTES, fuzz_images.damage_compressed, fuzz_images.damage_compressed),
            "*-ubyte": (_BYTES, fuzz_images.damage_header),
        },
        fuzz_images.read_idx,
    ),
    "yaml": Kind(_make_yaml, {"config.yaml": _YAML}, _read_yaml),
}


def fuzz(kind: str, numbers: Sequence[int], *, seed: int, scratch: Path) -> Iterator[str]:
    """Read files that are damaged by these numbers; yield a text about each that is not read or refused well."""
    whole = scratch / "whole"
    if not whole.exists():
        whole.mkdir()
        KINDS[kind].make(whole)
    waiting = list(numbers)
    while waiting:
        report = scratch / "report"
        report.write_text("")
        process = os.fork()
        if process == 0:
            try:
                _read_in_child(kind, waiting[:BATCH], seed=seed, scratch=scratch, report=report)
            finally:
                os._exit(1)  # whatever happens, it must not go on as its parent does
        _, status = os.waitpid(process, 0)
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        yield from (text for _, text in lines if text)
        num_done = len(lines)
        if status:
            number = waiting[min(num_done, len(waiting) - 1)]
            died = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {status >> 8}"
            is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
            why = " (out of time)" if is_late else ""
            yield f"{kind} {number}: the process ended with {died}{why}"
            num_done += 1
        waiting = waiting[max(num_done, 1) :]


def _read_in_child(kind: str, numbers: Sequence[int], *, seed: int, scratch: Path, report: Path) -> None:
    """Read some damaged files, note what came out, and end the process."""
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.stdout = sys.stderr = io.StringIO()
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(SECONDS_BY_THE_CLOCK)
        text = read_one(kind, number, seed=seed, scratch=scratch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        with report.open("a") as file:
            file.write(json.dumps([number, text]) + "\n")
    os._exit(0)


def read_one(kind: str, number: int, *, seed: int, scratch: Path) -> str:
    """Damage a file, read it, and return what is wrong about how that ended, or nothing."""
    rng = random.Random(f"{seed} {kind} {number}")
    files = KINDS[kind]
    folder = scratch / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scratch / "whole", folder, symlinks=True)
    pattern = rng.choice(list(files.damage))
    path = rng.choice(sorted(folder.glob(pattern)))
    change = rng.choice(files.damage[pattern])
    path.write_bytes(change(path.read_bytes(), rng))
    what = f"{kind} {number} ({path.relative_to(folder)}, {change.__name__})"
    try:
        with np.errstate(all="ignore"):
            files.read(folder)
    except UserError as error:
        text = str(error)
        if not text.isprintable() or len(text) > LONGEST_LINE:
            return f"{what}: a message of {len(text)} characters, {text[:200]!a}"
    except OSError as error:
        if error.filename is None:
            return f"{what}: {_tail()}"
    except BaseException:
        return f"{what}: {_tail()}"
    return ""


def _tail() -> str:
    lines = traceback.format_exc(limit=-3).splitlines()
    return ascii(" | ".join(line.strip() for line in lines[-7:]))[-700:]


def main() -> None:
    """Fuzz all kinds or one, and end with 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mutations", type=int, default=300, help="of each kind")
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one mutation, read in this process")
    options = parser.parse_args()
    num_found = 0
    for kind in options.kind or KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            if options.only is not None:
                KINDS[kind].make(Path(scratch) / "whole")
                print(
                    read_one(kind, options.only, seed=options.seed, scratch=Path(scratch)) or "nothing wrong"
                )
                continue
            for text in fuzz(kind, range(options.mutations), seed=options.seed, scratch=Path(scratch)):
                num_found += 1
                print(text, flush=True)
        print(f"{kind}: {options.mutations} read", flush=True)
    with contextlib.suppress(BrokenPipeError):
        print(f"{num_found} found")
    raise SystemExit(1 if num_found else 0)


if __name__ == "__main__":
    main()
