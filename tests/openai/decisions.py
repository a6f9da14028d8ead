"""Asks a server of softserve for decisions with OpenAI's and TypeSafe's own Python packages, unmodified.

    python tests/openai/decisions.py http://127.0.0.1:8080/v1

The server serves the demo. Fails with the first answer that is not what the packages document.
"""
import json
import sys
import urllib.request

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
BASE = "softserve-demo"
TEXT = "The food was cold and the waiter rude."
MOODS = ["positive", "negative"]


def classify(task, text):
    request = urllib.request.Request(
        f"{sys.argv[1]}/tasks/{task}/classify", method="POST", headers={"content-type": "application/json"},
        data=json.dumps({"input": text}).encode())
    answer = json.load(urllib.request.urlopen(request))
    return {p["label"]: p["probability"] for p in answer["probabilities"]}


def choice(values, **rest):
    return {"type": "choice", "instructions": "", "choices": [{"value": value} for value in values], **rest}


def ask(questions, model="sentiment", text=TEXT):
    return client.decisions.create(model=model, input=text, questions=questions)


def of_tasks():
    topics = list(classify("topic", TEXT))
    decision = ask([choice(MOODS, name="mood"), choice(topics, name="about", task="topic"),
                    {"type": "score", "instructions": "", "levels": [{"label": "negative"}, {"label": "positive"}]}])
    mood, about, score = decision.answers
    expected = classify("sentiment", TEXT)
    assert {p.value: p.probability for p in mood.probabilities} == expected, (mood, expected)
    assert [p.value for p in mood.probabilities] == MOODS and mood.name == "mood"
    assert mood.choice == "negative" and mood.confidence == expected["negative"]
    assert {p.value: p.probability for p in about.probabilities} == classify("topic", TEXT)
    assert [(p.label, p.value) for p in score.probabilities] == [("negative", 0), ("positive", 1)]
    assert score.score == expected["positive"], score
    assert decision.model == "sentiment" and decision.usage.total_tokens == decision.usage.input_tokens > 0
    # The same bits alone, and in a message.
    alone = client.decisions.create(
        model="sentiment", questions=[choice(MOODS, name="mood")],
        input=[{"type": "message", "role": "user", "content": [{"type": "input_text", "text": TEXT}]}])
    assert alone.answers[0] == mood, (alone, mood)
    subset = ask([choice(topics[:2], task="topic")]).answers[0]
    assert abs(sum(p.probability for p in subset.probabilities) - 1) < 1e-9


def of_the_base_model():
    questions = [
        {"type": "predicate", "instructions": "The guest was content.", "name": "content"},
        choice([True, False, "true"], instructions="Was it good?"),
        {"type": "score", "instructions": "How good?", "levels": [{"label": "bad", "description": "poor"}, {"label": "good"}]},
        choice([f"value {i}" for i in range(40)], instructions="Which?"),
    ]
    predicate, typed, score, many = ask(questions, model=BASE).answers
    assert 0 < predicate.probability < 1 and predicate.name == "content"
    assert [p.value for p in typed.probabilities] == [True, False, "true"], typed
    for answer in (typed, score, many):
        assert abs(sum(p.probability for p in answer.probabilities) - 1) < 1e-9, answer
        assert answer.confidence == max(p.probability for p in answer.probabilities)
    assert 0 <= score.score <= 1 and len(many.probabilities) == 40


def refused(code, param, call):
    try:
        call()
    except openai.BadRequestError as found:
        assert (found.code, found.param) == (code, param), (found.code, found.param, found.message)
        return found.message
    raise AssertionError("an error was expected")


def errors():
    said = refused("unknown_label", None, lambda: ask([choice(["positive", "fine"])]))
    assert "negative" in said, said
    refused("no_labels", None, lambda: ask([choice(["a", "b"], task="story")]))
    refused("invalid_request", "questions[1].choices", lambda: ask([choice(MOODS), choice(["positive", "positive"])]))
    refused("invalid_request", "questions[0].choices", lambda: ask([choice(["positive"])]))
    said = refused("invalid_request", "questions[0]", lambda: ask([{"type": "predicate", "instructions": "x"}]))
    assert "true_label" in said, said
    refused("invalid_request", "questions", lambda: ask([]))
    refused("invalid_request", "input[0].type", lambda: client.decisions.create(
        model="sentiment", questions=[choice(MOODS)],
        input=[{"type": "function_call", "arguments": "{}", "call_id": "1", "name": "f"}]))


def typesafe():
    try:
        import typesafe_sdk as sdk
    except ImportError:
        print("skipped: typesafe-sdk is not installed")
        return
    asked = sdk.TypeSafeClient(api_key="none", base_url=sys.argv[1].removesuffix("/v1"))
    answers = asked.system_one(model="sentiment", state=TEXT, questions={
        "mood": sdk.Choice(criteria={"positive": None, "negative": "it was bad"}),
        "level": sdk.Score(criteria=["negative", "positive"]),
    })
    expected = classify("sentiment", TEXT)
    assert answers.choices["mood"].choice == "negative" and answers.choices["mood"].probabilities == expected, answers
    assert answers.scores["level"].score == expected["positive"] and answers.scores["level"].legend == {0: "negative", 1: "positive"}
    noul = asked.system_one(model=BASE, state={"text": TEXT}, questions={"good": sdk.Noul(instructions="Was it good?")})
    assert 0 < noul.nouls["good"].noul < 1 and noul.usage.input_tokens > 0, noul


for check in (of_tasks, of_the_base_model, errors, typesafe):
    check()
    print("passed:", check.__name__)
