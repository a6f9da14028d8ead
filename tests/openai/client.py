"""Asks a server of softserve with OpenAI's own Python package, unmodified.

    python tests/openai/client.py http://127.0.0.1:8080/v1

The server serves the demo. Fails with the first answer that is not what OpenAI's package documents.
"""
import json
import sys
import time
import urllib.request
from typing import Annotated, Literal

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
BASE = "softserve-demo"
TEXT = "The food was cold and the waiter rude."


def models():
    listed = {model.id: model for model in client.models.list()}
    assert {"sentiment", "topic", BASE} <= set(listed), listed
    assert client.models.retrieve("sentiment").id == "sentiment"
    version = listed["sentiment"].root
    pinned = client.completions.create(model=f"sentiment@{version}", prompt=TEXT)
    assert pinned.system_fingerprint == version and pinned.choices[0].text == "negative", pinned


def completions():
    answer = client.completions.create(model="sentiment", prompt=TEXT, max_tokens=4, logprobs=2)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.object) == ("negative", "stop", "text_completion"), answer
    assert choice.logprobs.tokens == ["negative"] and choice.logprobs.text_offset == [0]
    assert choice.logprobs.token_logprobs[0] == choice.logprobs.top_logprobs[0]["negative"] < 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    several = client.completions.create(model="sentiment", prompt=[TEXT, "A fine evening."], n=2, echo=True)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == TEXT + "negative"
    assert several.choices[2].text.startswith("A fine evening.")

    ids = client.post("/completions", cast_to=object, body={"model": BASE, "prompt": [[300, 301], [302]], "max_tokens": 2})
    assert len(ids["choices"]) == 2 and ids["usage"]["virtual_tokens"] == 0, ids

    whole = client.completions.create(model="story", prompt="The old man", max_tokens=24, seed=7, temperature=0.8)
    stream = client.completions.create(
        model="story", prompt="The old man", max_tokens=24, seed=7, temperature=0.8, stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}, reasons

    stopped = client.completions.create(model="story", prompt="The old man", max_tokens=24, seed=7, temperature=0.8, stop=["e"])
    assert stopped.choices[0].finish_reason == "stop" and "e" not in stopped.choices[0].text


def bias():
    free = client.completions.create(model="sentiment", prompt=TEXT, logprobs=2, max_tokens=1)
    likely = list(free.choices[0].logprobs.top_logprobs[0])
    assert len(likely) == 2
    root = sys.argv[1].removesuffix("/v1")
    request = urllib.request.Request(f"{root}/v1/tasks/sentiment/generate", method="POST",
                                     headers={"content-type": "application/json"},
                                     data=json.dumps({"input": TEXT, "max_tokens": 1, "logprobs": 1}).encode())
    chosen = json.load(urllib.request.urlopen(request))["tokens"][0]["id"]
    biased = client.completions.create(model="sentiment", prompt=TEXT, max_tokens=1, logit_bias={str(chosen): -100})
    assert biased.choices[0].text != free.choices[0].text, biased
    # Log-probabilities are the model's own, whatever is added.
    kept = client.completions.create(model="sentiment", prompt=TEXT, logprobs=2, max_tokens=1, logit_bias={str(chosen): 5})
    assert kept.choices[0].logprobs.token_logprobs == free.choices[0].logprobs.token_logprobs


def chat():
    answer = client.chat.completions.create(
        model="sentiment", messages=[{"role": "user", "content": TEXT}], logprobs=True, top_logprobs=2, n=2,
        max_completion_tokens=4, user="me", store=False,
    )
    assert [c.message.content for c in answer.choices] == ["negative", "negative"], answer
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "stop"
    token = answer.choices[0].logprobs.content[0]
    assert token.token == "negative" and bytes(token.bytes) == b"negative" and len(token.top_logprobs) == 2, token

    parts = [{"type": "text", "text": TEXT[:10]}, {"type": "text", "text": TEXT[10:]}]
    assert client.chat.completions.create(
        model="sentiment", messages=[{"role": "user", "content": parts}]).choices[0].message.content == "negative"

    with client.chat.completions.stream(model="sentiment", messages=[{"role": "user", "content": TEXT}]) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events and final.choices[0].message.content == "negative", (events, final)


