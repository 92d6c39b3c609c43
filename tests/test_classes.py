"""Rows with classes: names and order of the model's classes, pairs of texts, padding, ranges of token ids."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, ZOConfig
from mobizo_compiler.errors import ConfigError, DataError
from mobizo_compiler.text.data import TextData
from mobizo_compiler.text.evaluation import score
from mobizo_compiler.text.generation import generate
from mobizo_compiler.text.prediction import Classifier
from mobizo_compiler.text.prompts import PromptConfig, Sample

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "day", "night", "a", "the", "rain", "sun"]
NAMES = {0: "positive", 1: "negative", 2: "neutral"}
SIZES = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PROMPT = PromptConfig(template="{text}")


def words(**special: str) -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | special
    if "cls_token" in named:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    found.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return found


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"type_vocab_size": 2, "initializer_range": 0.5, "num_labels": 3} | options
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def compiled(model: Any, types: bool = False, tokens: int = 12, **options: Any) -> mobizo.Program:
    ids = torch.randint(4, 12, (2, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"token_type_ids": torch.zeros_like(ids)} if types else {}
    zo = ZOConfig(queries=1)
    loss = mobizo.SequenceClassificationLoss()
    return mobizo.compile(model, inputs, LoraConfig(r=2), zo, loss, backend="eager", **options)


@pytest.fixture(scope="module")
def named() -> mobizo.Program:
    return compiled(bert(id2label=NAMES))


@pytest.fixture(scope="module")
def nameless() -> mobizo.Program:
    return compiled(bert())


def encoded(program: mobizo.Program, rows: dict[str, str], config: PromptConfig = PROMPT, **special: str) -> TextData:
    texts = [Sample({"text": text}, answer, f"row {text!r}") for text, answer in rows.items()]
    return TextData.encode(texts, program.manifest, words(**special), config)


def test_the_model_says_which_class_a_name_is(named: mobizo.Program) -> None:
    """Rows that the model answers right have accuracy 1, whatever the alphabet says."""
    model, tokenizer = bert(id2label=NAMES), words()
    texts = ["good day", "bad night", "the rain", "a sun", "bad bad rain", "good", "night sun good", "the the the"]
    with torch.no_grad():
        right = [NAMES[int(model(**tokenizer(t, return_tensors="pt")).logits.argmax())] for t in texts]
    assert len(set(right)) == 3, "so that the order matters"
    data = encoded(named, dict(zip(texts, right, strict=True)))
    found = score(mobizo.Session(named), data)
    assert data.choices == ("positive", "negative", "neutral")
    assert found is not None and found.accuracy == 1.0
    with pytest.raises(DataError, match="'great' is none of the model's classes") as error:
        encoded(named, {"good": "positive", "day": "great"})
    assert "--choices" in str(error.value) and "day" in str(error.value.where)
    other = PromptConfig(template="{text}", choices=("up", "down", "level"))
    assert encoded(named, {"good": "down"}, other).encoded[0].choice == 1
    assert named.manifest.answers == ("positive", "negative", "neutral")


def test_the_names_travel_with_the_file(tmp_path: Any) -> None:
    from mobizo_compiler.format.manifest import Manifest

    program = compiled(bert(), answers=["x", "y", "z"])
    assert program.manifest.answers == ("x", "y", "z") and program.manifest.padding == 0
    assert Manifest.from_json(program.manifest.to_json(), "here") == program.manifest
    with pytest.raises(ConfigError, match="3 classes or choices"):
        compiled(bert(), answers=["x", "y"])


def test_new_rows_get_the_names_of_classes(named: mobizo.Program, nameless: mobizo.Program) -> None:
    """Or their numbers where nobody named them."""
    model, tokenizer = bert(id2label=NAMES), words()
    texts = ["good day", "bad night rain", "sun", "the a the"]
    found = Classifier(mobizo.Session(named), tokenizer, PROMPT).predict([{"text": t} for t in texts])
    for text, one in zip(texts, found, strict=True):
        with torch.no_grad():
            wanted = F.softmax(model(**tokenizer(text, return_tensors="pt")).logits[0], dim=-1)
        assert list(one.probabilities) == list(NAMES.values())
        torch.testing.assert_close(torch.tensor(list(one.probabilities.values())), wanted, atol=1e-5, rtol=0)
        assert one.answer == NAMES[int(wanted.argmax())]
    assert Classifier(mobizo.Session(nameless), tokenizer, PROMPT).choices == ("0", "1", "2")


def test_ratings_are_not_class_numbers(named: mobizo.Program, nameless: mobizo.Program) -> None:
    with pytest.raises(DataError, match="1 to 2; classes have the numbers 0 to 2") as error:
        encoded(nameless, {"good": "2", "bad": "1"})
    assert "--choices 1,2,3" in str(error.value)
    with pytest.raises(DataError, match="none of the model's classes"):
        encoded(named, {"good": "1", "bad": "0"})
    given = encoded(nameless, {"good": "2", "bad": "1"}, PromptConfig(template="{text}", choices=("1", "2", "3")))
    assert [row.choice for row in given.encoded] == [1, 0]
    assert encoded(nameless, {"good": "2", "bad": "0"}).choices == ("0", "1", "2")


def test_pairs_have_the_types_that_the_tokenizer_gives_them() -> None:
    model, tokenizer = bert(), words()
    program = compiled(model, types=True)
    pairs = [("good day", "bad", "0"), ("the rain", "a sun night", "2"), ("night", "the sun", "1")]
    config = PromptConfig(template="{a}", pair_template="{b}")
    texts = [Sample({"a": a, "b": b}, answer, "here") for a, b, answer in pairs]
    data = TextData.encode(texts, program.manifest, tokenizer, config)
    both = tokenizer(
        [p[0] for p in pairs], [p[1] for p in pairs], padding="max_length", max_length=12, return_tensors="pt"
    )
    made = data.inputs([row.ids for row in data.encoded], [row.types for row in data.encoded])
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(made[name], both[name]), name
    with torch.no_grad():
        logits = model(**both).logits
        expected = float(F.cross_entropy(logits, torch.tensor([0, 2, 1])))
        untyped = model(**both | {"token_type_ids": torch.zeros_like(both["input_ids"])}).logits
        assert abs(float(F.cross_entropy(untyped, torch.tensor([0, 2, 1]))) - expected) > 1e-2
    found = score(mobizo.Session(program), data)
    assert found is not None and found.loss == pytest.approx(expected, abs=1e-5)
    batch, _ = data.batches(seed=0)(0)
    assert bool(batch["token_type_ids"].any()), "in training too"


def test_pairs_are_cut_where_they_are_longer() -> None:
    program = compiled(bert(), types=True)
    long = Sample({"a": "good day night rain", "b": "bad a the rain sun good day night a"}, "0", "here")
    for cut, first, second in (
        ("front", "good day night rain", "sun good day night a"),
        ("longest", "good day night rain", "bad a the rain sun"),
    ):
        config = PromptConfig(template="{a}", pair_template="{b}", cut=cut, choices=("0", "1", "2"))
        row = TextData.encode([long], program.manifest, words(), config).encoded[0]
        assert row.cut == 4 and words().decode(row.ids) == f"[CLS] {first} [SEP] {second} [SEP]"
        assert row.types == (0,) * 6 + (1,) * 6


def test_pairs_that_would_lose_their_types_are_refused(nameless: mobizo.Program) -> None:
    joined = PromptConfig(template="{a} [SEP] {b}", choices=("0", "1", "2"))
    texts = [Sample({"a": "good", "b": "bad"}, "0", "here")]
    with pytest.raises(DataError, match="--pair-template"):
        TextData.encode(texts, nameless.manifest, words(), joined)
    pair = PromptConfig(template="{a}", pair_template="{b}", choices=("0", "1", "2"))
    with pytest.raises(DataError, match="token_type_ids, which the program does not take"):
        TextData.encode(texts, nameless.manifest, words(), pair)


def llama(padding: int | None) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_labels=3, pad_token_id=padding, bos_token_id=None, eos_token_id=None)
    return LlamaForSequenceClassification(config).eval()


def test_padding_is_what_the_model_takes_for_it() -> None:
    """A classifier of a decoder finds the end of a row by its own padding token."""
    model = llama(15)
    program = compiled(model)
    bare = {"cls_token": "[CLS]", "pad_token": "[PAD]"}
    with pytest.raises(DataError, match="pads with token 0, the model takes token 15"):
        encoded(program, {"good": "0", "bad": "2"}, **bare)
    tokenizer = words()
    tokenizer._tokenizer.add_tokens(["x12", "x13", "x14", "[end]"])
    tokenizer.pad_token = "[end]"
    texts = [Sample({"text": "good day"}, "0", "here"), Sample({"text": "a"}, "2", "here")]
    data = TextData.encode(texts, program.manifest, tokenizer, PROMPT)
    found = score(mobizo.Session(program), data)
    losses = []
    for text, answer in (("good day", 0), ("a", 2)):
        with torch.no_grad():
            logits = model(**{"input_ids": tokenizer(text, return_tensors="pt").input_ids}).logits
        losses.append(float(F.cross_entropy(logits, torch.tensor([answer]))))
    assert found is not None and found.loss == pytest.approx(sum(losses) / 2, abs=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("GPT2", "OPT", "XLM"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("OpenAIGPT", "XLNet", "TrOCR", "ImageGPT")),
    ],
)
def test_the_range_of_token_ids_is_found_behind_a_view(name: str) -> None:
    """These models give `input_ids` another form before they look them up."""
    options: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
        "OPT": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 32,
        },
        "OpenAIGPT": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
        "XLM": {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 16, "causal": True},
        "XLNet": {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
        "TrOCR": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        "ImageGPT": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=16, **options[name])
    causal = {"OPT": "OPTForCausalLM", "TrOCR": "TrOCRForCausalLM", "ImageGPT": "ImageGPTForCausalImageModeling"}
    head = (causal | {"XLM": "XLMWithLMHeadModel"}).get(name, f"{name}LMHeadModel")
    model = getattr(transformers, head)(config).eval()
    model.config.use_cache = False
    ids = torch.randint(4, 12, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = mobizo.compile(model, inputs, LoraConfig(r=2), ZOConfig(queries=1), backend="eager")
    assert program.manifest.inputs[0].high == 15 and program.manifest.inputs[0].low == 0
    session = mobizo.Session(program)
    with pytest.raises(mobizo.errors.TokenRangeError):
        session.evaluate(inputs | {"input_ids": ids + 12})
    texts = [Sample({"text": "good day"}, "bad", "here"), Sample({"text": "a"}, "sun", "here")]
    tokenizer = words(eos_token="[SEP]")
    data = TextData.encode(texts, program.manifest, tokenizer, dataclasses.replace(PROMPT, end_answers=False))
    assert score(session, data) is not None
    assert len(generate(session, tokenizer, "good day", 2).tokens) <= 2
