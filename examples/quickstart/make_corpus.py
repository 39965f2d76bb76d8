"""Write a small English-German corpus that has to be translated, not looked up.

Every sentence is drawn from the grammar below together with its translation. English leaves open what German
must say: gender, number and case of articles, adjectives and pronouns; the finite verb in second place of a
main clause, in last place of a subordinate one; participles, infinitives, separated prefixes at the end.
"""

import argparse
import re
from collections import namedtuple
from itertools import islice
from pathlib import Path
from random import Random

SIZES = {"test": 500, "valid": 500, "train": 20_000}


def rows(table: str) -> list[list[str]]:
    return [[field.replace("_", " ") for field in row.split()] for row in table.split(",")]


# English[/plural], gender, German singular[/where not nominative], plural. Persons, things, locations.
NOUNS = {
    "P": rows("""teacher m Lehrer Lehrer, doctor m Arzt Ärzte, boy m Junge/Jungen Jungen,
    student m Student/Studenten Studenten, neighbour m Nachbar/Nachbarn Nachbarn, woman/women f Frau Frauen,
    aunt f Tante Tanten, queen f Königin Königinnen, child/children n Kind Kinder, girl n Mädchen Mädchen"""),
    "T": rows("""apple m Apfel Äpfel, letter m Brief Briefe, dog m Hund Hunde, cat f Katze Katzen,
    lamp f Lampe Lampen, book n Buch Bücher, picture n Bild Bilder, knife/knives n Messer Messer"""),
    "L": rows("""garden m Garten Gärten, forest m Wald Wälder, kitchen f Küche Küchen,
    school f Schule Schulen, house n Haus Häuser, hotel n Hotel Hotels"""),
}
# English, German before an ending, German on its own, the kinds of nouns that it describes.
ADJECTIVES = rows("""old alt alt PTL, small klein klein PTL, strange seltsam seltsam PTL, new neu neu TL,
    beautiful schön schön TL, expensive teur teuer TL, heavy schwer schwer T, dark dunkl dunkel L,
    young jung jung P, tired müd müde P, friendly freundlich freundlich P""")
# English, stem, numbers, type: an adjective is strong after n(umbers) and e(in)-words without an ending.
DETERMINERS = rows("""the d sp d, the d sp d, the d sp d, this dies s d, these dies p d, every jed s d,
    a ein s e, a ein s e, my mein sp e, our unser sp e, his sein sp e, her ihr sp e, two zwei p n""")
DER = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den"}  # m, f, n, p(lural)
STRONG = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en"}
# English subject and object; German nominative, accusative, dative; agreement: 0 ich, 1 er, 2 wir and sie.
PRONOUNS = rows("""I me ich mich mir 0, he him er ihn ihm 1, she her sie sie ihr 1, we us wir uns uns 2,
    they them sie sie ihnen 2""")
# English[/past], infinitive with its separable prefix, third person, participle, auxiliary, and what follows:
# SLOTS, "-" nothing, "I" an infinitive with "zu", "S" a clause with "dass".
VERBS = rows("""buy/bought kaufen kauft gekauft h t, find/found finden findet gefunden h t,
    lose/lost verlieren verliert verloren h t, forget/forgot vergessen vergisst vergessen h t,
    see/saw sehen sieht gesehen h a, visit besuchen besucht besucht h a, invite ein|laden lädt eingeladen h a,
    call an|rufen ruft angerufen h a, help helfen hilft geholfen h d, follow folgen folgt gefolgt s d,
    listen_to zu|hören hört zugehört h d, wait_for warten wartet gewartet h f,
    give/gave geben gibt gegeben h dt, show zeigen zeigt gezeigt h dt, lend/lent leihen leiht geliehen h dt,
    sleep/slept schlafen schläft geschlafen h -, stay bleiben bleibt geblieben s -,
    fall/fell_asleep ein|schlafen schläft eingeschlafen s -, walk gehen geht gegangen s m,
    run/ran laufen läuft gelaufen s m, hope hoffen hofft gehofft h I, say/said sagen sagt gesagt h S,
    promise versprechen verspricht versprochen h I, believe glauben glaubt geglaubt h S""")
# Letter, kind of noun, case, English and German preposition.
SLOTS = rows("d P dat _ _, a P acc _ _, f P acc _ auf, t T acc _ _, m L acc into in, l L dat in in")
PLAIN = ("-", "a", "d", "dt", "f", "m", "t")
MODALS = rows("can kann kann können, must muss muss müssen, should sollte sollte sollten")
AUXILIARIES = {"h": ("habe", "hat", "haben"), "s": ("bin", "ist", "sind")}
TENSES = ("present", "past", "modal")
TIMES = rows("""now jetzt present, sometimes manchmal present, today heute present/modal,
    tomorrow morgen modal, on_Monday am_Montag past/modal, yesterday gestern past""")
CONJUNCTIONS = rows("because weil weil, although obwohl obwohl, before bevor bevor, when wenn als")
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
    plural += "n" * (case == "dat" and plural[-1] not in "ns")
    noun = plural if gender == "p" else singular.split("/")[0 if case == "nom" else -1]
    return f"{determiner} {adjective and adjective + (strong if is_bare else weak)} {noun}"


def draw_noun(random: Random, kind: str) -> Phrase:
    english, gender, *noun = random.choice(NOUNS[kind])
    article, stem, numbers, type_ = random.choice(DETERMINERS)
    singular, _, plural = english.partition("/")
    gender = random.choice(numbers).replace("s", gender)
    suitable = random.choice([row[:2] for row in ADJECTIVES if kind in row[3]])
    adjective, attribute = random.choice([suitable, ("", "")])
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


