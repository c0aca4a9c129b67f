"""The text tokenizer of a run, with the image placeholder in its vocabulary."""

from __future__ import annotations

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from manifests.errors import InputError
from train_stage.config import ModelConfig


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with `config.image_token` as one special token and a padding token.

    The same input gives the same ids on every rank and at export. A tokenizer without padding token pads with its
    unknown token, as Vicuna does, else with its end token; attention and labels leave padding out either way.

    Raises:
        InputError: the tokenizer cannot be read, or has no end-of-sequence token to end an answer with.
    """
    location = config.tokenizer or config.language_model
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"no tokenizer can be read from {location} ({first_line}); "
            "give model.tokenizer a folder or hub id with tokenizer files"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {location} has no eos_token; set one in its tokenizer_config.json")
    if config.image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(config.image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
