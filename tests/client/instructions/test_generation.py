from decimal import Decimal

import pytest

from client.instructions.generation import exact_match, generate_answers, last_number
from dare_agg.errors import ConfigError
from tests.chat import make_model, make_tokenizer, talk

PROMPTS = [talk(n)[:1] for n in range(9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights of unit size, so that no two tokens are near a tie."""
    import torch
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(make_model(tmp_path_factory.mktemp("m"))).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.5)
    return made


def one_by_one(model, tokenizer, turns, most):
    """Greedy by hand: the whole text again for each token, no cache, no padding."""
    import torch

    from client.instructions.template import prompt_ids

    ids = prompt_ids(tokenizer, turns)
    begun = len(ids)
    while len(ids) < begun + most:
        with torch.inference_mode():
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[begun:], skip_special_tokens=True)


@pytest.mark.parametrize("padding", [True, False])
def test_a_batch_answers_as_one_by_one_whatever_its_size(model, padding):
    tokenizer = make_tokenizer(padding=padding)
    right = [one_by_one(model, tokenizer, turns, 12) for turns in PROMPTS]
    assert len(set(right)) > 3
    for batch in (1, 4, 100):
        assert generate_answers(model, tokenizer, PROMPTS, most_tokens=12, batch=batch) == right


def test_an_answer_ends_with_the_end_token_and_the_models_own_settings_do_not_count(model):
    import torch
    from transformers import GenerationConfig

    tokenizer = make_tokenizer()
    right = generate_answers(model, tokenizer, PROMPTS, most_tokens=6, batch=4)
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=9.0, repetition_penalty=5.0, eos_token_id=1, num_beams=3
        )
        torch.manual_seed(5)
        assert generate_answers(model, tokenizer, PROMPTS, most_tokens=6, batch=4) == right
        assert model.generation_config.temperature == 9.0
    finally:
        model.generation_config = own
    # But for its end tokens: were each token one of them, no answer would have a token.
    model.generation_config = GenerationConfig(eos_token_id=list(range(len(tokenizer))))
    try:
        ended = generate_answers(model, tokenizer, PROMPTS, most_tokens=6, batch=4)
    finally:
        model.generation_config = own
    assert ended == [""] * len(PROMPTS)


def test_adapters_take_part(model):
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    tokenizer = make_tokenizer()
    plain = generate_answers(model, tokenizer, PROMPTS, most_tokens=8, batch=4)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"])
    ).eval()
    assert generate_answers(adapted, tokenizer, PROMPTS, most_tokens=8, batch=4) == plain
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    right = [one_by_one(adapted, tokenizer, turns, 8) for turns in PROMPTS]
    assert generate_answers(adapted, tokenizer, PROMPTS, most_tokens=8, batch=4) == right != plain


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she has 1,250 in all", "1250"),
        ("12-5=7", "7"), ("12 - 5 = -7", "-7"), ("7.0", "7"), ("costs $3.50.", "3.5"),
        ("5.", "5"), ("1, 2, 3", "3"), (".5", "0.5"), ("12", "12"), ("2026", "2026"),
    ],
)  # fmt: skip
def test_the_last_number_of_an_answer(text, number):
    assert last_number(text) == Decimal(number)


def test_exact_match_as_text_and_as_number():
    assert exact_match([" 7\n", "It is 7", "8"], ["7", "7", "7"]) == pytest.approx(1 / 3)
    assert exact_match(["7.0", "It is 7.", "8", "none"], ["7"] * 4, "number") == 0.5
    assert last_number("none") is None
    with pytest.raises(ConfigError, match="'seven' of the data has no number; set answer-form"):
        exact_match(["7"], ["seven"], "number")
    with pytest.raises(ConfigError, match="did you mean 'number'"):
        exact_match(["7"], ["7"], "numbr")
    with pytest.raises(ConfigError, match="0 answers beside 1 wanted"):
        exact_match([], ["7"])
