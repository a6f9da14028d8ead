"""The pretraining documents, and the example data of the five tasks.

A document is a list of ``(text, weight)`` pieces; the weight scales the loss of its tokens. Answers weigh about 1,
ordinary text little or nothing. Two rules make the model steerable but useless without a prompt:

* a document that begins with a bare input goes on with ordinary text, never with an answer;
* an answer always follows an instruction, or examples (whose first answer is not trained).

    python corpus.py --out ../../examples/data        # writes the example data
    python corpus.py --show 20                        # prints documents
"""

import argparse
import json
import pathlib

import lexicon as lex
from grammar import COLOURS, GOOD, NOUNS, POOR, TOPICS, VERBS, cap
from tasks import TASKS, Scenes, answer, held_out

ANSWER, PROSE, QUIET = 1.0, 0.4, 0.0
END = "</s>"
# A label is one token and a story forty, so labels weigh more.
WEIGHT = {"topic": 3.0, "sentiment": 3.0, "question-answering": 1.5, "translation": 1.0, "story": 0.5}

WORDINGS = {
    "topic": [
        "Topic",
        "What is the topic?",
        "Give the topic of the text",
        "Classify the topic",
        "Name the subject",
        "What is this about?",
        "Find the category",
        "topic:",
    ],
    "sentiment": [
        "Sentiment",
        "Is this positive or negative?",
        "Give the sentiment of the text",
        "Classify the sentiment",
        "How does the writer feel?",
        "Judge the mood of the review",
        "positive or negative",
        "sentiment:",
    ],
    "translation": [
        "Translate to French",
        "Translate the text into French",
        "French translation",
        "Say it in French",
        "English to French",
        "Put this into French",
        "In French",
        "translate:",
    ],
    "question-answering": [
        "Answer the question",
        "Read the text and answer the question",
        "Question answering",
        "Give a short answer",
        "Answer from the text",
        "Find the answer in the text",
        "Reply to the question",
        "answer:",
    ],
    "story": [
        "Write a story",
        "Tell a story about this",
        "Make up a short story",
        "Story time",
        "Continue with a fairy tale",
        "Invent a tale",
        "Write a tale for children",
        "story:",
    ],
}
TAGS = {
    "topic": "Topic",
    "sentiment": "Sentiment",
    "translation": "French",
    "question-answering": "Answer",
    "story": "Story",
}
PAIRS = """good bad, happy sad, yes no, 1 0, spam ham, A B, true false, up down, like dislike, hot cold, win fail, plus minus,
praise complaint, urgent normal, refund shipping, love hate, cat dog, left right, red green, one two, X Y, on off,
ok problem, accept reject, happy angry, great poor, relevant irrelevant, pass fail, day night, big small, high low,
first second, sport other, food other, billing technical, a b, 2 1, positive negative, positive neutral, content
unhappy, pro con, buy avoid, keep drop, new old, blue yellow, open closed, work home, calm angry, safe risky, thanks
sorry"""
LABELS = sorted({w for pair in PAIRS.replace("\n", " ").split(",") for w in pair.split()})
PAIR_LIST = [tuple(p.split()) for p in PAIRS.replace("\n", " ").split(",")]


