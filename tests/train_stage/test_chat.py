"""Labels worked out by hand, for tokenizers of the kinds there are."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train_stage.chat import SYSTEM, BadSample, ChatEncoder, pieces, template_source

BOS = "<s>"
EOS = "</s>"


def byte_level(bos: bool) -> PreTrainedTokenizerFast:
    """GPT-2 and Qwen style: a space belongs to the word after it; every token here is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, bos)


def dummy_prefix(bos: bool) -> PreTrainedTokenizerFast:
    """SentencePiece style: a space is put before the text, and words start with it; every token is a character."""
    letters = sorted({*SYSTEM, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:?.\n"} - {" "})
    words = ["▁red", "▁ASSISTANT:"]
    merges = []
    known = ["▁", *letters]
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            known.append(word[:end])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", BOS, EOS, *known]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return wrapped(tokenizer, bos)


def wrapped(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        ids = [(BOS, tokenizer.token_to_id(BOS))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    made.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return made


KINDS = [
    pytest.param(lambda: byte_level(bos=False), id="byte-level"),
    pytest.param(lambda: byte_level(bos=True), id="byte-level-bos"),
    pytest.param(lambda: dummy_prefix(bos=True), id="dummy-prefix-bos"),
    pytest.param(lambda: dummy_prefix(bos=False), id="dummy-prefix"),
]

TALK = [
    {"from": "human", "value": "what colour?\n<image>"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "a circle?"},
    {"from": "gpt", "value": "no, red."},
]


def supervised_texts(tokenizer: PreTrainedTokenizerFast, encoded) -> list[str]:
    """The stretches of supervised tokens, as text."""
    found: list[list[int]] = []
    before = False
    for token, supervised in zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True):
        if supervised and not before:
            found.append([])
        if supervised:
            found[-1].append(token)
        before = supervised
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("make", KINDS)
def test_vicuna_has_the_ids_of_the_whole_prompt_and_supervises_the_answers(make) -> None:
    tokenizer = make()
    (encoded,) = ChatEncoder(tokenizer, "<image>").encode([pieces("vicuna_v1", TALK, 1)])
    text = f"{SYSTEM} USER: <image>\nwhat colour? ASSISTANT: red</s>USER: a circle? ASSISTANT: no, red.</s>"
    assert encoded.ids.tolist() == tokenizer(text)["input_ids"]
    answers = [answer.strip() for answer in supervised_texts(tokenizer, encoded)]
    assert answers == ["red</s>", "no, red.</s>"]
    # The first supervised token is the one generation has to make after the prompt.
    prompt = tokenizer(f"{SYSTEM} USER: <image>\nwhat colour? ASSISTANT:")["input_ids"]
    assert encoded.ids.tolist()[: len(prompt)] == prompt
    assert encoded.supervised.tolist().index(True) == len(prompt)


@pytest.mark.parametrize("make", KINDS)
def test_plain_supervises_caption_and_line_feed(make) -> None:
    tokenizer = make()
    talk = [{"from": "human", "value": "tell me\n<image>"}, {"from": "gpt", "value": "red circle"}]
    (encoded,) = ChatEncoder(tokenizer, "<image>").encode([pieces("plain", talk, 1)])
    assert encoded.ids.tolist() == tokenizer("<image>red circle\n")["input_ids"]
    first = 1 + (encoded.ids[0] == tokenizer.convert_tokens_to_ids(BOS))
    assert encoded.supervised.tolist() == [False] * first + [True] * (len(encoded.ids) - first)


def test_labels_by_hand() -> None:
    tokenizer = byte_level(bos=True)
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]
    (encoded,) = ChatEncoder(tokenizer, "<image>").encode([pieces("vicuna_v1", talk, 0)])
    prompt = len(f"{SYSTEM} USER: hi ASSISTANT:")
    assert encoded.supervised.tolist() == [False] * (1 + prompt) + [True] * len(" ok") + [True]
    assert tokenizer.convert_ids_to_tokens(encoded.ids.tolist()[-4:]) == ["Ġ", "o", "k", EOS]


def test_several_images_stay_where_they_are() -> None:
    talk = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "red"}]
    question = pieces("vicuna_v1", talk, 2)[0].text
    assert question.endswith("USER: <image> or <image>? ASSISTANT:")


@pytest.mark.parametrize(
    ("talk", "images", "reason"),
    [
        ([], 0, "conversation"),
        ([{"from": "human", "value": "q"}], 0, "conversation"),
        ([{"from": "human", "value": "q"}, {"from": "human", "value": "q"}], 0, "conversation"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "<image>"}], 1, "conversation"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], 1, "image_count"),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}], 0, "image_count"),
    ],
)
def test_what_is_no_conversation_is_refused(talk: list, images: int, reason: str) -> None:
    with pytest.raises(BadSample) as refused:
        pieces("vicuna_v1", talk, images)
    assert refused.value.reason == reason


def test_a_leading_answer_is_dropped_as_llava_does() -> None:
    talk = [{"from": "gpt", "value": "hello"}, *TALK[2:]]
    assert pieces("vicuna_v1", talk, 0) == pieces("vicuna_v1", TALK[2:], 0)


def test_plain_takes_one_question_and_one_answer() -> None:
    with pytest.raises(BadSample, match="one question and one answer"):
        pieces("plain", TALK, 1)


def messages(talk: list[dict[str, str]]) -> list[dict]:
    """LLaVA turns as the messages that `apply_chat_template` takes."""
    made = []
    for turn in talk:
        content: list[dict] = []
        for number, text in enumerate(turn["value"].split("<image>")):
            content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        made.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
    return made


TALKS = [
    TALK,
    TALK[2:],
    [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "red"}],
    [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}],
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_the_jinja_template_renders_what_training_reads(template: str, talk: list[dict[str, str]]) -> None:
    if template == "plain":
        talk = talk[:2]
    images = sum(turn["value"].count("<image>") for turn in talk)
    parts = pieces(template, talk, images)
    text = "".join(part.text + (EOS if part.ends_turn else "") for part in parts)
    tokenizer = byte_level(bos=False)
    tokenizer.chat_template = template_source(template)
    assert tokenizer.apply_chat_template(messages(talk), tokenize=False) == text
    prompt = tokenizer.apply_chat_template(messages(talk[:1]), tokenize=False, add_generation_prompt=True)
    assert prompt == parts[0].text


def test_the_template_takes_another_image_token() -> None:
    assert "<image>" not in template_source("vicuna_v1", "<|picture|>")
