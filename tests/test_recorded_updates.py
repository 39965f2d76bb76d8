"""Updates of one shape: by a run on the CPU, and on a GPU, where they are recorded, beside plain ones."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_pairs import make_pairs
from support.packed_updates import (
    CPU,
    GPU,
    LENGTHS,
    SIZES,
    PairTask,
    assert_close,
    make_model,
    make_trainer,
    trained,
    updates,
)
from support.tiny_translation_model import WORDS
from support.toy_run import assert_bit_equal, records, tensors
from support.toy_run import config as toy_config
from support.toy_task import PointExamples, PointTask

from nmt.data.options import BatchingOptions, PreprocessOptions
from nmt.data.packing import PackedShape, pack_pairs
from nmt.data.preprocess import preprocess
from nmt.distributed import single
from nmt.errors import UserError
from nmt.models import packed
from nmt.models.attention import CrossAttention
from nmt.options import OptimizationOptions, TrainConfig, train_config
from nmt.run.memory_probe import find_packed_split
from nmt.run.packing import notes_on_padding, packing
from nmt.system import cuda_graphs as recording
from nmt.system.determinism import deterministic_algorithms
from nmt.task import LossOutput
from nmt.train_loop import train
from nmt.trainer import Trainer
from nmt.translation.task import TranslationTask
from nmt.update.precision import Precision
from nmt.update.recorded import Recorded


def write_data(folder: Path) -> None:
    """Make a data directory of 300 pairs of 1 to 12 words and their reversal."""
    for split, size in (("train", 300), ("valid", 10)):
        draws = torch.Generator().manual_seed(size)
        lengths = torch.randint(1, 13, (size,), generator=draws).tolist()
        lines = [
            [WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=draws).tolist()] for n in lengths
        ]
        for language, step in (("en", 1), ("de", -1)):
            text = "".join(" ".join(line[::step]) + "\n" for line in lines)
            folder.with_name(f"{split}.{language}").write_text(text)
    preprocess(
        PreprocessOptions(
            source_lang="en",
            target_lang="de",
            destdir=folder,
            trainpref=str(folder.with_name("train")),
            validpref=str(folder.with_name("valid")),
            vocab_size=330,
        ),
        log=lambda _: None,
    )


def data_config(folder: Path, *, device: str = "cpu", **options: Any) -> TrainConfig[Any]:
    """A run of a small Transformer on packed batches of the small corpus."""
    data = folder.parent / "data"
    if not data.exists():
        write_data(data)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIZES.items()}
    given: dict[str, Any] = {
        **{"data": data, "save_dir": folder, "device": device, "packing": "on", "max_tokens": 200, **sizes},
        **{"eval_bleu": False, "share_all_embeddings": True, "warmup_updates": 4},
        **{"max_update": 12, "save_interval_updates": 4, "keep_last": 9, "log_interval": 4, **options},
    }
    return train_config(**given)


def test_a_run_trains_on_packed_batches_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data_config(whole))
    train(data_config(parts, max_update=5))
    train(data_config(parts))
    assert_bit_equal(tensors(whole, 12), tensors(parts, 12))
    losses = [record["loss"] for record in records(whole, "train")]
    assert losses == [record["loss"] for record in records(parts, "train")]
    assert losses[-1] < losses[0]


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    script = tmp_path / "script.py"
    script.write_text(
        "import nmt\n"
        "nmt.train(nmt.train_config(data='data', save_dir='run', num_workers=1, arch='transformer_tiny',"
        " max_tokens=200, max_update=2, device='cpu', eval_bleu=False))\n"
    )
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert 'must begin its training under `if __name__ == "__main__":`' in done.stderr
    assert "must live as long as the training, but one has ended" in done.stderr


def test_packed_batches_hold_more_than_padded_ones(tmp_path: Path) -> None:
    ends = []
    for wanted in ("on", "off"):
        result = train(data_config(tmp_path / wanted, packing=wanted, max_update=None, max_epoch=1))
        ends.append(max(record["update"] for record in result.history))
    packed, padded = ends
    assert packed < padded


def test_a_task_that_cannot_pack_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`packing` must be auto or off"):
        train(data_config(tmp_path / "run", r_drop=1.0, label_smoothing=0.0, dropout=0.1))


class DoublingAttention(CrossAttention):
    """Has a way of its own for padded batches alone."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(*args, **kwargs)


