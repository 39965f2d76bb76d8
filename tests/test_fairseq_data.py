"""A data directory of fairseq-preprocess opens as it is: no record, no raw text, no SentencePiece model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.fairseq_data import write_split

from nmt.cli.train import main
from nmt.data.data_directory import DataDirectory
from nmt.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.distributed import World
from nmt.errors import UserError
from nmt.models.options import TransformerOptions
from nmt.translation.options import TranslationOptions
from nmt.translation.task import TranslationTask
from nmt.translation.unknown_pieces import about_unknown


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "dict.en.txt").write_text("b 2\na 1\nmadeupword0000 0\nmadeupword0001 0\n")
    (tmp_path / "dict.de.txt").write_text("C 2\nA 2\nB 2\nmadeupword0000 0\n")
    for split in ("train", "valid"):
        write_split(tmp_path, split)
    return tmp_path


def test_languages_splits_and_vocabularies_are_found(directory: Path) -> None:
    data = DataDirectory(directory)
    assert (data.source_lang, data.target_lang) == ("en", "de")
    assert data.has_split("train")
    assert not data.has_split("test")
    assert data.num_pairs("valid") == 3
    assert data.segmenter_path is None
    assert not data.has_raw_text
    assert data.vocabulary("en").id("a") == 5
    with pytest.raises(UserError, match="must have the split `test`"):
        data.split_prefix("test", "en")


def test_a_task_takes_it_as_training_data(directory: Path, tmp_path: Path) -> None:
    model = TransformerOptions(
        encoder_layers=1, decoder_layers=1, encoder_embed_dim=8, decoder_embed_dim=8,
        encoder_ffn_embed_dim=8, decoder_ffn_embed_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    task = TranslationOptions(data=directory, model=model, eval_beam=1).build(None)
    examples = task.open_split("valid")
    assert examples.sizes[:].tolist() == [[3, 4], [2, 2], [1, 3]]
    assert [ids.tolist() for ids in examples[0]] == [[5, 4, 2], [5, 6, 4, 2]]
    # Without raw text the references are the pieces.
    scores = task.evaluate(
        task.build_model().eval(), examples, World(rank=0, size=1, device=torch.device("cpu"))
    )
    assert 0.0 <= scores["bleu"] <= 100.0
    saved = tmp_path / "saved"
    saved.mkdir()
    task.save_assets(saved)
    again = TranslationOptions(data=directory, model=model).build(saved)
    assert again.source_segmenter.encode(["a  b x"])[0].tolist() == [5, 4, 3]
    assert again.target_segmenter.decode([[5, 3, 6, 2, 1]]) == ["A <unk> B"]


def test_a_task_may_bring_what_it_is_trained_on(directory: Path, tmp_path: Path) -> None:
    """What is measured stays that of the directory."""
    own = tmp_path / "own"
    own.mkdir()
    with IndexedDatasetWriter(own / "ids", np.dtype("<u2")) as writer:
        for ids in ([4, 4, EOS_ID], [5, EOS_ID]):
            writer.add(np.array(ids))

    def train_sides(task: TranslationTask) -> tuple[IndexedDataset, IndexedDataset]:
        assert task.source_vocabulary.id("a") == 5
        return IndexedDataset(own / "ids"), IndexedDataset(own / "ids")

    options = TranslationOptions(data=directory)
    task = options.build(None, train_sides=train_sides)
    train, valid = task.open_split("train"), task.open_split("valid")
    assert [[x.tolist() for x in train[i]] for i in range(len(train))] == [[[4, 4, 2]] * 2, [[5, 2]] * 2]
    assert valid.sizes[:].tolist() == [[3, 4], [2, 2], [1, 3]]
    assert train.fingerprint() != options.build(None).open_split("train").fingerprint()
    small = TranslationOptions(data=directory, model=TransformerOptions(max_source_positions=2))
    with pytest.raises(UserError, match="must be at least 3, the longest source of `train`, but is 2"):
        small.build(None, train_sides=train_sides).open_split("train")


def test_a_task_reads_through_the_directory_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TranslationOptions(data=directory).build(None)
    opened = []

    def note(path: Path) -> DataDirectory:
        opened.append(path)
        return DataDirectory(path)

    monkeypatch.setattr("nmt.translation.task.DataDirectory", note)
    task.open_split("train")
    task.open_split("valid")
    assert opened == [directory]


def look_over(directory: Path, *, rank: int = 0) -> list[str]:
    task = TranslationOptions(data=directory).build(None)
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    return task.look_over(task.open_split("train"), task.open_split("valid"), world)


def test_the_share_of_what_is_unknown_is_said(directory: Path) -> None:
    assert look_over(directory) == []
    for lang in ("en", "de"):  # 1 word of 3, and 2 of 6
        dictionary = directory / f"dict.{lang}.txt"
        dictionary.write_text(dictionary.read_text().replace({"en": "a", "de": "A"}[lang], "x"))
    write_split(directory, "train")
    (line,) = look_over(directory)
    assert line.startswith(
        "warning: train: 33.33% of the source tokens and 33.33% of the target tokens are <unk>"
    )
    assert look_over(directory, rank=1) == []
    assert about_unknown("valid", (0.1, 0.0)) == [
        "valid: 10.00% of the source tokens and 0.00% of the target tokens are <unk>"
    ]


def test_a_run_on_raw_text_that_was_binarised_with_other_pieces_says_so_first(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "dict.en.txt").write_text("\u2581b 2\n\u2581a 1\n")
    for split in ("train", "valid"):
        write_split(directory, split)
    sizes = ["encoder-layers", "decoder-layers", "encoder-attention-heads", "decoder-attention-heads"]
    sizes += ["encoder-embed-dim", "decoder-embed-dim", "encoder-ffn-embed-dim", "decoder-ffn-embed-dim"]
    arguments = [x for name in sizes for x in (f"--{name}", "8" if "dim" in name else "1")]
    main([str(directory), "--save-dir", str(tmp_path / "run"), *arguments, "--device", "cpu", "--dry-run"])
    lines = capsys.readouterr()
    told = [line for line in (lines.out + lines.err).splitlines() if "<unk>" in line]
    assert [line.split(" of ")[0] for line in told] == ["warning: train: 100.00%", "warning: valid: 100.00%"]


def test_a_file_that_is_missing_is_named(directory: Path) -> None:
    (directory / "valid.en-de.de.bin").unlink()
    with pytest.raises(UserError, match=r"valid.en-de.de.bin must exist beside the other files of `valid`"):
        DataDirectory(directory)


def test_our_own_directory_without_its_record_is_not_taken_for_fairseqs(directory: Path) -> None:
    (directory / "sentencepiece.model").touch()
    with pytest.raises(UserError, match=r"has no preprocess.json"):
        DataDirectory(directory)


def test_two_pairs_of_languages_are_refused(directory: Path) -> None:
    write_split(directory, "test", languages=("de", "en"))
    with pytest.raises(UserError, match="one pair of languages, but holds de-en, en-de"):
        DataDirectory(directory)


@pytest.mark.parametrize("lang", ["en", "de"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_dictionary_that_is_too_short_for_the_data_is_refused(
    directory: Path, lang: str, split: str
) -> None:
    dictionary = directory / f"dict.{lang}.txt"
    dictionary.write_text(dictionary.read_text().split("\n")[0] + "\n")
    task = TranslationOptions(data=directory).build(None)
    with pytest.raises(
        UserError, match=rf"{split}\.en-de\.{lang}\.bin .* since .*dict\.{lang}\.txt has 5 types"
    ):
        task.open_split(split)


def test_a_split_without_pairs_is_refused(directory: Path) -> None:
    for lang in ("en", "de"):
        with IndexedDatasetWriter(directory / f"valid.en-de.{lang}", np.dtype("<u2")):
            pass
    with pytest.raises(UserError, match=r"`valid` of .* must hold pairs, but is empty"):
        TranslationOptions(data=directory).build(None).open_split("valid")


def test_special_symbols_in_the_text_are_told(directory: Path) -> None:
    # fairseq-preprocess makes them of words that are spelled like them.
    pairs = IndexedDataset(directory / "train.en-de.de")
    sequences = [pairs[i].tolist() for i in range(len(pairs))]
    with IndexedDatasetWriter(directory / "train.en-de.de", pairs.dtype) as writer:
        for number, sequence in enumerate(sequences):
            changed = [PAD_ID, *sequence] if number == 0 else sequence[:-1] if number == 1 else sequence
            writer.add(np.array(changed))
    within, without_end = look_over(directory)
    assert within.startswith("warning: train: 1 special symbol stands within sentences")
    assert without_end.startswith("warning: train: 1 sentence ends without `</s>`")
