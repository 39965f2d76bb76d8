"""The quickstart's corpus: its sizes, that it cannot be looked up, and that its German is right."""

import importlib.util
import re
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    """Import one of the example's scripts, which are no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


make_corpus = load("make_corpus")
nearest_neighbour = load("nearest_neighbour")

Sides = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    make_corpus.write_corpus(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> dict[str, Sides]:
    def read(name: str) -> list[str]:
        return (folder / name).read_text(encoding="utf-8").splitlines()

    return {split: (read(f"{split}.en"), read(f"{split}.de")) for split in ("train", "valid", "test")}


def test_script_has_at_most_200_lines() -> None:
    assert len((FOLDER / "make_corpus.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_splits_have_the_promised_sizes(corpus: dict[str, Sides]) -> None:
    sizes = {split: (len(source), len(target)) for split, (source, target) in corpus.items()}
    assert sizes == {"train": (20_000, 20_000), "valid": (500, 500), "test": (500, 500)}


def test_no_source_occurs_twice(corpus: dict[str, Sides]) -> None:
    sources = [sentence for source, _ in corpus.values() for sentence in source]
    assert len(set(sources)) == len(sources) == 21_000


def test_seed_decides_on_the_corpus(folder: Path, tmp_path: Path) -> None:
    make_corpus.write_corpus(tmp_path / "same", seed=1)
    make_corpus.write_corpus(tmp_path / "other", seed=2)
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_german_is_a_function_of_the_english() -> None:
    random = Random(3)
    translations: dict[str, str] = {}
    num_repeated = 0
    for _ in range(20_000):
        english, german = map(make_corpus.polish, make_corpus.draw_pair(random))
        num_repeated += english in translations
        assert translations.setdefault(english, german) == german
    assert num_repeated > 20  # or nothing was compared


def test_copying_the_nearest_neighbour_is_rarely_right(corpus: dict[str, Sides]) -> None:
    source, target = corpus["test"]
    by_edits, by_ngrams = nearest_neighbour.score_copying(corpus["train"], (source[:50], target[:50]))
    assert max(by_edits, by_ngrams) < 0.05


def test_nearest_neighbours_are_those_of_a_full_search() -> None:
    sentences = ["a b c d", "a x c", "c b a", "a b c", "b c d e f", "a b x d"]
    words = nearest_neighbour.Index(sentences, longest=1)
    ngrams = nearest_neighbour.Index(sentences, longest=3)
    edits = [nearest_neighbour.edit_distance(["a", "b", "d"], sentence.split()) for sentence in sentences]
    assert edits == [1, 2, 2, 1, 4, 1]
    assert sorted(nearest_neighbour.nearest_by_edits("a b d", sentences, words)) == [0, 3, 5]
    # Of its 6 n-grams it shares a, b, d and "a b" with the first and the last, which have 9; a, b and "a b" with
    # "a b c", which has 6: 8/15 against 6/12.
    assert nearest_neighbour.nearest_by_ngrams("a b d", ngrams) == [0, 5]


# Each phrase can be looked up in a grammar: determiner and its type, adjective, noun, gender, case.
PHRASES = [
    ("d d alt Arzt Ärzte m nom", "der alte Arzt"),
    ("d d alt Arzt Ärzte m acc", "den alten Arzt"),
    ("d d alt Arzt Ärzte m dat", "dem alten Arzt"),
    ("d d jung Frau Frauen f nom", "die junge Frau"),
    ("d d jung Frau Frauen f dat", "der jungen Frau"),
    ("d d neu Buch Bücher n acc", "das neue Buch"),
    ("d d dunkl Hotel Hotels p dat", "den dunklen Hotels"),
    ("dies d klein Kind Kinder n nom", "dieses kleine Kind"),
    ("dies d klein Kind Kinder p dat", "diesen kleinen Kindern"),
    ("jed d müd Junge/Jungen Jungen m acc", "jeden müden Jungen"),
    ("jed d müd Junge/Jungen Jungen m nom", "jeder müde Junge"),
    ("ein e alt Arzt Ärzte m nom", "ein alter Arzt"),
    ("ein e alt Arzt Ärzte m acc", "einen alten Arzt"),
    ("ein e alt Nachbar/Nachbarn Nachbarn m dat", "einem alten Nachbarn"),
    ("ein e teur Messer Messer n acc", "ein teures Messer"),
    ("ein e teur Messer Messer n dat", "einem teuren Messer"),
    ("unser e schwer Lampe Lampen f acc", "unsere schwere Lampe"),
    ("unser e schwer Hund Hunde m nom", "unser schwerer Hund"),
    ("mein e freundlich Lehrer Lehrer p nom", "meine freundlichen Lehrer"),
    ("mein e freundlich Lehrer Lehrer p dat", "meinen freundlichen Lehrern"),
    ("zwei n schön Apfel Äpfel p acc", "zwei schöne Äpfel"),
    ("zwei n schön Apfel Äpfel p dat", "zwei schönen Äpfeln"),
]


@pytest.mark.parametrize(("words", "expected"), PHRASES)
def test_noun_phrase_is_declined(words: str, expected: str) -> None:
    assert make_corpus.decline(*words.split()) == expected


def test_noun_phrase_without_adjective_is_declined() -> None:
    phrase = make_corpus.decline("d", "d", "", "Student/Studenten", "Studenten", "m", "acc")
    assert phrase.split() == ["den", "Studenten"]


def test_polishing_contracts_and_punctuates() -> None:
    assert make_corpus.polish("in dem  Haus , das er sieht,,") == "Im Haus, das er sieht."
    assert make_corpus.polish("er geht in das Haus") == "Er geht ins Haus."


VERBS = """kaufe kauft kaufen finde findet finden verliere verliert verlieren vergesse vergisst vergessen
sehe sieht sehen besuche besucht besuchen helfe hilft helfen folge folgt folgen warte wartet warten
gebe gibt geben zeige zeigt zeigen leihe leiht leihen schlafe schläft schlafen bleibe bleibt bleiben
gehe geht gehen laufe läuft laufen hoffe hofft hoffen verspreche verspricht versprechen sage sagt sagen
glaube glaubt glauben"""
SEPARABLE = {
    **dict.fromkeys(("lade", "lädt", "laden"), "ein"),
    **dict.fromkeys(("rufe", "ruft", "rufen"), "an"),
    **dict.fromkeys(("höre", "hört", "hören"), "zu"),
}
AUXILIARIES = "habe hat haben bin ist sind kann können muss müssen sollte sollten"
FINITE = {*VERBS.split(), *AUXILIARIES.split(), *SEPARABLE}
FINAL = {*VERBS.split(), *AUXILIARIES.split()} | {prefix + verb for verb, prefix in SEPARABLE.items()}
FINAL |= {"einschlafe", "einschläft", "einschlafen"}


def test_finite_verb_ends_subordinate_clauses(corpus: dict[str, Sides]) -> None:
    clause = re.compile(r", (?:weil|obwohl|bevor|wenn|als|dass|die|der|das) [^,.]*?(\w+)[,.]")
    last = [match[1] for german in corpus["train"][1] for match in clause.finditer(german)]
    assert len(last) > 5_000
    # The object of an infinitive may begin like a relative clause: ", der Frau zuzuhören".
    last = [word for word in last if word not in ("anzurufen", "einzuladen", "zuzuhören")]
    assert {"hat", "sind", "muss", "anruft", "einschläft", "bleiben"} <= set(last) <= FINAL


def test_finite_verb_follows_what_stands_first(corpus: dict[str, Sides]) -> None:
    adverb = re.compile(r"(?:Heute|Jetzt|Manchmal|Morgen|Gestern|Am Montag) (\w+) ")
    clause = re.compile(r"(?:Weil|Obwohl|Bevor|Wenn|Als) [^,]*, (\w+) ")
    second = {m[1] for german in corpus["train"][1] if (m := adverb.match(german) or clause.match(german))}
    assert len(second) > 40
    assert second <= FINITE


def test_separated_prefix_ends_the_main_clause(corpus: dict[str, Sides]) -> None:
    finite = re.compile(rf"(?:Heute|Jetzt|Manchmal) ({'|'.join(SEPARABLE)}) [^,.]*?(\w+)[,.]")
    ends = [(m[1], m[2]) for german in corpus["train"][1] if (m := finite.match(german))]
    assert len(ends) > 30
    assert all(SEPARABLE[verb] == last for verb, last in ends)


def test_when_in_the_past_is_als(corpus: dict[str, Sides]) -> None:
    pairs = [pair for pair in zip(*corpus["train"], strict=True) if pair[0].startswith("When ")]
    assert len(pairs) > 300
    for _, german in pairs:
        is_perfect = bool(re.search(r" (?:habe|hat|haben|bin|ist|sind),", german))
        assert german.startswith("Als " if is_perfect else "Wenn ")