def draw_clause(random: Random, subject: Phrase, tense: str, kinds=PLAIN, adverbs: bool = False) -> Clause:
    """Draw a clause; `kinds` are what may follow its verb, `adverbs` allows place and time."""
    verb, infinitive, third, participle, auxiliary, slots = random.choice([v for v in VERBS if v[5] in kinds])
    (verb, _, particle), (prefix, _, infinitive) = verb.partition(" "), infinitive.rpartition("|")
    (verb, _, past), (modal, *modals) = verb.partition("/"), random.choice(MODALS)
    wer, who = subject.german["nom"], subject.agreement
    predicate, finite, end = {
        "present": (verb + "s" * (who == 1), (infinitive[:-1], third, infinitive)[who], prefix),
        "past": (past or verb.removesuffix("e") + "ed", AUXILIARIES[auxiliary][who], f"{participle} "),
        "modal": (f"{modal} {verb}", modals[who], f"{prefix}{infinitive} "),
        "infinitive": (verb, "", f"{prefix}zu{infinitive}" if prefix else f"zu {infinitive}"),
    }[tense]
    rest, pronoun, time, middle, tail, thing = particle, "", "", "", "", None
    for slot, kind, case, preposition, german in SLOTS:
        if slot in slots or (slot == "l" and adverbs and slots != "m" and random.random() < 0.3):
            phrase = draw_person(random, subject) if kind == "P" else draw_noun(random, kind)
            thing = phrase if kind == "T" else thing
            rest += f" {preposition} {phrase.english}"
            if phrase.gender or slot == "f":
                middle += f" {german} {phrase.german[case]}"
            else:
                pronoun = phrase.german[case]  # stands before the time
    if slots == "I":
        inner = draw_clause(random, Phrase("to", {"nom": ""}, 0, ""), "infinitive", PLAIN[1:])
        rest, tail = f"{rest} {inner.english}", f", {inner.last},"
    elif slots == "S":
        inner = draw_clause(random, draw_person(random), random.choice(TENSES))
        rest, tail = f"{rest} that {inner.english}", f", dass {inner.last},"
    elif adverbs and random.random() < 0.4:
        when, time, _ = random.choice([row for row in TIMES if tense in row[2]])
        rest += f" {when}"
    english, middle = f"{subject.english} {predicate} {rest}", f"{pronoun} {time} {middle} {end}"
    second, first, last = f"{wer} {finite} {middle}", f"{finite} {wer} {middle}", f"{wer} {middle}{finite}"
    return Clause(english, f"{second} {tail}", f"{first} {tail}", f"{last} {tail}", thing)


def draw_pair(random: Random) -> tuple[str, str]:
    """Draw a sentence and its translation."""
    template, tense, subject = random.randrange(8), random.choice(TENSES), draw_person(random)
    if template < 2:  # a subordinate clause, last or first
        main = draw_clause(random, subject, tense, adverbs=True)
        other = draw_clause(random, draw_person(random), tense, adverbs=True)
        when, wenn, als = random.choice(CONJUNCTIONS)
        wenn = als if tense == "past" else wenn
        if template == 0:
            return f"{main.english} {when} {other.english}", f"{main.second}, {wenn} {other.last}"
        return f"{when} {other.english}, {main.english}", f"{wenn} {other.last}, {main.first}"
    if template == 2:  # a pronoun of the thing's gender
        main = draw_clause(random, subject, tense, ("t", "dt"))
        adjective, _, german, _ = random.choice([row for row in ADJECTIVES if "T" in row[3]])
        it, ist = ("they are", "sind") if main.thing.gender == "p" else ("it is", "ist")
        er = by_gender("er sie es sie", main.thing.gender)
        return f"{main.english} because {it} {adjective}", f"{main.second}, weil {er} {german} {ist}"
    if template == 3:  # a relative clause about the subject
        noun = draw_noun(random, "P")
        relative = Phrase("who", {"nom": by_gender(DER["nom"], noun.gender)}, noun.agreement, "")
        clause = draw_clause(random, relative, random.choice(TENSES))
        german = {"nom": f"{noun.german['nom']}, {clause.last},"}
        subject = Phrase(f"{noun.english} {clause.english}", german, noun.agreement, noun.gender)
    main = draw_clause(random, subject, tense, (*PLAIN, "I", "S"), adverbs=template == 7)
    if template == 4:  # the place first
        place = draw_noun(random, "L")
        return f"in {place.english} {main.english}", f"in {place.german['dat']} {main.first}"
    if template == 5:  # the time first
        when, wann, _ = random.choice([row for row in TIMES if tense in row[2]])
        return f"{when} {main.english}", f"{wann} {main.first}"
    return main.english, main.second


def polish(text: str) -> str:
    """Make a sentence of words with spare spaces and commas: "in dem  Haus ,," becomes "Im Haus."."""
    text = re.sub(r"\bin das\b", "ins", re.sub(r"\bin dem\b", "im", " ".join(text.split())))
    text = re.sub(r"[\s,]*([,.])", r"\1", f"{text}.")
    return text[0].upper() + text[1:]


def write_corpus(folder: Path, seed: int) -> None:
    random, pairs = Random(seed), {}
    while len(pairs) < sum(SIZES.values()):
        english, german = draw_pair(random)
        pairs[polish(english)] = polish(german)
    drawn = iter(pairs.items())
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        for language, sentences in zip(("en", "de"), zip(*islice(drawn, size), strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(sentences) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="gets train, valid and test .en and .de")
    parser.add_argument("--seed", type=int, default=1)
    write_corpus(**vars(parser.parse_args()))
