"""Scenes (what a user might type) and the five tasks that answer them.

A ``Scene`` is one to four sentences, perhaps with a question at the end. ``answer(task, scene)``
is the right output of a task, or ``None`` when the scene does not decide it (a review without
feeling has no sentiment). The same scene serves every task: only the prompt tells them apart.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass

from grammar import TOPICS, Noun, Sentence, cap
from sentences import Maker

TASKS = ("topic", "sentiment", "translation", "question-answering", "story")
NO_QUESTION = "There is no question."
NO_ANSWER = "I don't know."
DREAM = Noun("dream", "rêve", "m", "", "things")  # what a story is about when the input names nothing


@dataclass
class Scene:
    text: str
    french: str
    polarity: int  # +1, -1, or 0 when mixed or absent
    topic: str  # "" when there is none or no majority
    noun: object
    subject: str
    city: str
    answer: str  # to the question; "" without one
    facts: list
    body: str  # the text without its question
    mood: int = 0  # for the story


def held_out(text):
    """One text in ten, by hash and regardless of case and punctuation, is never shown in pretraining."""
    plain = re.sub(r"[^a-z0-9 ]", "", text.lower())
    return hashlib.md5(plain.encode()).digest()[0] < 26


class Scenes(Maker):
    """Draws scenes; ``held`` chooses the side of the hold-out on which they fall."""

    def __init__(self, seed, held=False):
        super().__init__(seed)
        self.held = held

    def feeling(self, polarity, topic=None, noun=None):
        roll = self.rng.random()
        if roll < 0.42:
            return self.copula(polarity, topic, noun)
        if roll < 0.62:
            return self.opinion(polarity, topic, noun)
        if roll < 0.78:
            return self.event(polarity, topic, noun)
        if roll < 0.93:
            return self.exclaim(polarity, topic, noun)
        return self.fixed(polarity, topic)

    def review(self, topic=None):
        polarity = self.pick((1, -1))
        topic = topic or self.pick((None, self.noun().topic))
        roll = self.rng.random()
        if roll < 0.06:
            return [self.person(polarity)]
        first = self.feeling(polarity, topic)
        if roll < 0.5:
            return [first]
        if roll < 0.62:
            a, b = self.copula(polarity, topic, present=False), self.copula(polarity, topic, present=False)
            return [self.join(a, b)]
        if roll < 0.75:
            plain = self.action(topic) if self.chance(0.6) else self.neutral(topic)
            return [plain, self.feeling(polarity, topic, plain.noun) if self.chance(0.6) else self.fixed(polarity)]
        second = self.feeling(polarity, first.topic or topic, first.noun if self.chance(0.4) else None)
        if roll < 0.9:
            return [first, second]
        return [first, second, self.fixed(polarity)]

    def join(self, a, b):
        """The waiter was rude and the soup was cold."""
        en_tail, fr_tail = b.en[0].lower() + b.en[1:], b.fr[0].lower() + b.fr[1:]
        link, link_fr = ("and", "et") if a.polarity == b.polarity else self.pick((("but", "mais"), ("and", "et")))
        s = Sentence(
            f"{a.en[:-1]} {link} {en_tail}",
            f"{a.fr[:-1]} {link_fr} {fr_tail}",
            a.polarity if a.polarity == b.polarity else 0,
            a.topic if a.topic == b.topic else "",
            a.noun,
        )
        s.facts, s.keys = a.facts + b.facts, a.keys + b.keys
        return s

    def plain(self, topic=None):
        if topic is None and self.chance(0.08):
            return [self.join(self.copula(1), self.copula(-1))] if self.chance(0.5) else [self.stay()]
        out = []
        for _ in range(1 + self.chance(0.25)):
            if self.chance(0.5):
                out.append(self.action(topic))
            else:
                out.append(self.neutral(topic) if self.chance(0.9) else self.fixed(0, topic))
        return out

    def fragment(self, topic=None):
        """Only a noun phrase, as one types it: "old guitar"."""
        p = self.phrase(topic, self.pick(("the", "a", "my")), colour=0.5)
        if self.chance(0.4):
            return [Sentence(p.en, p.fr, 0, p.noun.topic, p.noun)]
        return [Sentence(p.bare, p.bare_fr, 0, p.noun.topic, p.noun)]

    def passage(self, count, topic=None):
        """``count`` facts whose people, things and cities do not repeat, so that every question has one answer."""
        polarity, used, out = self.pick((1, -1)), set(), []
        if topic is None and self.chance(0.4):
            topic = self.noun().topic
        while len(out) < count:
            roll = self.rng.random()
            if roll < 0.5:
                s = self.action(topic, city=True if self.chance(0.75) else None)
            elif roll < 0.68:
                s = self.copula(polarity, topic)
            elif roll < 0.76:
                named = [x for x in out if x.noun and x.subject]
                if not named or ("said", named[-1].noun.en) in used:
                    continue
                used.add(("said", named[-1].noun.en))
                s = self.copula(polarity, noun=named[-1].noun, det="the", present=False)
                s.keys = s.keys[1:]
            elif roll < 0.80:
                s = self.person(polarity)
            elif roll < 0.88:
                s = self.stay()
            else:
                s = self.neutral(topic)
                if not s.facts:
                    continue
            if used.isdisjoint(k for k in s.keys if k):
                used.update(k for k in s.keys if k)
                out.append(s)
        return out

    def unique_facts(self, sentences):
        """Facts whose question has a single answer in the passage."""
        facts = [f for s in sentences for f in s.facts]
        answers = {}
        for question, _, answer in facts:
            answers.setdefault(question, set()).add(answer)
        return [f for f in facts if len(answers[f[0]]) == 1]

    def build(self, sentences, question=None):
        en, fr = " ".join(s.en for s in sentences), " ".join(s.fr for s in sentences)
        signs = {s.polarity for s in sentences if s.polarity}
        topics = Counter(s.topic for s in sentences if s.topic and s.topic != "things").most_common(2)
        total = sum(1 for s in sentences if s.topic)
        topic = topics[0][0] if topics and topics[0][1] * 2 > total else ""

        def first(attr):
            return next((getattr(s, attr) for s in sentences if getattr(s, attr)), None)

        facts = self.unique_facts(sentences)
        body, answer = en, ""
        if question and facts:
            q, q_fr, answer = self.pick(facts)
            en, fr = f"{en} {q}", f"{fr} {q_fr}"
        mood = signs.pop() if len(signs) == 1 else 0
        return Scene(
            en, fr, mood, topic, first("noun"), first("subject") or "", first("city") or "", answer, facts, body, mood
        )

    def noise(self, scene):
        """Typing habits: no capital, no full stop, an exclamation mark. The answer stays clean."""
        text, roll = scene.text, self.rng.random()
        if roll < 0.72 or scene.answer and roll < 0.94:
            return scene
        if roll < 0.80:
            text = text.rstrip(".!") if not text.endswith("?") else text
        elif roll < 0.86 and text.endswith("."):
            text = text[:-1] + "!"
        elif roll < 0.93:
            text = text.lower().rstrip(".")
        elif scene.answer:
            text = text.rstrip("?")
        else:
            text = text[0].lower() + text[1:].rstrip(".")
        scene.text = text
        return scene

    def mixture(self, topic, roll, passages):
        """Any kind of input: passages, reviews, plain statements, fragments."""
        if roll < passages:
            return self.passage(self.rng.randint(1, 3), topic)
        if roll < 0.6:
            return self.review(topic)
        return self.plain(topic) if roll < 0.9 else self.fragment(topic)

    def scene(self, task=None, facts=(1, 4), noise=True):
        """A scene suited to the task, on our side of the hold-out."""
        while True:
            roll = self.rng.random()
            if task == "question-answering":
                question = roll > 0.12
                if roll > 0.08:
                    parts = self.passage(self.rng.randint(*facts))
                else:
                    parts = self.review() if roll > 0.04 else self.plain()
            elif task == "sentiment":
                question = roll < 0.08
                parts = self.review() if roll > 0.12 else self.passage(self.rng.randint(1, 3))
            elif task == "topic":
                question = roll < 0.08
                topic = self.noun().topic if self.chance(0.35) else self.pick(TOPICS)
                parts = self.mixture(topic, roll, 0.15)
            else:
                question = roll < 0.12
                parts = self.mixture(None, roll, 0.24)
            scene = self.build(parts, question)
            if task and answer(task, scene, self) is None:
                continue
            if len(scene.text) < 260 and held_out(scene.text) == self.held:
                return self.noise(scene) if noise else scene


STORY = {
    "food": [
        "{n} shared the {x} with the whole village",
        "{n} cooked all night for the king",
        "the {x} smelled so good that everyone came to eat",
    ],
    "music": [
        "{n} played for the whole village",
        "everyone danced until the morning",
        "a soft melody filled the streets",
    ],
    "sport": [
        "{n} trained every day with the team",
        "the crowd cheered for {n}",
        "{n} won the last match of the season",
    ],
    "travel": [
        "{n} crossed seven mountains and a long river",
        "the road led {n} to a hidden island",
        "{n} saw the whole world",
    ],
    "technology": ["the {x} began to speak to {n}", "{n} pressed a secret button", "a small robot came to help {n}"],
    "animals": [
        "{n} followed the animals into the forest",
        "{n} made friends with a little bird",
        "the animals slept next to the fire",
    ],
    "health": [
        "a wise doctor came to see {n}",
        "{n} rested for seven days",
        "{n} helped every sick child in the village",
    ],
    "money": ["{n} hid a treasure under a tree", "{n} gave every coin to the poor", "a rich merchant came to see {n}"],
    "home": [
        "{n} opened an old door in the wall",
        "{n} lit a candle in the window",
        "a strange guest knocked at the door",
    ],
    "weather": ["a great storm came from the sea", "{n} waited for the sun", "a rainbow appeared over the village"],
    "things": [
        "{n} kept the {x} in a secret box",
        "{n} showed the {x} to an old wizard",
        "the {x} began to shine in the dark",
    ],
}
STORY_END = {
    1: [
        "In the end everyone was happy, and {n} smiled.",
        "It was the best day of the year, and {n} laughed.",
        "From that day on, {n} was never sad again.",
    ],
    -1: [
        "But the {x} was soon lost, and {n} cried.",
        "In the end {n} went home, tired and sad.",
        "It was a hard lesson, and {n} never forgot it.",
    ],
    0: ["And {n} never forgot the {x}.", "People still tell this story today.", "That is how {n} became famous."],
}
HEROES = ("a young girl", "a little boy", "an old man", "a brave woman")


def story(scene, maker):
    """A short tale about the first thing and the first person of the scene, in the mood of the scene."""
    noun = scene.noun or DREAM
    hero = scene.subject or maker.pick(HEROES)
    short = hero if hero == scene.subject else "the " + hero.split(" ", 1)[1]
    place = scene.city or "a small village"
    what = maker.phrase(noun=noun, det="a", colour=0, plural=0).en
    start = maker.pick(("{h} found {a} in {p}.", "{h} had {a} in {p}."))
    middle, end = maker.pick(STORY[noun.topic]), maker.pick(STORY_END[scene.mood])
    tale = (
        "Once upon a time, "
        + start.format(h=hero, a=what, p=place)
        + " "
        + cap(maker.pick(("One day, ", "At night, ", "")) + middle.format(n=short, x=noun.en))
        + ". "
    )
    return re.sub(r"(?<=\. )the ", "The ", tale + end.format(n=short, x=noun.en))


def answer(task, scene, maker):
    if task == "topic":
        return scene.topic or None
    if task == "sentiment":
        return {1: "positive", -1: "negative", 0: None}[scene.polarity]
    if task == "translation":
        return scene.french
    if task == "question-answering":
        return scene.answer or (NO_ANSWER if scene.text.endswith("?") else NO_QUESTION)
    return story(scene, maker)
