"""Write a small English-German corpus that has to be translated, not looked up.

Every sentence is drawn from the grammar below together with its translation. English leaves open what German
must say: gender, number and case of articles, adjectives and pronouns; the finite verb in second place of a main
clause and in last place of a subordinate one; participles, infinitives and separated prefixes at the end.
"""

import argparse
import re
from collections import namedtuple
from pathlib import Path
from random import Random

SIZES = {"test": 500, "valid": 500, "train": 20_000}


def rows(table: str) -> list[list[str]]:
    return [[field.replace("_", " ") for field in row.split()] for row in table.split(",")]


# English[/plural], gender, German singular[/where not nominative], plural. Persons, things, locations.
NOUNS = {
    "P": rows("""teacher m Lehrer Lehrer, doctor m Arzt Ärzte, guest m Gast Gäste, boy m Junge/Jungen Jungen,
    student m Student/Studenten Studenten, neighbour m Nachbar/Nachbarn Nachbarn, woman/women f Frau Frauen,
    aunt f Tante Tanten, queen f Königin Königinnen, child/children n Kind Kinder, girl n Mädchen Mädchen"""),
    "T": rows("""apple m Apfel Äpfel, letter m Brief Briefe, dog m Hund Hunde, bag f Tasche Taschen, cat f Katze
    Katzen, lamp f Lampe Lampen, book n Buch Bücher, picture n Bild Bilder, knife/knives n Messer Messer"""),
    "L": rows("""garden m Garten Gärten, forest m Wald Wälder, kitchen f Küche Küchen, school f Schule Schulen,
    house n Haus Häuser, hotel n Hotel Hotels"""),
}
# English, German before an ending, German on its own, the kinds of nouns that it describes.
ADJECTIVES = rows("""old alt alt PTL, small klein klein PTL, strange seltsam seltsam PTL, new neu neu TL, heavy
    schwer schwer T, beautiful schön schön TL, expensive teur teuer TL, dark dunkl dunkel L, young jung jung P,
    friendly freundlich freundlich P, tired müd müde P""")
# English, stem, numbers, type: after d(er)-words the adjective is weak; an e(in)-word without an ending and a
# n(umber) leave it to the adjective to show gender and case.
DETERMINERS = rows("""the d sp d, the d sp d, the d sp d, this dies s d, these dies p d, every jed s d,
    a ein s e, a ein s e, my mein sp e, our unser sp e, his sein sp e, her ihr sp e, two zwei p n, three drei p n""")
DER = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den"}  # m, f, n, p(lural)
STRONG = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en"}
# English subject and object; German nominative, accusative, dative; agreement: 0 ich, 1 er, 2 wir and sie.
PRONOUNS = rows("""I me ich mich mir 0, he him er ihn ihm 1, she her sie sie ihr 1, we us wir uns uns 2,
    they them sie sie ihnen 2""")
# English[/past], infinitive with its separable prefix, third person, participle, auxiliary, and what follows: the
# letters of SLOTS, "-" for nothing, "I" for an infinitive with "zu", "S" for a clause with "dass".
VERBS = rows("""buy/bought kaufen kauft gekauft h t, find/found finden findet gefunden h t, lose/lost verlieren
    verliert verloren h t, forget/forgot vergessen vergisst vergessen h t, see/saw sehen sieht gesehen h a,
    visit besuchen besucht besucht h a, invite ein|laden lädt eingeladen h a, call an|rufen ruft angerufen h a,
    help helfen hilft geholfen h d, follow folgen folgt gefolgt s d, listen_to zu|hören hört zugehört h d,
    wait_for warten wartet gewartet h f, give/gave geben gibt gegeben h dt, show zeigen zeigt gezeigt h dt,
    lend/lent leihen leiht geliehen h dt, sleep/slept schlafen schläft geschlafen h -, stay bleiben bleibt
    geblieben s -, work arbeiten arbeitet gearbeitet h -, fall_asleep/fell_asleep ein|schlafen schläft
    eingeschlafen s -, walk gehen geht gegangen s m, run/ran laufen läuft gelaufen s m, begin/began beginnen
    beginnt begonnen h I, promise versprechen verspricht versprochen h I, say/said sagen sagt gesagt h S,
    believe glauben glaubt geglaubt h S""")