class HalvingTask(TranslationTask):
    """Has a loss of its own for padded batches alone."""

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> LossOutput:
        output = super().compute_loss(model, batch)
        return LossOutput(output.loss / 2, output.sums)


def test_what_is_made_for_padded_batches_is_not_packed(tmp_path: Path) -> None:
    """Packing would train another model than the one that translates, or another loss, without a word."""
    config = data_config(tmp_path / "run", packing="auto")
    task = config.task_options.build(None)
    examples = task.open_split("train")

    def is_packed(task: Any, model: Any, device: torch.device = GPU) -> bool:
        return packing(config, task, model, examples, device) is not None

    assert is_packed(task, task.build_model())
    assert not is_packed(task, task.build_model(), CPU)
    attention, hooked = task.build_model(), task.build_model()
    attention.decoder.layers[1].cross_attention.__class__ = DoublingAttention
    hooked.encoder.register_forward_hook(lambda *_: None)
    assert not is_packed(task, attention)
    assert not is_packed(task, hooked)
    assert not is_packed(HalvingTask(task.options, task.assets), task.build_model())
    with pytest.raises(UserError, match="`packing` must be auto or off"):
        packing(data_config(tmp_path / "run"), task, attention, examples, CPU)


def test_where_batches_are_padded_on_a_gpu_the_log_says_why(tmp_path: Path) -> None:
    config = data_config(tmp_path / "run", packing="auto")
    task = config.task_options.build(None)
    examples, model = task.open_split("train"), task.build_model()

    def notes(task: Any, model: Any, device: torch.device = GPU, config: TrainConfig[Any] = config) -> str:
        return " ".join(notes_on_padding(config, task, model, examples, device))

    assert notes(task, model) == ""
    changed = task.build_model()
    changed.decoder.layers[1].cross_attention.__class__ = DoublingAttention
    why = "batches are padded, which is slower on a GPU than packed ones: "
    assert notes(task, changed, CPU) == ""
    assert notes(task, changed) == (
        f"{why}`decoder.layers.1.cross_attention`, which is of the class DoublingAttention and not CrossAttention"
        ", may know padded batches alone"
    )
    assert notes(task, torch.nn.Linear(2, 2)) == (
        f"{why}the model (Linear) is not the Transformer of this package"
    )
    halving = HalvingTask(task.options, task.assets)
    other_loss = TranslationTask(task.options, task.assets, loss=task.loss)
    assert notes(halving, model) == notes(other_loss, model) == f"{why}the loss is not that of this package"
    r_drop = data_config(tmp_path / "run", packing="auto", r_drop=1.0, label_smoothing=0.0)
    assert notes(r_drop.task_options.build(None), model, config=r_drop) == (
        f"{why}`r-drop` is computed on padded batches alone"
    )
    by_number = data_config(tmp_path / "run", packing="auto", max_tokens=None, batch_size=8)
    assert notes(task, model, config=by_number) == f"{why}`max-tokens`, the size of packed rows, is not set"
    off = data_config(tmp_path / "run", packing="off")
    assert notes(task, changed, config=off) == ""


