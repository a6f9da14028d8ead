"""Word forms of both languages, and the lexicon read into tables."""

import re
from dataclasses import dataclass, field

import lexicon as lex

NOT_SHORT, NE = "n't", "n'"  # the contracted negations
VOWELS = "aeiouhéèêâîôœàûÉ"
ASPIRATED = {"hockey", "haricot", "homard", "hamster", "hérisson", "hibou", "havre", "harpe", "hacker"}
EN_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "tooth": "teeth",
    "wolf": "wolves",
    "leaf": "leaves",
    "shelf": "shelves",
    "calf": "calves",
    "loaf": "loaves",
    "knife": "knives",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mosquito": "mosquitoes",
    "volcano": "volcanoes",
}
SYLLABLES = "ba be bo da de di do fa fe ga go ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se si so ta te ti to va vi za zo".split()


@dataclass(frozen=True)
class Noun:
    en: str
    fr: str
    gender: str  # m or f
    kind: str  # "" countable, "u" uncountable, "p" plural only
    topic: str


@dataclass
class Phrase:
    """A noun phrase in both languages. ``bare`` is the English noun without its determiner."""

    en: str
    fr: str
    gender: str
    plural: bool
    noun: Noun
    bare: str
    bare_fr: str
    colour: str = ""


@dataclass
class Sentence:
    en: str
    fr: str
    polarity: int = 0
    topic: str = ""
    noun: Noun = None
    subject: str = ""  # the person, when there is one
    city: str = ""
    keys: tuple = ()  # words that must not repeat inside a passage
    facts: list = field(default_factory=list)  # (question, French question, answer)


def items(text):
    return [entry.split() for entry in text.replace("\n", " ").split(",") if entry.strip()]


def spaced(word):
    return word.replace("~", " ")


def feminine(m):
    """The feminine of a French adjective, by rule."""
    for end, new in (("eux", "euse"), ("el", "elle"), ("if", "ive"), ("ien", "ienne"), ("er", "ère"), ("e", "e")):
        if m.endswith(end):
            return m[: -len(end)] + new
    return m + "e"


def french_plural(word):
    if "-" in word or " " in word:
        return word
    if word[-1] in "sxz":
        return word
    if word.endswith(("eau", "eu")):
        return word + "x"
    return word[:-2] + "aux" if word.endswith("al") and word not in ("festival", "bal", "récital") else word + "s"


def english_plural(word):
    if word in EN_PLURALS:
        return EN_PLURALS[word]
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if word[-1] == "y" and word[-2] not in "aeiou" else word + "s"


def vowel(fr):
    return fr[0] in VOWELS and fr.split()[0] not in ASPIRATED


def article(en):
    return (
        "an" if en[0] in "aeiou" and not en.startswith(("uni", "use", "eu", "one")) or en in ("hour", "honest") else "a"
    )


def cap(text):
    return text[0].upper() + text[1:]


def elide(fr):
    """que Adam -> qu'Adam."""
    return re.sub(r"\bque (?=[AEIOUÉaeiou])", "qu'", fr)


def load_nouns():
    seen, nouns = set(), []
    for topic, text in lex.NOUNS.items():
        for en, fr, tag in items(text):
            if en not in seen:
                seen.add(en)
                nouns.append(Noun(en, spaced(fr), tag[0], tag[1:], topic))
    return nouns


def load_adjectives(text):
    pairs = []
    for en, fr in items(text):
        m, _, f = fr.partition("/")
        pairs.append((en, m, f or feminine(m)))
    return pairs


def load_verbs(text):
    return [tuple(v) for v in items(text)]


NOUNS = load_nouns()
BY_TOPIC = {t: [n for n in NOUNS if n.topic == t] for t in lex.NOUNS}
TOPICS = [t for t in lex.NOUNS if t != "things"]
COLOURS = load_adjectives(lex.COLOURS)
BEFORE = [tuple(b) if len(b) == 4 else (b[0], b[1], b[1], b[2]) for b in items(lex.BEFORE)]
GOOD, POOR = load_adjectives(lex.POSITIVE), load_adjectives(lex.NEGATIVE)
ADVERBS = [tuple(a) for a in items(lex.ADVERBS)]
VERBS = load_verbs(lex.VERBS)
TOPIC_VERBS = {t: load_verbs(v) for t, v in lex.TOPIC_VERBS.items()}
CITIES = [tuple(c.split("=")) for c in lex.CITIES.split()]
PLACES = [tuple(p) for p in items(lex.PLACES)]
TIMES = [tuple(map(spaced, t.split("="))) for t in lex.TIMES.split()]
PEOPLE = [tuple(map(spaced, p.split("="))) for p in lex.PEOPLE.split()]
PRONOUNS = [
    ("I", "j'ai", "j'ai"),
    ("I", "j'ai", "j'ai"),
    ("we", "nous", "nous avons"),
    ("she", "elle", "elle a"),
    ("he", "il", "il a"),
    ("they", "ils", "ils ont"),
]
BEING = [
    ("I am", "I was", "Je suis", "J'étais", False),
    ("I am", "I was", "Je suis", "J'étais", False),
    ("We are", "We were", "Nous sommes", "Nous étions", True),
    ("You are", "You were", "Vous êtes", "Vous étiez", True),
    ("He is", "He was", "Il est", "Il était", False),
    ("They are", "They were", "Ils sont", "Ils étaient", True),
]
STAYS = [
    ("lives", "habite", "Where does {} live?", "Où est-ce que {} habite ?"),
    ("works", "travaille", "Where does {} work?", "Où est-ce que {} travaille ?"),
    ("is", "est", "Where is {}?", "Où est {} ?"),
    ("lived", "a habité", "Where did {} live?", "Où est-ce que {} a habité ?"),
]
DETERMINERS = {  # English, French masculine, feminine, plural
    "the": ("the", "le", "la", "les"),
    "my": ("my", "mon", "ma", "mes"),
    "our": ("our", "notre", "notre", "nos"),
    "this": ("this", "ce", "cette", "ces"),
    "a": ("a", "un", "une", "des"),
    "his": ("his", "son", "sa", "ses"),
    "her": ("her", "son", "sa", "ses"),
    "your": ("your", "votre", "votre", "vos"),
}


def agree(adjective, gender, plural):
    _, m, f = adjective
    if gender == "f":
        return f if not plural else french_plural(f)
    return m if not plural else french_plural(m)


FEMALE = {"sœur", "mère", "fille", "femme", "tante", "reine", "infirmière"}
