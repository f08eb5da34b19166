"""The tokenizer built in memory spells the demo's words and survives a round trip to disk."""

import torch
from transformers import CLIPTokenizer

from stepdistill.demo.data import DIGIT_NAMES, prompt_for
from stepdistill.demo.text import MAX_TOKENS, demo_text_encoder, demo_tokenizer


def test_each_word_of_a_prompt_is_one_token() -> None:
    tokenizer = demo_tokenizer()
    for label, name in enumerate(DIGIT_NAMES):
        assert tokenizer.tokenize(prompt_for(label)) == ["a</w>", "handwritten</w>", f"{name}</w>"]


def test_start_and_end_frame_the_prompt() -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer("a handwritten two").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(ids) == 5


def test_unknown_words_become_bytes_not_unknown_tokens() -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer("été").input_ids
    assert len(ids) == 2 + 5
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_reloaded_tokenizer_gives_the_same_ids(tmp_path) -> None:
    tokenizer = demo_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reloaded = CLIPTokenizer.from_pretrained(tmp_path)
    prompts = [*map(prompt_for, range(10)), "", "something else"]
    options = {"padding": "max_length", "truncation": True}
    assert reloaded.model_max_length == MAX_TOKENS
    assert reloaded(prompts, **options).input_ids == tokenizer(prompts, **options).input_ids


def test_encoder_tells_the_prompts_apart() -> None:
    tokenizer = demo_tokenizer()
    torch.manual_seed(0)
    encoder = demo_text_encoder(tokenizer, width=32).eval()
    tokens = tokenizer(
        [prompt_for(label) for label in range(10)], padding="max_length", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        text = encoder(tokens)[0]
    assert text.shape == (10, MAX_TOKENS, 32)
    distance = torch.cdist(text.flatten(1), text.flatten(1)) + torch.eye(10) * 1e9
    assert distance.min() > 1