SIMPLE = "adfmt-"  # what follows the verb of a clause within a clause
# Letter, kind of noun, case, English and German preposition.
SLOTS = rows("d P dat _ _, a P acc _ _, f P acc _ auf, t T acc _ _, m L acc into in, l L dat in in")
MODALS = rows("can kann kann können, must muss muss müssen, should sollte sollte sollten")
AUXILIARIES = {"h": ("habe", "hat", "haben"), "s": ("bin", "ist", "sind")}
TENSES = ("present", "past", "modal")
TIMES = rows("""now jetzt present, sometimes manchmal present, today heute present/modal, tomorrow morgen modal,
    on_Monday am_Montag past/modal, yesterday gestern past, last_week letzte_Woche past""")
CONJUNCTIONS = rows(
    "because weil weil, although obwohl obwohl, before bevor bevor, when wenn als"
)  # last: past

# A noun phrase or pronoun: German by case, agreement as in PRONOUNS, gender of a noun.
Phrase = namedtuple("Phrase", "english german agreement gender")
# A clause: English, German with the finite verb second, first or last, the thing that it is about.
Clause = namedtuple("Clause", "english second first last thing")


def by_gender(forms: str, gender: str) -> str:
    return forms.split()["mfnp".index(gender)]


def decline(stem: str, type_: str, adjective: str, singular: str, plural: str, gender: str, case: str) -> str:
    """Put determiner, adjective (or "") and noun into a case."""
    strong = by_gender(STRONG[case], gender)
    weak = "e" if case != "dat" and gender != "p" and (case, gender) != ("acc", "m") else "en"
    is_bare = type_ == "n" or (type_ == "e" and (case, gender) in (("nom", "m"), ("nom", "n"), ("acc", "n")))
    determiner = by_gender(DER[case], gender) if stem == "d" else stem if is_bare else stem + strong
    noun = singular.split("/")[0 if case == "nom" else -1]
    if gender == "p":
        noun = plural + "n" * (case == "dat" and plural[-1] not in "ns")
    return f"{determiner} {adjective and adjective + (strong if is_bare else weak)} {noun}"


def draw_noun(random: Random, kind: str) -> Phrase:
    english, gender, *noun = random.choice(NOUNS[kind])
    article, stem, numbers, type_ = random.choice(DETERMINERS)
    singular, _, plural = english.partition("/")
    gender = random.choice(numbers).replace("s", gender)
    adjective, attribute, *_ = random.choice([row for row in ADJECTIVES if kind in row[3]])
    if random.random() < 0.5:
        adjective = attribute = ""
    words = f"{adjective} {plural or singular + 's' if gender == 'p' else singular}".strip()
    article += "n" * (article == "a" and words[0] in "aeiou")
    german = {case: decline(stem, type_, attribute, *noun, gender, case) for case in DER}
    return Phrase(f"{article} {words}", german, 2 if gender == "p" else 1, gender)


def draw_person(random: Random, subject: Phrase | None = None) -> Phrase:
    """Draw a subject, or the object of a subject: the first person does not act on itself."""
    if random.random() < 0.75:
        return draw_noun(random, "P")
    taken = ("I", "we") if subject and subject.english in ("I", "we", "to") else ()
    who, whom, *german, agreement = random.choice([row for row in PRONOUNS if row[0] not in taken])
    return Phrase(whom if subject else who, dict(zip(DER, german, strict=True)), int(agreement), "")


def draw_clause(random: Random, subject: Phrase, tense: str, verbs: str, adverbs: bool = False) -> Clause:
    """Draw a clause with a verb that one of the letters in `verbs` follows."""
    verb, infinitive, third, participle, auxiliary, slots = random.choice(
        [v for v in VERBS if set(verbs) & set(v[5])]
    )
    (base, _, past), (prefix, _, infinitive) = verb.partition("/"), infinitive.rpartition("|")
    (word, _, particle), (modal, *modals) = base.partition(" "), random.choice(MODALS)
    who, wer = subject.agreement, subject.german["nom"]
    zu = f"{prefix}zu{infinitive}" if prefix else f"zu {infinitive}"
    predicate, finite, end = {
        "present": (
            f"{word}{'s' * (who == 1)} {particle}",
            (infinitive[:-1], third, infinitive)[who],
            prefix,
        ),
        "past": (
            past or f"{word.removesuffix('e')}ed {particle}",
            AUXILIARIES[auxiliary][who],
            participle + " ",
        ),
        "modal": (f"{modal} {base}", modals[who], f"{prefix}{infinitive} "),
        "infinitive": (base, "", zu),
    }[tense]
    rest, pronoun, time, middle, tail, thing = "", "", "", "", "", None
    for letter, kind, case, preposition, german in SLOTS:
        if letter in slots or (letter == "l" and adverbs and random.random() < 0.3):
            phrase = draw_person(random, subject) if kind == "P" else draw_noun(random, kind)
            thing = phrase if kind == "T" else thing
            rest += f" {preposition} {phrase.english}"
            if phrase.gender or letter == "f":
                middle += f" {german} {phrase.german[case]}"
            else:
                pronoun = phrase.german[case]  # stands before the time
    if slots == "I":
        inner = draw_clause(random, Phrase("to", {"nom": ""}, 0, ""), "infinitive", SIMPLE)
        rest, tail = f"{rest} {inner.english}", f", {inner.last},"
    elif slots == "S":
        inner = draw_clause(random, draw_person(random), random.choice(TENSES), SIMPLE)
        rest, tail = f"{rest} that {inner.english}", f", dass {inner.last},"
    elif adverbs and random.random() < 0.4:
        when, time, _ = random.choice([row for row in TIMES if tense in row[2]])
        rest += f" {when}"
    middle, english = f"{pronoun} {time} {middle}", f"{subject.english} {predicate} {rest}"
    second, first = (f"{two} {middle} {end} {tail}" for two in (f"{wer} {finite}", f"{finite} {wer}"))
    return Clause(english, second, first, f"{wer} {middle} {end}{finite} {tail}", thing)