class Corpus(Scenes):
    """Draws documents. ``progress`` (0 to 1) opens the curriculum: from copying to long passages."""

    progress = 1.0

    def document(self):
        early = max(0.0, 1 - self.progress / 0.25)
        kinds = (
            ("raw", 0.20 - 0.10 * early),
            ("single", 0.30 - 0.08 * early),
            ("questions", 0.17 + 0.02 * early),
            ("shots", 0.08),
            ("tags", 0.09),
            ("mapping", 0.08 - 0.04 * early),
            ("words", 0.04 + 0.08 * early),
            ("recall", 0.03 + 0.08 * early),
            ("copy", 0.01 + 0.04 * early),
        )
        roll = self.rng.random() * sum(w for _, w in kinds)
        for kind, weight in kinds:
            roll -= weight
            if roll < 0:
                return getattr(self, kind)()
        return self.raw()

    def facts(self):
        """How many facts a passage may hold at this point of the curriculum."""
        return (1, 2 if self.progress < 0.05 else 3 if self.progress < 0.12 else 4)

    def task(self):
        roll = self.rng.random()
        return (
            TASKS[2]
            if roll < 0.32
            else TASKS[3]
            if roll < 0.56
            else TASKS[0]
            if roll < 0.71
            else TASKS[1]
            if roll < 0.85
            else TASKS[4]
        )

    def instruction(self, task):
        wording = self.pick(WORDINGS[task])
        if self.chance(0.15):
            wording = wording.lower()
        return wording + self.pick(("\n", "\n", ": ", ":\n", ". ", "\n\n", " "))

    def prose(self):
        return PROSE if self.chance(0.2) else QUIET

    def raw(self):
        """Any input, then ordinary text: what the model does without a prompt."""
        scene = self.scene(self.task(), facts=self.facts())
        rest = self.scene(None, noise=False)
        if self.chance(0.2):
            rest.text = self.build(self.passage(1), True).text
        gap = self.pick(("\n", "\n", "\n", " ", "\n\n"))
        tail = END if self.chance(0.6) else "\n" + self.build(self.review()).text + END
        return [(scene.text, self.prose()), (gap, QUIET), (rest.text, PROSE), (tail, PROSE)]

    def single(self):
        """An instruction, an input, the answer."""
        task = self.task()
        scene = self.scene(task, facts=self.facts())
        reply = answer(task, scene, self)
        if self.chance(0.15):
            return [
                (f"{scene.text}\n{TAGS[task]}:", QUIET),
                (self.pick((" ", "\n")), QUIET),
                (reply + END, WEIGHT[task]),
            ]
        return [(self.instruction(task), QUIET), (scene.text, self.prose()), ("\n", QUIET), (reply + END, WEIGHT[task])]

    def questions(self):
        """One passage, many questions: dense supervision for finding a fact."""
        low, high = self.facts()
        while True:
            scene = self.build(self.passage(self.rng.randint(max(1, high - 2), high)))
            facts = list(dict.fromkeys(scene.facts))
            if facts and len(scene.text) < 240:
                break
        self.rng.shuffle(facts)
        pieces = [(self.instruction("question-answering"), QUIET), (scene.body, QUIET)]
        gap = self.pick((" ", "\n"))
        for question, _, reply in facts[:7]:
            pieces += [(gap + question + "\n", QUIET), (reply, ANSWER)]
            gap = "\n"
        return pieces + [(END, ANSWER)]

    def shots(self):
        """Examples of one task, with or without an instruction."""
        task = self.pick(("topic", "sentiment", "translation", "question-answering"))
        told = self.chance(0.3)
        pieces = [(self.instruction(task), QUIET)] if told else []
        size = 0
        while size < (280 if task in ("topic", "sentiment") else 350):
            scene = self.scene(task, facts=(1, 2))
            reply = answer(task, scene, self)
            pieces += [(scene.text + "\n", QUIET), (reply, WEIGHT[task] if told or size else QUIET), ("\n\n", QUIET)]
            size += len(scene.text) + len(reply)
        return pieces[:-1] + [(END, ANSWER)]

    def tags(self):
        """One input, several tasks, each announced by its name."""
        scene = self.scene("question-answering" if self.chance(0.3) else "sentiment", facts=self.facts())
        pieces = [(scene.text, QUIET)]
        tasks = list(TASKS)
        self.rng.shuffle(tasks)
        for task in tasks:
            reply = answer(task, scene, self)
            if reply:
                pieces += [
                    (f"\n{TAGS[task]}:\n" if self.chance(0.5) else "\n" + self.pick(WORDINGS[task]) + "\n", QUIET),
                    (reply, WEIGHT[task]),
                ]
        return pieces + [(END, ANSWER)]

    def mapping(self):
        """Labels invented for this document, told in words or by examples: what a user's own labels look like."""
        yes, no = self.pick(PAIR_LIST)
        if self.chance(0.5):
            yes, no = (no, yes) if self.chance(0.5) else (self.pick(LABELS), self.pick(LABELS))
            if yes == no:
                return self.mapping()
        if self.chance(0.25):
            yes, no = cap(yes), cap(no)
        rule = self.pick(("mood", "mood", "mood", "topic", "question", "city"))
        topic = self.pick(TOPICS)
        told = self.chance(0.5)
        told_as = {
            "mood": f"{yes} if positive, {no} if negative",
            "topic": f"{yes} if about {topic}, {no} if not",
            "question": f"{yes} if it asks, {no} if not",
            "city": f"{yes} if it names a city, {no} if not",
        }[rule]
        pieces = (
            [(told_as + self.pick(("\n", ":\n", ".\n")), QUIET)]
            if told
            else [(f"{yes} or {no}\n", QUIET)]
            if self.chance(0.5)
            else []
        )
        seen = set()
        for i in range(self.rng.randint(1, 5) if told else self.rng.randint(5, 8)):
            scene, side = self.labelled(rule, topic)
            pieces += [
                (scene.text + "\n", QUIET),
                (yes if side else no, 2 * ANSWER if told or side in seen else QUIET),
                ("\n", QUIET),
            ]
            seen.add(side)
        return pieces[:-1] + [(END, ANSWER)]

    def labelled(self, rule, topic):
        """A short scene and whether the rule holds for it."""
        side = self.chance(0.5)
        while True:
            if rule == "mood":
                scene = self.build(self.review())
                good = bool(scene.polarity) and (scene.polarity > 0) == side
            elif rule == "topic":
                scene = self.build(self.plain(topic if side else None))
                good = bool(scene.topic) and (scene.topic == topic) == side
            elif rule == "question":
                scene = self.build(self.passage(1), side)
                good = scene.text.endswith("?") == side
            else:
                scene = self.build([self.action(city=side)])
                good = True
            if good and len(scene.text) < 110 and not held_out(scene.text):
                return scene, side

    def words(self):
        """A word list: translations, topics or moods of single words."""
        roll = self.rng.random()
        sign = self.pick((" = ", ": ", " - "))
        pieces = []
        if roll < 0.5:
            pieces.append((self.pick(("In French:\n", "Dictionary\n", "English to French\n")), QUIET))
            for _ in range(12):
                if self.chance(0.7):
                    p = self.phrase(det=self.pick(("the", "a")), colour=0.1, plural=0.05)
                    en, fr = p.en, p.fr
                elif self.chance(0.6):
                    en, fr, _ = self.pick(GOOD + POOR + COLOURS)
                else:
                    en, _, fr = self.pick(VERBS)
                pieces += [(en + sign.rstrip(), QUIET), (" " + fr, ANSWER), ("\n", QUIET)]
        elif roll < 0.8:
            pieces.append((self.pick(("Topics\n", "Topics of words\n")), QUIET))
            for _ in range(16):
                n = self.noun(self.pick(TOPICS))
                pieces += [(n.en + sign.rstrip(), QUIET), (" " + n.topic, ANSWER), ("\n", QUIET)]
        else:
            pieces.append((self.pick(("Good or bad words\n", "Sentiment of words\n")), QUIET))
            for _ in range(16):
                good = self.chance(0.5)
                pieces += [
                    (self.pick(GOOD if good else POOR)[0] + sign.rstrip(), QUIET),
                    (" positive" if good else " negative", ANSWER),
                    ("\n", QUIET),
                ]
        return pieces[:-1] + [(END, QUIET)]

    def recall(self):
        """Random pairs, then the same pairs in another order: each value is given by its key."""
        count = self.rng.randint(3, 5 + int(9 * min(1, self.progress * 6)))
        keys = self.rng.sample(lex.NAMES, count) if self.chance(0.6) else [n.en for n in self.rng.sample(NOUNS, count)]
        pool = self.pick(
            (
                [n.en for n in NOUNS],
                [c.split("=")[0] for c in lex.CITIES.split()],
                [a[0] for a in GOOD + POOR],
                lex.NAMES,
            )
        )
        pairs = [(k, self.pick(pool)) for k in keys]
        link, sep = self.pick((" ", ": ", " = ", " -> ")), self.pick(("\n", "\n", ". "))
        pieces = [(sep.join(k + link + v for k, v in pairs) + sep, QUIET)]
        for _ in range(2):
            self.rng.shuffle(pairs)
            bare = link.rstrip()
            for k, v in pairs:
                pieces += [(k + bare, QUIET), (" " + v, ANSWER), (sep, QUIET)]
        return pieces[:-1] + [(END, QUIET)]

    def copy(self):
        """A text and the same text again."""
        text = self.build(self.passage(self.rng.randint(1, 3))).text
        return [
            (self.pick(("Repeat:\n", "Copy the text\n", "Again:\n")), QUIET),
            (text + "\n", QUIET),
            (text + END, ANSWER),
        ]