def refused(error, code, param, call):
    try:
        call()
    except error as found:
        assert (found.code, found.param) == (code, param), (found.code, found.param, found.message)
        assert found.body["request_id"] == found.response.headers["x-request-id"]
        return found
    raise AssertionError(f"{error.__name__} was expected")


def errors():
    chat = client.chat.completions.create
    user = [{"role": "user", "content": TEXT}]
    found = refused(openai.NotFoundError, "model_not_found", "model", lambda: chat(model="topik", messages=user))
    assert "sentiment" in found.message and BASE in found.message, found.message
    refused(openai.NotFoundError, "model_not_found", "model", lambda: client.models.retrieve("sentiment@000000000000"))
    refused(openai.BadRequestError, "invalid_request", "temperature",
            lambda: chat(model="sentiment", messages=user, temperature=-1))
    refused(openai.BadRequestError, "invalid_request", "tools", lambda: chat(
        model="sentiment", messages=user,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]))
    refused(openai.BadRequestError, "invalid_request", "messages", lambda: chat(
        model="sentiment", messages=[{"role": "system", "content": "Be brief."}] + user))
    refused(openai.BadRequestError, "context_length_exceeded", None,
            lambda: chat(model="sentiment", messages=[{"role": "user", "content": "word " * 2000}]))
    refused(openai.BadRequestError, "invalid_request", "messages", lambda: chat(model=BASE, messages=user))
    refused(openai.APIStatusError, "timeout", None, lambda: chat(
        model="story", messages=[{"role": "user", "content": "The old man"}], max_tokens=400,
        extra_body={"timeout_ms": 1, "ignore_eos": True}))


def structured():
    import pydantic

    class Mood(pydantic.BaseModel):
        mood: Literal["glad", "sad"]
        score: Annotated[int, pydantic.Field(ge=0, le=10)]

    user = [{"role": "user", "content": TEXT}]
    parsed = client.chat.completions.parse(model="sentiment", messages=user, response_format=Mood, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Mood), parsed
    schema = {"type": "json_schema", "json_schema": {"name": "mood", "schema": Mood.model_json_schema(), "strict": True}}
    answer = client.chat.completions.create(model="topic", messages=user, response_format=schema, max_tokens=100, n=3,
                                            temperature=1, seed=1)
    for choice in answer.choices:
        Mood.model_validate_json(choice.message.content)
    refused(openai.BadRequestError, "invalid_request", "grammar", lambda: client.chat.completions.create(
        model="topic", messages=user,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no type"}}}))


def batches():
    urls = "/v1/chat/completions"
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": urls, "body": {
        "model": "sentiment" if i != 7 else "nothing", "messages": [{"role": "user", "content": f"{TEXT} {i}"}]}}
        for i in range(20)]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(content), "batch"), file
    assert client.files.content(file.id).read() == content
    batch = client.batches.create(input_file_id=file.id, endpoint=urls, completion_window="24h", metadata={"a": "b"})
    for _ in range(600):
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed"):
            break
        time.sleep(0.1)
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 20, 19, 1), batch
    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(20) if i != 7]
    assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == "negative", output[0]
    wrong = json.loads(client.files.content(batch.error_file_id).text)
    assert wrong["response"]["status_code"] == 404 and wrong["response"]["body"]["error"]["code"] == "model_not_found"
    assert batch.id in [b.id for b in client.batches.list(limit=5)] and batch.metadata == {"a": "b"}
    assert {file.id, batch.output_file_id} <= {f.id for f in client.files.list()}
    refused(openai.ConflictError, "batch_ended", None, lambda: client.batches.cancel(batch.id))
    assert client.files.delete(file.id).deleted
    refused(openai.NotFoundError, "file_not_found", None, lambda: client.files.retrieve(file.id))
    refused(openai.NotFoundError, "batch_not_found", None, lambda: client.batches.retrieve("batch_x"))

    twice = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, [lines[0], lines[0]])).encode()), purpose="batch")
    failed = client.batches.create(input_file_id=twice.id, endpoint=urls, completion_window="24h")
    while failed.status not in ("completed", "failed"):
        failed = client.batches.retrieve(failed.id)
    assert failed.status == "failed" and failed.errors.data[0].line == 2, failed


for check in (models, completions, bias, chat, errors, structured, batches):
    check()
    print("passed:", check.__name__)
