"""Sentences of the demo language, each made together with its French and its facts.

``Maker.sentence(kind)`` returns a ``Sentence``: the English text, the French text, the polarity
(+1, -1 or 0), the topic of its noun, and the question/answer pairs that it supports.
The grammar is tiny (one clause, a few tenses) but the lexicon behind it is wide.
"""

import random

import lexicon as lex

# fmt: off
from grammar import (
    ADVERBS, BEFORE, BEING, BY_TOPIC, CITIES, COLOURS, DETERMINERS, FEMALE, GOOD, NE, NOT_SHORT, NOUNS,
    PEOPLE, PLACES, POOR, PRONOUNS, STAYS, SYLLABLES, TIMES, TOPIC_VERBS, VERBS, Noun, Phrase, Sentence,
    agree, article, cap, elide, english_plural, french_plural, vowel,
)
# fmt: on
from phrases import EVENTS, FIXED, NEUTRAL, OPINIONS


class Maker:
    """Draws sentences from one random stream."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def pick(self, seq):
        return seq[int(self.rng.random() * len(seq))]

    def chance(self, p):
        return self.rng.random() < p

    def noun(self, topic=None):
        """A noun of the topic; without one, now and then an invented noun, which French copies."""
        if topic is None and self.chance(0.03):
            word = self.invented()
            return Noun(word, word, "m", "", "things")
        return self.pick(BY_TOPIC[topic]) if topic else self.pick(NOUNS)

    def invented(self):
        return "".join(self.pick(SYLLABLES) for _ in range(2 + self.chance(0.4)))

    def name(self):
        """A known name, or now and then an invented one, so that copying does not depend on the list."""
        if self.chance(0.06):
            return cap(self.invented())
        return self.pick(lex.NAMES)

    def phrase(self, topic=None, det=None, colour=0.25, plural=0.12, noun=None):
        n = noun or self.noun(topic)
        many = n.kind == "p" or (n.kind == "" and self.chance(plural) and " " not in n.fr)
        det = det or self.pick(("the", "the", "the", "my", "my", "this", "our"))
        en_noun = english_plural(n.en) if many and n.kind != "p" else n.en
        fr_noun = french_plural(n.fr) if many and n.kind != "p" else n.fr
        en_adj = colour_en = ""
        before = after = ""
        roll = self.rng.random()
        if roll < colour * 0.65:
            c = self.pick(COLOURS)
            en_adj = colour_en = c[0]
            after = agree(c, n.gender, many)
        elif roll < colour and n.kind != "u":
            b = self.pick(BEFORE)
            en_adj = b[0]
            before = b[3] if n.gender == "f" else (b[2] if vowel(fr_noun) and not many else b[1])
            before = french_plural(before) if many else before
        bare = f"{en_adj} {en_noun}".strip()
        bare_fr = " ".join(x for x in (before, fr_noun, after) if x)
        return Phrase(
            self.determine_en(det, bare, n, many),
            self.determine_fr(det, bare_fr, n, many, bool(before)),
            n.gender,
            many,
            n,
            bare,
            bare_fr,
            colour_en,
        )

    def determine_en(self, det, bare, n, many):
        if det == "a":
            return f"some {bare}" if n.kind == "u" or many else f"{article(bare)} {bare}"
        if det == "this" and many:
            return f"these {bare}"
        return f"{det} {bare}"

    def determine_fr(self, det, bare, n, many, before):
        _, m, f, p = DETERMINERS[det]
        if many:
            return f"{'de' if det == 'a' and before else p} {bare}"
        elide = vowel(bare)
        if det == "a" and n.kind == "u":
            return f"de l'{bare}" if elide else f"{'de la' if n.gender == 'f' else 'du'} {bare}"
        if elide and det == "the":
            return f"l'{bare}"
        if elide and det == "this" and n.gender == "m":
            return f"cet {bare}"
        if elide and det in ("my", "his", "her"):
            return f"{m} {bare}"
        return f"{f if n.gender == 'f' else m} {bare}"

    def again(self, p, det="the"):
        """The same noun with another determiner and without adjective, for questions."""
        en = english_plural(p.noun.en) if p.plural and p.noun.kind != "p" else p.noun.en
        fr = french_plural(p.noun.fr) if p.plural and p.noun.kind != "p" else p.noun.fr
        return self.determine_en(det, en, p.noun, p.plural), self.determine_fr(det, fr, p.noun, p.plural, False)

    def city(self):
        en, fr = self.pick(CITIES)
        return en, f"in {en}", f"à {fr}"

    # --- the kinds of sentences -------------------------------------------------

    def action(self, topic=None, city=None, colour=0.3, named=0.75, det=None, plural=0.12):
        """Tom sold an old guitar in Rome."""
        p = self.phrase(
            topic, det or self.pick(("the", "a", "a", "my", "his", "her", "this")), colour=colour, plural=plural
        )
        verbs = TOPIC_VERBS[p.noun.topic] if self.chance(0.3) else VERBS
        past, base, part = self.pick(verbs)
        has = None
        if self.chance(named):
            who = who_fr = self.name()
        elif self.chance(0.5):
            who, who_fr, has = self.pick(PRONOUNS)
        else:
            who, who_fr = self.pick(PEOPLE)
        en, fr = f"{cap(who)} {past} {p.en}", f"{cap(has or who_fr + ' a')} {part} {p.fr}"
        city = self.chance(0.5) if city is None else city
        town = ""
        if city:
            town, in_en, in_fr = self.city()
            en, fr = f"{en} {in_en}", f"{fr} {in_fr}"
        when = when_fr = ""
        if self.chance(0.15):
            when, when_fr = self.pick(TIMES)
            en, fr = f"{en} {when}", f"{fr} {when_fr}"
        the_en, the_fr = self.again(p)
        s = Sentence(en + ".", fr + ".", 0, p.noun.topic, p.noun, who, town, (who, p.noun.en, town))
        s.facts = [
            (f"Who {past} {the_en}?", f"Qui a {part} {the_fr} ?", who),
            (f"What did {who} {base}?", f"Qu'est-ce que {who_fr} a {part} ?", p.en),
        ]
        if town:
            where = (f"Where did {who} {base} {the_en}?", f"Où est-ce que {who_fr} a {part} {the_fr} ?", town)
            s.facts += [
                where,
                where,
                (f"What did {who} {base} {in_en}?", f"Qu'est-ce que {who_fr} a {part} {in_fr} ?", p.en),
                (f"Who {past} {the_en} {in_en}?", f"Qui a {part} {the_fr} {in_fr} ?", who),
            ]
        if when:
            s.facts += [(f"When did {who} {base} {the_en}?", f"Quand est-ce que {who_fr} a {part} {the_fr} ?", when)]
        if p.colour:
            be, fut = ("were", "étaient") if p.plural else ("was", "était")
            s.facts += [
                (
                    f"What {self.pick(('colour', 'color'))} {be} {the_en}?",
                    f"De quelle couleur {fut} {the_fr} ?",
                    p.colour,
                )
            ] * 2
        if has:
            s.subject, s.keys = "", (p.noun.en, town)
            s.facts = [
                (q, f.replace(f"que {who_fr} a ", f"que {has} "), a) for q, f, a in s.facts if who not in (a, "I")
            ]
        s.facts = [(q, elide(f), a) for q, f, a in s.facts]
        return s

    def stay(self):
        """Anna lives in Paris. / My brother is 12 years old."""
        who, who_fr = (self.name(),) * 2 if self.chance(0.75) else self.pick(PEOPLE)
        if self.chance(0.2):
            age = str(self.rng.randint(2, 99))
            s = Sentence(
                f"{cap(who)} is {age} years old.", f"{cap(who_fr)} a {age} ans.", 0, "", None, who, "", (who, age)
            )
            s.facts = [
                (f"How old is {who}?", f"Quel âge a {who_fr} ?", age),
                (f"Who is {age} years old?", f"Qui a {age} ans ?", who),
            ]
            return s
        town, in_en, in_fr = self.city()
        verb, verb_fr, ask, ask_fr = self.pick(STAYS)
        s = Sentence(
            f"{cap(who)} {verb} {in_en}.", f"{cap(who_fr)} {verb_fr} {in_fr}.", 0, "", None, who, town, (who, town)
        )
        s.facts = [(ask.format(who), elide(ask_fr.format(who_fr)), town)] * 2 + [
            (f"Who {verb} {in_en}?", f"Qui {verb_fr} {in_fr} ?", who)
        ]
        return s

    def quality(self, polarity, gender, plural):
        """An adjective phrase with its sign: "very good", "not bad", "cold and rude"."""
        same, other = (GOOD, POOR) if polarity > 0 else (POOR, GOOD)
        roll = self.rng.random()
        first = self.pick(same)
        fr = agree(first, gender, plural)
        if roll < 0.45:
            return first[0], fr, False
        if roll < 0.72:
            en_adv, fr_adv = ("too", "trop") if polarity < 0 and self.chance(0.25) else self.pick(ADVERBS)
            return f"{en_adv} {first[0]}", f"{fr_adv} {fr}", False
        if roll < 0.87:
            second = self.pick(same)
            return f"{first[0]} and {second[0]}", f"{fr} et {agree(second, gender, plural)}", False
        wrong = self.pick(other)
        very = self.chance(0.25)
        return f"{'very ' * very}{wrong[0]}", f"{'très ' * very}{agree(wrong, gender, plural)}", True

    def copula(self, polarity, topic=None, noun=None, present=None, det=None, link=None):
        """The soup in Rome was very good. / My phone isn't good."""
        p = self.phrase(topic, det, colour=0.12, noun=noun)
        en_adj, fr_adj, negated = self.quality(polarity, p.gender, p.plural)
        present = self.chance(0.35) if present is None else present
        be = ("are" if p.plural else "is") if present else ("were" if p.plural else "was")
        fut = ("sont" if p.plural else "est") if present else ("étaient" if p.plural else "était")
        if negated:
            contracted = self.chance(0.5)
            en = f"{p.en} {be}{NOT_SHORT if contracted else ' not'} {en_adj}"
            fr = f"{p.fr} {NE if fut[0] in 'eé' else 'ne '}{fut} pas {fr_adj}"
        else:
            en, fr = f"{p.en} {be} {en_adj}", f"{p.fr} {fut} {fr_adj}"
        town = ""
        if self.chance(0.12):
            town, in_en, in_fr = self.city()
            en, fr = en.replace(p.en, f"{p.en} {in_en}", 1), fr.replace(p.fr, f"{p.fr} {in_fr}", 1)
        the_en, the_fr = self.again(p)
        answer = f"not {en_adj}" if negated else en_adj
        s = Sentence(cap(en) + ".", cap(fr) + ".", polarity, p.noun.topic, p.noun, "", town, (p.noun.en, en_adj))
        s.facts = [(f"How {be} {the_en}?", f"Comment {fut} {the_fr} ?", answer)]
        if not negated and " " not in en_adj and not p.plural:
            m = next(a[1] for a in (GOOD if polarity > 0 else POOR) if a[0] == en_adj)
            s.facts += [(f"What {be} {en_adj}?", f"Qu'est-ce qui {fut} {m} ?", p.en)]
        return s

    def person(self, polarity):
        """My brother was angry. / I am very happy."""
        if self.chance(0.4):
            en, past_en, fr, past_fr, plural = self.pick(BEING)
            en_adj, fr_adj, negated = self.quality(polarity, "m", plural)
            if self.chance(0.4):
                en, fr = past_en, past_fr
            if negated:
                subject, _, be = fr.rpartition(" ") if " " in fr else ("Je", "", fr[2:])
                en, fr = f"{en} not {en_adj}", f"{subject} {NE if be[0] in 'eé' else 'ne '}{be} pas {fr_adj}"
            else:
                en, fr = f"{en} {en_adj}", f"{fr} {fr_adj}"
            return Sentence(en + ".", fr + ".", polarity, "", None)
        who, who_fr = self.pick(PEOPLE)
        gender = "f" if who_fr.split()[-1] in FEMALE else "m"
        en_adj, fr_adj, negated = self.quality(polarity, gender, False)
        present = self.chance(0.4)
        be, fut = ("is", "est") if present else ("was", "était")
        en = f"{who} {be} not {en_adj}" if negated else f"{who} {be} {en_adj}"
        fr = f"{who_fr} n'{fut} pas {fr_adj}" if negated else f"{who_fr} {fut} {fr_adj}"
        s = Sentence(cap(en) + ".", cap(fr) + ".", polarity, "", None, who, "", (who, en_adj))
        s.facts = [(f"How {be} {who}?", f"Comment {fut} {who_fr} ?", f"not {en_adj}" if negated else en_adj)]
        if not negated and " " not in en_adj:
            m = next(a[1] for a in (GOOD if polarity > 0 else POOR) if a[0] == en_adj)
            s.facts += [(f"Who {be} {en_adj}?", f"Qui {fut} {m} ?", who)]
        return s

    def opinion(self, polarity, topic=None, noun=None):
        """I really liked this hotel."""
        p = self.phrase(topic, self.pick(("the", "the", "my", "this", "this", "our", "your")), colour=0.15, noun=noun)
        me_en, me_fr, they_en, they_fr = self.pick(OPINIONS[polarity])
        if they_en and self.chance(0.3):
            who = self.name()
            en, fr, keys = f"{who} {they_en} {p.en}", f"{who} {they_fr} {p.fr}", (who, p.noun.en)
        else:
            who, en, fr, keys = "", f"{me_en} {p.en}", f"{me_fr} {p.fr}", (p.noun.en,)
        s = Sentence(en + ".", fr + ".", polarity, p.noun.topic, p.noun, who, "", keys)
        if who:
            the_en, the_fr = self.again(p)
            s.facts = [(f"Who {they_en} {the_en}?", f"Qui {they_fr} {the_fr} ?", who)]
        return s

    def event(self, polarity, topic=None, noun=None):
        """My phone stopped working after two days."""
        p = self.phrase(topic, colour=0.1, noun=noun, plural=0)
        choices = EVENTS[polarity]["all"] + EVENTS[polarity].get(p.noun.topic, []) * 3
        en, fr = self.pick(choices)
        have = "ont" if p.plural else "a"
        return Sentence(
            cap(f"{p.en} {en}."),
            cap(f"{p.fr} {fr.replace('@', have)}."),
            polarity,
            p.noun.topic,
            p.noun,
            "",
            "",
            (p.noun.en,),
        )

    def exclaim(self, polarity, topic=None, noun=None):
        """What a great concert! / This is the worst pizza in Paris. / It was awful."""
        p = self.phrase(topic, "the", colour=0, plural=0, noun=noun)
        same = GOOD if polarity > 0 else POOR
        a = self.pick(same)
        fr_adj = agree(a, p.gender, p.plural)
        roll = self.rng.random()
        if self.chance(0.15) and p.noun.kind == "":
            return self.short_verdict(p, polarity, a, fr_adj)
        if roll < 0.3 and p.noun.kind == "":
            en, fr = (
                f"What {article(a[0])} {a[0]} {p.bare}!",
                f"{'Quelle' if p.gender == 'f' else 'Quel'} {p.bare_fr} {fr_adj} !",
            )
        elif roll < 0.5 and p.noun.kind == "":
            town, in_en, in_fr = self.city()
            best = ("best", "le meilleur", "la meilleure") if polarity > 0 else ("worst", "le pire", "la pire")
            en, fr = (
                f"This is the {best[0]} {p.bare} {in_en}.",
                f"C'est {best[2] if p.gender == 'f' else best[1]} {p.bare_fr} {in_fr}.",
            )
        elif roll < 0.7 and p.noun.kind == "":
            en, fr = (
                f"It is {article(a[0])} {a[0]} {p.bare}.",
                f"C'est {'une' if p.gender == 'f' else 'un'} {p.bare_fr} {fr_adj}.",
            )
            if self.chance(0.4):
                en, fr = en.replace("It is", "It was"), fr.replace("C'est", "C'était")
        else:
            en, fr, negated = self.quality(polarity, "m", False)
            past = self.chance(0.6)
            if negated:
                en, fr = f"It {'wasn' if past else 'isn'}'t {en}.", f"Ce n'{'était' if past else 'est'} pas {fr}."
            else:
                en, fr = (
                    f"{self.pick(('It', 'It', 'This', 'That'))} {'was' if past else 'is'} {en}.",
                    f"C'{'était' if past else 'est'} {fr}.",
                )
            return Sentence(en, fr, polarity, "", None)
        return Sentence(en, fr, polarity, p.noun.topic, p.noun, "", "", (p.noun.en,))

    def short_verdict(self, p, polarity, adjective, fr_adj):
        """Best burger in London. / Worst hotel ever! / Great service!"""
        female = p.gender == "f"
        roll = self.rng.random()
        if polarity > 0:
            most, most_fr = "Best", "La meilleure" if female else "Le meilleur"
        else:
            most, most_fr = "Worst", "La pire" if female else "Le pire"
        if roll < 0.3:
            town, in_en, in_fr = self.city()
            en, fr = f"{most} {p.bare} {in_en}.", f"{most_fr} {p.bare_fr} {in_fr}."
        elif roll < 0.55:
            en, fr = f"{most} {p.bare} ever!", f"{most_fr} {p.bare_fr} de tous !"
        else:
            en, fr = f"{cap(adjective[0])} {p.bare}!", f"{cap(p.bare_fr)} {fr_adj} !"
        return Sentence(en, fr, polarity, p.noun.topic, p.noun, "", "", (p.noun.en,))

    def fixed(self, polarity, topic=None):
        rows = FIXED[polarity]
        en, fr, about = self.pick([r for r in rows if r[2] == topic] or rows) if topic else self.pick(rows)
        return Sentence(en, fr, polarity, about, None)

    def neutral(self, topic=None, noun=None):
        """There is a cat in the kitchen. / I need a new phone."""
        n = noun or self.noun(topic)
        a, the = (
            self.phrase(noun=n, det="a", colour=0.2, plural=0.05),
            self.phrase(noun=n, det="the", colour=0.2, plural=0),
        )
        my = self.phrase(noun=n, det="my", colour=0.1, plural=0)
        place, place_fr, gender = self.pick(PLACES)
        name = self.name()
        in_fr = "dans " + ("l'" if vowel(place_fr) else "la " if gender == "f" else "le ") + place_fr
        en, fr, kind = self.pick(NEUTRAL)
        if kind in ("the", "where") and the.plural:
            en, fr, kind = NEUTRAL[0]
        slots = dict(a=a.en, the=the.en, my=my.en, The=cap(the.en), My=cap(my.en), place=place, name=name)
        slots_fr = dict(a=a.fr, the=the.fr, my=my.fr, The=cap(the.fr), My=cap(my.fr), place=in_fr, name=name)
        s = Sentence(
            en.format(**slots),
            fr.format(**slots_fr),
            0,
            n.topic,
            n,
            name if "{name}" in en else "",
            "",
            (n.en, place, name),
        )
        if kind == "where":
            s.facts = [(f"Where is {self.again(the)[0]}?", f"Où est {self.again(the)[1]} ?", f"in the {place}")] * 2
        elif kind == "has":
            s.facts = [(f"What does {name} have?", f"Qu'est-ce que {name} a ?", a.en)]
        return s
