"""The official client against our server: the same text as `generate` alone, in every form of answer."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from served import Served, save_family, serving  # noqa: E402

from nestling.model.width import hard  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    save_family(directory)
    with serving(directory) as running:
        yield running
        assert running.empties()


@pytest.fixture
def client(served: Served) -> Iterator[object]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_every_size_is_a_model(served: Served, client) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "tiny@large", "tiny@middle", "tiny@small"]
    assert models["tiny@small"].parameters == served.family["small"].parameters
    assert client.models.retrieve("tiny@small").id == "tiny@small"
    with pytest.raises(openai.NotFoundError, match="404 - tiny has no budget 'smal'; did you mean 'small'"):
        client.models.retrieve("tiny@smal")


@pytest.mark.parametrize("size", ["large", "middle", "small"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_generates_own(served: Served, client, size: str, stream: bool) -> None:
    for prompt in ("hello", "a", "żółw and more than one chunk of text to read first"):
        given = {"model": f"tiny@{size}", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        wanted = served.text(size, prompt, 12)
        if stream:
            chunks = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == wanted
            usage = chunks[-1].usage
            assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [
                "length"
            ]
        else:
            answer = client.completions.create(**given)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "length")
            usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt.encode()), 12)


def test_a_chat_is_the_template_and_a_completion(served: Served, client) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    wanted = served.text("small", "<system>be<user>hi<assistant>", 9)
    given = {"model": "TINY@Small", "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    answer = client.chat.completions.create(**given)
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**given, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_thought_stands_apart(served: Served, client) -> None:
    thought = served.text("small", "<user>hi<assistant><think>\n", 9)
    given = {"model": "tiny@small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    options = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    message = client.chat.completions.create(**given, **options).choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("", thought, thought)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**given, **options, stream=True)]
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == thought
    assert not any(delta.content for delta in deltas)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_and_is_left_out(served: Served, client, stream: bool) -> None:
    whole = served.text("large", "hello", 30)
    stop = whole[7:9]
    given = {"model": "tiny", "prompt": "hello", "max_tokens": 30, "temperature": 0, "stop": [stop, "never"]}
    answer = client.completions.create(**given, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_draws_are_the_seeds_and_choices_differ(client) -> None:
    def ask(**given):
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=8, n=3, **given)
        return [choice.text for choice in answer.choices]

    assert ask(seed=5) == ask(seed=5)
    assert ask(seed=5) != ask(seed=6)
    assert len(set(ask(seed=5))) == 3
    assert ask() != ask()
    assert len(set(ask(temperature=0))) == 1


def test_several_prompts_and_prompts_of_tokens(served: Served, client) -> None:
    given = {"model": "tiny@middle", "max_tokens": 5, "temperature": 0}
    wanted = [served.text("middle", prompt, 5) for prompt in ("one", "three")]
    answer = client.completions.create(prompt=["one", "three"], **given)
    assert [choice.text for choice in answer.choices] == wanted
    ids = [served.models.tokenizer.encode(prompt).ids for prompt in ("one", "three")]
    assert [choice.text for choice in client.completions.create(prompt=ids, **given).choices] == wanted
    assert client.completions.create(prompt=ids[1], **given).choices[0].text == wanted[1]


def test_log_probabilities_are_the_models(served: Served, client) -> None:
    import torch

    given = {"model": "tiny@small", "max_tokens": 4, "temperature": 0}
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **given)
    ids = served.models.tokenizer.encode("<user>hi<assistant>").ids
    wanted = served.family["small"](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    first = answer.choices[0].logprobs.content[0]
    assert first.logprob == pytest.approx(float(wanted.max()), abs=1e-4)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(wanted.topk(2).values.tolist(), abs=1e-4)
    assert len(answer.choices[0].logprobs.content) == 4
    plain = client.completions.create(prompt="<user>hi<assistant>", logprobs=1, **given).choices[0].logprobs
    assert plain.token_logprobs[0] == pytest.approx(first.logprob, abs=1e-4)
    assert [len(plain.tokens), len(plain.top_logprobs), plain.text_offset[0]] == [4, 4, 0]


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "there is no model 'other'"),
        ({"model": "tiny@9q"}, openai.NotFoundError, "no budget '9q'"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens = 1000000 is more than"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 99}, openai.BadRequestError, "n = 99"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"prompt": ""}, openai.BadRequestError, "the prompt is empty"),
        ({"prompt": [300]}, openai.BadRequestError, "token 300 is outside"),
        ({"prompt": "x" * 40000}, openai.BadRequestError, "the prompt has 40,000 tokens"),
        ({"logit_bias": {"1": 2}}, openai.BadRequestError, "logit_bias is not supported"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty"),
        ({"prompt": "x" * 30000, "max_tokens": 4000}, openai.BadRequestError, "of cache, and there are"),
    ],
)
def test_what_cannot_be_served_is_refused_in_openais_form(client, given, kind, words) -> None:
    with pytest.raises(kind, match=words) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 3} | given)
    assert caught.value.body["type"] == "invalid_request_error"


def test_many_clients_of_all_sizes_at_once_hear_what_they_would_alone(served: Served) -> None:
    import asyncio

    jobs = [
        (size, f"{size} {number}" * (1 + number % 4)) for number in range(8) for size in ("large", "middle", "small")
    ]
    wanted = [served.text(size, prompt, 10) for size, prompt in jobs]

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(size: str, prompt: str) -> str:
                given = {"model": f"tiny@{size}", "prompt": prompt, "max_tokens": 10, "temperature": 0}
                stream = await client.completions.create(**given, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(*job) for job in jobs))

    assert asyncio.run(run()) == wanted
    assert hard(served.family.model.architecture, served.family["small"].submodel) is served.family["small"].widths