def examples(task, seed, count, held, seen):
    """``count`` examples of a task that are not in ``seen``. A question has a passage of two or three facts."""
    source, rows = Scenes(seed, held), []
    key = "label" if task in ("topic", "sentiment") else "output"
    low = 2 if task == "question-answering" else 1
    while len(rows) < count:
        scene = source.scene(task, facts=(low, 3))
        if scene.text not in seen:
            seen.add(scene.text)
            rows.append({"input": scene.text, key: answer(task, scene, source)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the example data")
    parser.add_argument("--test-seed", type=int, default=300, help="another seed gives test data that nobody has seen")
    parser.add_argument("--show", type=int, default=0, help="print this many documents instead")
    args = parser.parse_args()
    if args.show:
        corpus = Corpus(1)
        for _ in range(args.show):
            print("".join(t if w <= PROSE else f"[{t}]" for t, w in corpus.document()), "\n" + "-" * 40)
    if args.out:
        for number, task in enumerate(TASKS):
            folder = args.out / task
            folder.mkdir(parents=True, exist_ok=True)
            seen = set()
            for split, seed, count, held in (
                ("test", args.test_seed, 300, True),
                ("train", 100, 512, False),
                ("dev", 200, 100, True),
            ):
                rows = examples(task, seed + number, count, held, seen)
                (folder / f"{split}.jsonl").write_text(
                    "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
                )


if __name__ == "__main__":
    main()
