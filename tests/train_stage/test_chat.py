"""Labels worked out by hand, for tokenizers of the kinds there are."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manifests.errors import InputError
from train_stage.chat import BadSample, ChatEncoder
from train_stage.templates import SYSTEM, pieces, template_source

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


def with_tokens(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(bos=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("plain", [EOS]),
        ("vicuna_v1", [EOS]),
        ("mistral", [EOS]),
        ("llama3", [EOS, "<|eot_id|>"]),
        ("qwen2", [EOS, "<|im_end|>"]),
        ("tokenizer", [EOS, "<|im_end|>"]),
    ],
)
def test_an_answer_ends_with_the_template_s_own_end_of_turn(template, ends: list[str]) -> None:
    tokenizer = with_tokens("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = (  # ChatML, and an end token that it never writes
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = ChatEncoder(tokenizer, "<image>").stop_tokens(template)
    assert tokenizer.convert_ids_to_tokens(found) == ends


@pytest.mark.parametrize("template", ["llama3", "qwen2"])
def test_an_end_of_turn_that_is_no_token_ends_nothing(template) -> None:
    """A tokenizer without `<|im_end|>` cuts it in several, and to stop at one of these would cut answers short."""
    tokenizer = byte_level(bos=True)
    assert ChatEncoder(tokenizer, "<image>").stop_tokens(template) == [tokenizer.eos_token_id]


def test_labels_by_hand() -> None:
    tokenizer = byte_level(bos=True)
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]
    (encoded,) = ChatEncoder(tokenizer, "<image>").encode([pieces("vicuna_v1", talk, 0)])
    prompt = len(f"{SYSTEM} USER: hi ASSISTANT:")
    assert encoded.supervised.tolist() == [False] * (1 + prompt) + [True] * len(" ok") + [True]
    assert tokenizer.convert_ids_to_tokens(encoded.ids.tolist()[-4:]) == ["Ġ", "o", "k", EOS]


SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]

LLAMA3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# Worked out by hand from LLaVA's conversation.py and train.py; what stands between the guillemets is supervised.
TABLES = {
    "vicuna_v1": f"{SYSTEM} USER: <image>\nwhat colour? ASSISTANT:« red</s>»USER: a circle? ASSISTANT:« no, red.</s>»",
    "mistral": "[INST] <image>\nwhat colour? [/INST]« red </s>»[INST] a circle? [/INST]« no, red. </s>»",
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA3}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«red<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\na circle?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«no, red.<|eot_id|>»"
    ),
    "qwen2": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nwhat colour?<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»\n"
        "<|im_start|>user\na circle?<|im_end|>\n<|im_start|>assistant\n«no, red.<|im_end|>»"
    ),
}


def with_specials(bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(bos)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    return tokenizer


def read_table(tokenizer: PreTrainedTokenizerFast, marked: str) -> tuple[list[int], list[bool]]:
    """Token ids and supervision of a marked text, each stretch tokenized by itself."""
    ids, supervised = [], []
    for number, stretch in enumerate(marked.replace("»", "«").split("«")):
        own = tokenizer(stretch, add_special_tokens=False)["input_ids"]
        ids += own
        supervised += [number % 2 == 1] * len(own)
    return ids, supervised


@pytest.mark.parametrize("template", TABLES)
@pytest.mark.parametrize("bos", [False, True])
def test_ids_and_labels_are_those_of_the_table(template: str, bos: bool) -> None:
    tokenizer = with_specials(bos)
    encoder = ChatEncoder(tokenizer, "<image>")
    (encoded,) = encoder.encode([encoder.pieces(template, TALK, 1)])
    ids, supervised = read_table(tokenizer, TABLES[template])
    opening = [tokenizer.bos_token_id] * bos
    assert encoded.ids.tolist() == opening + ids
    assert encoded.supervised.tolist() == [False] * bos + supervised


def own_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """ChatML as text models have it: contents are plain text, and a system text only where there is one."""
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizers_own_template_supervises_each_answer_to_its_end(bos: bool) -> None:
    tokenizer = own_template(with_specials(bos))
    encoder = ChatEncoder(tokenizer, "<image>")
    (encoded,) = encoder.encode([encoder.pieces("tokenizer", TALK, 1)])
    table = (
        "<|im_start|>user\n<image>\nwhat colour?<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»\n"
        "<|im_start|>user\na circle?<|im_end|>\n<|im_start|>assistant\n«no, red.<|im_end|>»"
    )
    ids, supervised = read_table(tokenizer, table)
    assert encoded.ids.tolist() == [tokenizer.bos_token_id] * bos + ids
    assert encoded.supervised.tolist() == [False] * bos + supervised


def test_the_tokenizers_own_template_is_exported_with_image_parts_made_plain() -> None:
    tokenizer = own_template(with_specials(bos=False))
    encoder = ChatEncoder(tokenizer, "<image>")
    parts = encoder.pieces("tokenizer", TALK, 1)
    tokenizer.chat_template = encoder.chat_template("tokenizer")
    assert tokenizer.apply_chat_template(messages(TALK), tokenize=False) == "".join(part.text for part in parts) + "\n"


def test_a_template_that_rewrites_earlier_turns_is_refused_by_sample() -> None:
    tokenizer = with_specials(bos=False)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] if loop.last else '...' }}{% endfor %}"
    )
    with pytest.raises(BadSample, match="rewrites earlier turns"):
        ChatEncoder(tokenizer, "<image>").pieces("tokenizer", TALK, 1)


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    with pytest.raises(InputError, match="no chat template of its own"):
        ChatEncoder(byte_level(bos=False), "<image>").pieces("tokenizer", TALK, 1)


def test_braces_and_marks_of_others_are_text() -> None:
    talk = [{"from": "human", "value": "{} {question} {0}"}, {"from": "gpt", "value": "{}"}]
    assert [piece.text for piece in pieces("mistral", talk, 0)] == ["[INST] {} {question} {0} [/INST]", " {} "]


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


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages(talk: list[dict[str, str]]) -> list[dict]:
    """LLaVA turns as the messages that `apply_chat_template` takes."""
    made = []
    for turn in talk:
        content: list[dict] = []
        for number, text in enumerate(turn["value"].split("<image>")):
            content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        made.append({"role": ROLES[turn["from"]], "content": content})
    return made


TALKS = [
    TALK,
    TALK[2:],
    [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "red"}],
    [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}],
]


@pytest.mark.parametrize("talk", [*TALKS, [{"from": "system", "value": "Be brief."}, *TALK]])
@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "mistral", "llama3", "qwen2"])
def test_the_jinja_template_renders_what_training_reads(template: str, talk: list[dict[str, str]]) -> None:
    if template == "plain":
        talk = [turn for turn in talk if turn["from"] != "system"][:2]
    images = sum(turn["value"].count("<image>") for turn in talk)
    parts = pieces(template, talk, images)
    text = "".join(part.text + (EOS if part.ends_turn else "") for part in parts)
    tokenizer = byte_level(bos=False)
    tokenizer.chat_template = template_source(template)
    assert tokenizer.apply_chat_template(messages(talk), tokenize=False) == text
    first = 1 + (talk[0]["from"] == "system")
    prompt = tokenizer.apply_chat_template(messages(talk[:first]), tokenize=False, add_generation_prompt=True)
    assert prompt == parts[0].text


def test_the_template_takes_another_image_token() -> None:
    assert "<image>" not in template_source("vicuna_v1", "<|picture|>")