def test_a_task_that_knows_nothing_of_packing_is_told_only_where_lengths_differ(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", batching=BatchingOptions(max_tokens=32))
    task, examples = PointTask(), PointExamples(20, 1)
    given = config, task, task.build_model(), examples, GPU
    assert notes_on_padding(*given) == []
    examples.sizes[3] = 2
    (line,) = notes_on_padding(*given)
    assert line.endswith("the task points packs no batches")


def test_packing_needs_a_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`packing` must have `max-tokens`"):
        train(data_config(tmp_path / "run", max_tokens=None, batch_size=8))


def test_rows_that_do_not_fit_into_memory_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(CPU)
    examples = _Examples()
    asked: list[int] = []

    def pack(max_tokens: int) -> Any:
        examples.size = max_tokens
        asked.append(max_tokens)
        return examples

    def probe(batch: Any) -> None:
        if examples.size > 30:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer, "probe", probe)
    example = torch.tensor([0]).numpy()
    assert find_packed_split(trainer, pack, example, longest=10, max_tokens=100) == 25
    assert find_packed_split(trainer, pack, example, longest=10, max_tokens=30) is None
    # Another example is longer, and a row must hold it too.
    assert find_packed_split(trainer, pack, example, longest=28, max_tokens=100) == 28
    monkeypatch.setattr(trainer, "probe", out_of_memory)
    with pytest.raises(UserError, match="a row of 10 tokens, the length of the longest one, does not"):
        find_packed_split(trainer, pack, example, longest=10, max_tokens=100)


def out_of_memory(_: Any) -> None:
    raise torch.OutOfMemoryError("no room")


class _Examples:
    """One example of 10 tokens."""

    size = 0
    sizes = torch.tensor([[10, 8]]).numpy()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, items: list[int]) -> list[int]:
        return items


def test_weights_that_are_not_trained_are_those_that_were_loaded() -> None:
    """In low precision a copy of the model computes, which is made before a checkpoint is loaded."""
    found = []
    for is_loaded_later in (False, True):
        model = make_model()
        frozen = model.encoder.embedding.tokens.weight.requires_grad_(False).detach()
        if not is_loaded_later:
            frozen.mul_(2.0)
        options = OptimizationOptions(lr=0.01, warmup_updates=4, precision="bf16")
        world = single(CPU)
        trainer = Trainer(
            PairTask(), model, options, world=world, seed=1, updates_per_epoch=1, has_one_shape=True
        )
        if is_loaded_later:
            frozen.mul_(2.0)
        found.append(trained(trainer, updates(count=3)))
    assert_bit_equal(*found)


