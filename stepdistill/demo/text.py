"""The demo's tokenizer and text encoder: real CLIP classes built in memory, no download.

Every word of the demo's prompts is one token; any other text still works, byte by byte.
"""

# B captions, L tokens of each, K words

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .data import DIGIT_NAMES

MAX_TOKENS = 12  # start, "a", "handwritten", the digit, end, and room for a few words more
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def demo_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIPTokenizer whose merges spell the words of the demo's prompts."""
    merges = [merge for word in ("handwritten", *DIGIT_NAMES) for merge in spelling(word)]
    return clip_tokenizer(merges, MAX_TOKENS)


def clip_tokenizer(merges: Sequence[tuple[str, str]], max_tokens: int) -> CLIPTokenizer:
    """A byte-level CLIPTokenizer of these byte-pair merges."""
    symbols = sorted(ByteLevel.alphabet())  # one printable symbol for each byte
    vocabulary = [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate([*vocabulary, START, END])},
        merges=list(merges),
        model_max_length=max_tokens,
    )


def demo_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int = 1) -> CLIPTextModel:
    """A small CLIPTextModel with random weights that fits `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def spelling(word: str) -> list[tuple[str, str]]:
    """Merges that build `word` from left to right, its last letter carrying the word end."""
    letters = [*word[:-1], word[-1] + WORD_END]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """(B, L), padded as Stable Diffusion's own encode_prompt pads them."""
    ids: Tensor = tokenizer(
        [*captions], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return ids