def draw_pair(random: Random) -> tuple[str, str]:
    """Draw a sentence and its translation."""
    template, tense, subject = random.randrange(8), random.choice(TENSES), draw_person(random)
    if template == 0:  # a relative clause about the subject
        noun = draw_noun(random, "P")
        relative = Phrase("who", {"nom": by_gender(DER["nom"], noun.gender)}, noun.agreement, "")
        clause = draw_clause(random, relative, random.choice(TENSES), SIMPLE)
        german = {"nom": f"{noun.german['nom']}, {clause.last},"}
        subject = Phrase(f"{noun.english} {clause.english}", german, noun.agreement, noun.gender)
    if template == 1:  # a pronoun of the thing's gender
        clause = draw_clause(random, subject, tense, "t")
        adjective, _, german, _ = random.choice([row for row in ADJECTIVES if "T" in row[3]])
        it, ist = ("they are", "sind") if clause.thing.gender == "p" else ("it is", "ist")
        er = by_gender("er sie es sie", clause.thing.gender)
        return f"{clause.english} because {it} {adjective}", f"{clause.second}, weil {er} {german} {ist}"
    main = draw_clause(
        random, subject, tense, SIMPLE if template < 5 else SIMPLE + "IS", template in (2, 3, 7)
    )
    if template in (2, 3):  # a subordinate clause, last or first
        other = draw_clause(random, draw_person(random), tense, SIMPLE, adverbs=True)
        when, wenn, als = random.choice(CONJUNCTIONS)
        wenn = als if tense == "past" else wenn
        if template == 2:
            return f"{main.english} {when} {other.english}", f"{main.second}, {wenn} {other.last}"
        return f"{when} {other.english}, {main.english}", f"{wenn} {other.last}, {main.first}"
    if template in (4, 5):  # time or place first, then the finite verb
        place = draw_noun(random, "L")
        when, wann, _ = random.choice([row for row in TIMES if tense in row[2]])
        if random.random() < 0.5:
            when, wann = f"in {place.english}", f"in {place.german['dat']}"
        return f"{when} {main.english}", f"{wann} {main.first}"
    return main.english, main.second


def polish(text: str) -> str:
    """Make a sentence of words with spare spaces and commas: "in dem  Haus ,," becomes "Im Haus."."""
    text = re.sub(r"\bin das\b", "ins", re.sub(r"\bin dem\b", "im", re.sub(r"\s+", " ", text)))
    text = re.sub(r"[\s,]*([,.])", r"\1", text.strip() + ".")
    return text[0].upper() + text[1:]


def draw_corpus(seed: int, size: int) -> list[tuple[str, str]]:
    """Draw pairs with different sources."""
    random, pairs = Random(seed), {}
    while len(pairs) < size:
        english, german = draw_pair(random)
        pairs[polish(english)] = polish(german)
    return list(pairs.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pairs = iter(draw_corpus(args.seed, sum(SIZES.values())))
    for split, size in SIZES.items():
        drawn = [next(pairs) for _ in range(size)]
        for side, language in enumerate(("en", "de")):
            text = "".join(f"{pair[side]}\n" for pair in drawn)
            (args.folder / f"{split}.{language}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