@pytest.mark.parametrize("is_wanted", [False, True])
def test_what_is_computed_again_in_the_backward_pass_is_not_recorded(
    is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws the same random numbers again, for which the host turns the generator back."""
    devices: list[str] = []
    monkeypatch.setattr("nmt.update.recorded.Recording", lambda _, device: devices.append(device.type))
    nowhere = torch.device("meta")
    model = make_model(activation_checkpointing=is_wanted).to(nowhere)
    precision = Precision("fp32", nowhere)
    Recorded(model, PairTask(), model, precision, single(nowhere), is_compiled=False)
    assert devices == ["cpu" if is_wanted else "meta"]


def test_a_large_recording_is_forgotten_before_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else could use its memory."""
    trainer = make_trainer(CPU)
    gradients = trainer.replicas
    assert isinstance(gradients, Recorded)
    forgotten: list[int] = []
    work = gradients._recording
    monkeypatch.setattr(work, "forget", lambda: forgotten.append(work.num_bytes))
    given = updates(count=4)
    monkeypatch.setattr("nmt.update.recorded._most_recorded_bytes", lambda _: 100)
    for num_bytes in (0, 100, 101):
        monkeypatch.setattr(work, "_num_bytes", num_bytes)
        gradients.give_back()
    assert forgotten == [101]
    assert_bit_equal(trained(trainer, given), trained(make_trainer(CPU), given))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_probe_has_no_less_memory_at_its_disposal_than_an_update(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(CPU, is_packed=is_packed)
    plain, sizes = torch.empty_like, []

    def empty_like(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(tensor.numel() if isinstance(tensor, torch.nn.Parameter) else 0)
        return plain(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    trainer.probe(updates(is_packed=is_packed)[0][0].batch)
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    # Adam's two means; of gradients in one tensor their parts, and the whole that these are joined to.
    assert sum(sizes) == (4 if is_packed else 2) * num_parameters


def test_kernels_that_do_not_work_are_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def try_out(*_: Any) -> None:
            raise RuntimeError("no triton here\nFailed to find C compiler")

    monkeypatch.setattr(packed, "_kernels", Broken)
    packed.have_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton does not work here \(Failed to find C compiler\)"):
        assert not packed.have_kernels(torch.bfloat16, 64, GPU)
    assert not packed.have_kernels(
        torch.float32, 64, GPU
    )  # nothing to be told: they compute in half precision
    assert not packed.have_kernels(torch.bfloat16, 64, CPU)
    packed.have_kernels.cache_clear()


def test_work_on_a_cpu_is_never_recorded() -> None:
    calls: list[int] = []
    work = recording.Recording(lambda: calls.append(1), CPU)
    for _ in range(5):
        work()
    assert len(calls) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("model", [{}, {"encoder_normalize_before": True, "decoder_normalize_before": True}])
def test_a_gpu_makes_the_updates_of_the_cpu(model: dict[str, Any]) -> None:
    ours = trained(make_trainer(GPU, precision="fp32", model=model), updates())
    theirs = trained(make_trainer(CPU, precision="fp32", model=model), updates())
    assert_close(ours, theirs, 2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_packed_updates_are_the_padded_ones_on_a_gpu(precision: str) -> None:
    packed = trained(make_trainer(GPU, precision=precision), updates())
    padded = trained(make_trainer(GPU, precision=precision, is_packed=False), updates(is_packed=False))
    assert_close(packed, padded, 2e-4 if precision == "fp32" else 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recorded_updates_are_the_plain_ones_bit_by_bit(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: random numbers go on as they would."""
    found = []
    for num_plain_calls in (2, 1000):
        monkeypatch.setattr(recording, "_NUM_PLAIN_CALLS", num_plain_calls)
        with deterministic_algorithms(True):
            trainer = make_trainer(GPU, precision=precision, model={"dropout": 0.3, "attention_dropout": 0.1})
            found.append(trained(trainer, updates(count=12)))
    assert_bit_equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_on_a_gpu_resumes_bit_by_bit(tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {"device": "cuda", "packing": "auto", "deterministic": True, "dropout": 0.3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data_config(whole, precision=precision, **options))
    train(data_config(parts, precision=precision, max_update=5, **options))
    train(data_config(parts, precision=precision, **options))
    assert_bit_equal(tensors(whole, 12), tensors(parts, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_that_are_computed_again_on_a_gpu_make_the_same_updates(precision: str) -> None:
    found = []
    for is_wanted in (False, True):
        with deterministic_algorithms(True):
            model = {"dropout": 0.3, "attention_dropout": 0.1, "activation_checkpointing": is_wanted}
            found.append(trained(make_trainer(GPU, precision=precision, model=model), updates()))
    # In half precision a sum of gradients is rounded between layers that are run one by one.
    assert_close(*found, 1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recording_that_is_forgotten_is_made_anew(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (0, 2**60):
        monkeypatch.setattr("nmt.update.recorded._most_recorded_bytes", lambda _, most=most: most)
        with deterministic_algorithms(True):
            trainer = make_trainer(GPU, precision=precision, model={"dropout": 0.3})
            for micro_batches in updates(count=5):
                trainer.train_step(micro_batches)
            gradients = trainer.replicas
            assert isinstance(gradients, Recorded) and gradients._recording.num_bytes > 0
            trainer.replicas.give_back()
            assert (gradients._recording.num_bytes == 0) == (most == 0)
            found.append(trained(trainer, updates(count=6)))
    assert_bit_equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "bf16", "ema_decay": 0.9}])
def test_recorded_updates_go_back_to_an_earlier_state(options: dict[str, Any]) -> None:
    with deterministic_algorithms(True):
        trainer = make_trainer(GPU, model={"dropout": 0.3}, **options)
        for micro_batches in updates(count=5):
            trainer.train_step(micro_batches)
        with trainer.evaluated_weights():
            tensors, values = trainer.state_dict()
            saved = {name: tensor.clone() for name, tensor in tensors.items()}
            weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        found = [trained(trainer, updates(count=6))]
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(weights[name])
        trainer.load_state_dict(saved, values)
        found.append(trained(trainer, updates(count=6)))
    assert_bit_equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adafactor"},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adamw", "weight_decay": 0.1, "decay_matrices_only": True},
    ],
)
def test_any_optimizer_steps_on_a_gpu_as_on_the_cpu(options: dict[str, Any]) -> None:
    given = {"precision": "fp32", **options}
    assert_close(
        trained(make_trainer(GPU, **given), updates()), trained(make_trainer(CPU, **given), updates()), 2e-4
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler of torch warns of itself
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compile": True, "precision": "fp32"},
        {"activation_checkpointing": True},
        {"word_dropout": 0.1, "attention_dropout": 0.1, "ema_decay": 0.9, "update_freq": 2},
        {"encoder_learned_pos": True, "decoder_learned_pos": True, "deterministic": True},
        {"encoder_normalize_before": True, "decoder_normalize_before": True, "precision": "fp16"},
        {"max_tokens": 50, "optimizer": "adafactor"},
    ],
)
def test_a_run_on_a_gpu_validates_in_the_middle(tmp_path: Path, options: dict[str, Any]) -> None:
    defaults = {"device": "cuda", "packing": "auto", "eval_bleu": True, "max_update": 24}
    result = train(data_config(tmp_path / "run", validate_interval_updates=8, **defaults, **options))
    found = [record for record in result.history if record["kind"] == "valid"]
    assert {8, 16, 24} <= {record["update"] for record in found}  # besides the ends of epochs
    assert all(0.0 < record["loss"] < 20.0 and "bleu" in record for record in found)


@pytest.mark.gpu
def test_an_overflow_in_fp16_is_cancelled_in_a_recording() -> None:
    trainer = make_trainer(GPU, precision="fp16")
    assert trainer.precision._scale is not None
    trainer.precision._scale.fill_(2.0**40)
    before = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
    for micro_batches in updates(count=6):
        trainer.train_step(micro_batches)
    assert trainer.cancellations.num_in_a_row() == 0
    assert [cancelled.is_overflow for cancelled in trainer.cancellations.take()] == [True] * 6
    after = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
    assert_bit_equal(before, after)
    assert trainer.precision.state_dict()["scale"] == 2.0**34


@pytest.mark.gpu
def test_a_row_that_fills_the_gpu_is_split() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2e9) / total)
    try:
        trainer = make_trainer(
            GPU, precision="fp32", model={"encoder_embed_dim": 512, "decoder_embed_dim": 512}
        )
        pairs = make_pairs(LENGTHS)

        def pack(max_tokens: int) -> Any:
            examples = _Examples()
            shape = PackedShape.of(max_tokens=max_tokens, max_sentences=len(LENGTHS), longest=12)
            examples.collate = lambda _: pack_pairs(pairs, shape)  # type: ignore[method-assign]
            return examples

        found = find_packed_split(trainer, pack, torch.tensor([0]).numpy(), longest=10, max_tokens=400_000)
        assert found is not None and 1000 < found < 400_000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_cudnn_is_not_asked_for_attention(tmp_path: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    train(data_config(tmp_path / "run", device="cuda", max_update=2))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    query = torch.zeros(2, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(acc_events=True) as profiler:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    names = [event.key for event in profiler.key_averages()]
    assert names and not any("cudnn" in name.lower() for name in names)
