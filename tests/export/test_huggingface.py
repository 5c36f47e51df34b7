"""Export to transformers and import from it; `make test-transformers4` runs it with the older one.

The reference is transformers itself, which reads the folders and computes from them.
"""

import base64
import html
import http.server
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import markdown_it
import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from twin import shake

import chargpt
from chargpt.base.errors import UserError, VerificationError
from chargpt.base.terminal import visible
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.facts import gather_facts
from chargpt.export.huggingface import mapping
from chargpt.export.huggingface import tokenizer as hf_tokenizer
from chargpt.export.huggingface.card import model_card
from chargpt.export.huggingface.folder import export_hf, import_hf
from chargpt.export.huggingface.reading import load_hf
from chargpt.export.verify import greedy, logits_of
from chargpt.generate import sample
from chargpt.runs.folder import load
from chargpt.runs.imported import write_imported_run
from chargpt.runs.report import Sample
from chargpt.runs.weights import model_tensors
from chargpt.train import TrainResult

SHAPE = GPT2Config(block_size=216, n_layer=2, n_head=2, d_model=16, d_ff=40, dropout=0.2)
ODD = "\t\n\r\0 .,'<|>\"\\`\u2028\xa0\ufeff"
TEXTS = {
    "english": (ODD + "ABCabcdefghijklmnopqrstuvwxyz", SHAPE),
    "names": ("abcdefghijklmnopqrstuvwxyz", SHAPE.replace(bias=False)),
    "markup": ("<|endoftext|>\ue000 \n", SHAPE.replace(bias=False, embedding_dropout=0.1)),
    "chinese": ("\n,。《》中文字體繁簡龍𠮷𪚥", SHAPE.replace(activation_function="gelu_exact")),
    "hebrew": ("\n \u200f\u05b0\u05b7\u05bc\u05c1אבגדהוזחטיכךל", SHAPE.replace(bias=False)),
    "emoji": ("e\u0301éa👩\u200d👧🏽🇩🇪\ufe0f \n", SHAPE),
}
WITH_END_OF_TEXT = {"names", "markup"}


class Exported(NamedTuple):
    run: Path
    folder: Path
    model: chargpt.GPT2
    tokenizer: CharTokenizer


def make_run(run: Path, tokenizer: CharTokenizer, config: GPT2Config) -> None:
    torch.manual_seed(0)
    model = shake(chargpt.GPT2(config.replace(vocab_size=tokenizer.vocab_size)))
    write_imported_run(run, model, tokenizer, origin="a test")


def export(run: Path, out: Path) -> Exported:
    export_hf(run, out)
    return Exported(run, out, *load(run))


@pytest.fixture(scope="module", params=TEXTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A random model and its export. Tests must not change the folders."""
    folder = tmp_path_factory.mktemp(request.param)
    characters, config = TEXTS[request.param]
    tokenizer = CharTokenizer(set(characters), end_of_text=request.param in WITH_END_OF_TEXT)
    make_run(folder / "run", tokenizer, config)
    return export(folder / "run", folder / "out")


@pytest.fixture(scope="module")
def abc(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny model with end-of-text and without biases, and its export."""
    folder = tmp_path_factory.mktemp("abc")
    tokenizer = CharTokenizer("abc", end_of_text=True)
    dropouts = {"embedding_dropout": 0.1, "attention_dropout": 0.3}
    config = SHAPE.replace(block_size=32, n_layer=1, bias=False, **dropouts)
    make_run(folder / "run", tokenizer, config)
    return export(folder / "run", folder / "out")


@pytest.fixture
def names(abc: Exported, tmp_path: Path) -> Exported:
    """A copy of `abc`, to change."""
    shutil.copytree(abc.folder.parent, tmp_path, dirs_exist_ok=True)
    return abc._replace(run=tmp_path / "run", folder=tmp_path / "out")


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse, while the test runs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def their_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def their_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def strings(tokenizer: CharTokenizer, n: int, longest: int = 24) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(tokenizer.characters, k=rng.randint(0, longest))) for _ in range(n)]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# --- what transformers computes


def test_transformers_computes_the_same_logits(exported: Exported) -> None:
    theirs = their_model(exported.folder)
    rng = random.Random(1)
    for length in (1, 2, 17, 216):
        ids = torch.tensor([rng.choices(range(exported.tokenizer.vocab_size), k=length)])
        with torch.inference_mode():
            assert (theirs(ids).logits - exported.model(ids)).abs().max() < 1e-4


def test_transformers_writes_the_same_200_greedy_characters(exported: Exported) -> None:
    start = exported.tokenizer.encode_prompt("")
    ids = torch.tensor([start])
    settings = transformers.GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=200)
    theirs = their_model(exported.folder)
    theirs.generation_config = settings
    text = theirs.generate(ids, attention_mask=torch.ones_like(ids))[0, 1:].tolist()
    assert text == greedy(logits_of(exported.model), start, 200, block_size=216)
    assert len(set(text)) > 1


def test_ids_are_the_same_and_decode_to_the_text(exported: Exported) -> None:
    ours, theirs = exported.tokenizer, their_tokenizer(exported.folder)
    texts = [*strings(ours, 10_000), "".join(ours.characters), "\r\n ,.", " a  b \n\n", "<|x|>"]
    texts = [text for text in texts if set(text) <= set(ours.characters)]
    all_ids = theirs(texts)["input_ids"]
    assert all_ids == [ours.encode(text).tolist() for text in texts]
    assert [theirs.decode(ids) for ids in all_ids] == texts
    assert len(theirs) == ours.vocab_size
    with pytest.raises(Exception, match="UNK"):
        theirs("a\U0010fffd")


def test_what_the_tokenizer_returns_is_what_the_model_takes(exported: Exported) -> None:
    text = "".join(exported.tokenizer.characters)
    inputs = their_tokenizer(exported.folder)(text, return_tensors="pt")
    with torch.inference_mode():
        theirs = their_model(exported.folder)(**inputs).logits
        ours = exported.model(torch.tensor([exported.tokenizer.encode(text).tolist()]))
    assert (theirs - ours).abs().max() < 1e-4  # token types would be added to the embedding


def test_the_pipeline_works_as_it_is_and_has_no_complaint(
    exported: Exported, complaints: list[str]
) -> None:
    write = transformers.pipeline("text-generation", model=str(exported.folder))
    prompt = exported.tokenizer.characters[-2] * 3
    texts = [write(prompt)[0]["generated_text"], write("")[0]["generated_text"]]
    assert texts[0].startswith(prompt)
    for text in texts:
        assert set(text) <= set(exported.tokenizer.characters)
        assert len(text) <= 216
    assert [line for line in complaints if not line.startswith("Device set to use")] == []


def test_the_pipeline_begins_and_ends_a_document_like_sample(exported: Exported) -> None:
    write = transformers.pipeline("text-generation", model=str(exported.folder))
    prompt = "".join(exported.tokenizer.characters[:3])
    ours = sample(*load(exported.run), prompt=prompt, temperature=0, max_new_tokens=213)
    assert write(prompt, do_sample=False)[0]["generated_text"] == ours


def test_end_of_text_cannot_be_typed_with_characters_of_the_vocabulary(exported: Exported) -> None:
    if exported.tokenizer.end_of_text_id is None:
        assert their_tokenizer(exported.folder).all_special_tokens == []
        return
    theirs = their_tokenizer(exported.folder)
    assert not set(theirs.eos_token) <= set(exported.tokenizer.characters)
    first = exported.tokenizer.characters[0]
    ids = theirs(f"{theirs.bos_token}{first}")["input_ids"]
    assert ids == exported.tokenizer.encode_prompt(first)
    assert theirs.decode(ids, skip_special_tokens=True) == first


@pytest.mark.parametrize("activation", mapping.ACTIVATIONS)
def test_every_activation_function_is_exported(tmp_path: Path, activation: Any) -> None:
    config = SHAPE.replace(activation_function=activation, block_size=32)
    make_run(tmp_path / "run", CharTokenizer("ab"), config)
    model = export(tmp_path / "run", tmp_path / "out").model
    ids = torch.tensor([[0, 1, 1, 0]])
    with torch.inference_mode():
        assert (their_model(tmp_path / "out")(ids).logits - model(ids)).abs().max() < 1e-4
    import_hf(tmp_path / "out", tmp_path / "back")
    assert load(tmp_path / "back").model.config == model.config


# --- import


def test_import_gives_back_the_same_bits(exported: Exported, tmp_path: Path) -> None:
    import_hf(exported.folder, tmp_path / "back")
    model, tokenizer = load(tmp_path / "back")
    assert tokenizer == exported.tokenizer
    assert model.config == exported.model.config
    theirs, ours = model_tensors(model), model_tensors(exported.model)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_model_that_transformers_trained_is_imported(names: Exported, tmp_path: Path) -> None:
    """It saves biases that training has changed, and keeps our key in config.json."""
    theirs = their_model(names.folder)
    dropouts = theirs.config.resid_pdrop, theirs.config.embd_pdrop, theirs.config.attn_pdrop
    assert dropouts == (0.2, 0.1, 0.3)
    torch.nn.init.normal_(theirs.transformer.h[0].mlp.c_fc.bias)
    theirs.save_pretrained(tmp_path / "trained")
    their_tokenizer(names.folder).save_pretrained(tmp_path / "trained")
    import_hf(tmp_path / "trained", tmp_path / "back")
    model, tokenizer = load(tmp_path / "back")
    assert (model.config.bias, tokenizer) == (True, names.tokenizer)
    ids = torch.tensor([[3, 0, 1, 2]])
    with torch.inference_mode():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-5


def foreign(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save a GPT2LMHeadModel that was not exported by chargpt, with its own order of tokens."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=6, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0,
            eos_token_id=0, activation_function="gelu_pytorch_tanh", resid_pdrop=0.2,
            embd_pdrop=0.1, attn_pdrop=0.3,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).eval().save_pretrained(folder)
    vocabulary = {"[END]": 0, "z": 1, "\n": 2, "é": 3, "a": 4, "中": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["[END]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_others_is_imported(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = foreign(tmp_path / "theirs", dtype)
    import_hf(tmp_path / "theirs", tmp_path / "run")
    model, tokenizer = load(tmp_path / "run")
    assert tokenizer == CharTokenizer("za\né中", end_of_text=True)
    assert model.config == GPT2Config(
        vocab_size=6, block_size=8, d_model=8, n_layer=2, n_head=2, dropout=0.2,
        embedding_dropout=0.1, attention_dropout=0.3,
    )  # fmt: skip
    text = "z\n中aéz"
    ours = torch.tensor([tokenizer.encode_prompt(text)])
    order = [2, 4, 1, 3, 5, 0]  # their ids of our tokens
    with torch.inference_mode():
        expected = theirs(torch.tensor([[0, 1, 2, 5, 4, 3, 1]])).logits[..., order]
        assert (model(ours) - expected).abs().max() < 1e-4


# --- refusals


@pytest.mark.parametrize("placement", ["post", "sandwich"])
def test_what_gpt2_of_transformers_lacks_is_refused(tmp_path: Path, placement: Any) -> None:
    make_run(tmp_path / "run", CharTokenizer("ab"), SHAPE.replace(norm_placement=placement))
    with pytest.raises(UserError, match=placement):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", CharTokenizer("a\ud83d"), SHAPE)
    with pytest.raises(UserError, match="D83D"):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_transformers_the_extra_is_named(
    names: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'chargpt\[hf\]'"):
        export_hf(names.run, tmp_path / "other")
    import_hf(names.folder, tmp_path / "back")  # needs no transformers


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


def set_tokenizer(part: str = "", **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        (values[part] if part else values).update(changes)
        change_json(folder / "tokenizer.json", **values)

    return change


def set_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


EMBEDDING = "transformer.wte.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (rename("model.safetensors", "pytorch_model.bin"), "pickle"),
    "shards": (rename("model.safetensors", "model.safetensors.index.json"), "several files"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "no tokenizer": (rename("tokenizer.json", "vocab.json"), "no tokenizer.json"),
    "no config": (rename("config.json", "params.json"), "no config.json"),
    "llama": (set_config(model_type="llama"), "model_type is 'llama'"),
    "classifier": (set_config(architectures=["GPT2ForTokenClassification"]), "GPT2LMHeadModel"),
    "epsilon": (set_config(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    "untied": (set_config(tie_word_embeddings=False), "tie_word_embeddings"),
    "cross": (set_config(add_cross_attention=True), "add_cross_attention"),
    "activation": (set_config(activation_function="mish"), "mish"),
    "activation type": (set_config(activation_function=["relu"]), "activation_function"),
    "heads": (set_config(n_head=3), "n_head"),
    "negative": (set_config(n_layer=-1), "n_layer"),
    "text for a number": (set_config(n_embd="16"), "d_model"),
    "deep": (set_config(n_layer=10**12), "parameters"),
    "wide": (set_config(n_embd=10**12), "parameters"),
    "long": (set_config(n_positions=10**15), "parameters"),
    "padded": (set_config(vocab_size=64), "tokens"),
    "end": (set_config(eos_token_id=1), "eos_token_id"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{") and None, "config.json"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]") and None, "object"),
    "nested": (
        lambda folder: (folder / "tokenizer.json").write_text("[" * 10_000) and None, "lists",
    ),
    "lower case": (set_tokenizer(normalizer={"type": "Lowercase"}), "Lowercase"),
    "bytes": (set_tokenizer(pre_tokenizer={"type": "ByteLevel"}), "ByteLevel"),
    "words": (set_tokenizer(pre_tokenizer=None), "after each character"),
    "merges": (
        set_tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}), "joins",
    ),
    "unigram": (set_tokenizer(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "Unigram"),
    "no model": (set_tokenizer(model=None), "not a tokenizer file"),
    "long token": (set_tokenizer("model", vocab={"ab": 0, "b": 1, "c": 2}), "'ab'"),
    "double id": (set_tokenizer("model", vocab={"a": 0, "b": 0, "c": 2}), "not 0 to"),
    "id of text": (set_tokenizer("model", vocab={"a": 0, "b": "1", "c": 2}), "not 0 to"),
    "huge id": (set_tokenizer("model", vocab={"a": 0, "b": 1, "c": 10**9}), "not 0 to"),
    "missing tensor": (set_weights(lambda t: t.pop("transformer.ln_f.bias")), "parameters"),
    "other shape": (
        set_weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].reshape(8, 8).clone()})), "shape",
    ),
    "extra tensor": (set_weights(lambda t: t.update(extra=torch.zeros(0))), "extra"),
    "float64": (set_weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].double()})), "F64"),
    "other head": (
        set_weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})), "not tied",
    ),
    "NaN": (set_weights(lambda t: t[EMBEDDING].fill_(torch.nan)), "finite"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-4]
        ) and None, "model.safetensors",
    ),
    "long header": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64) and None, "header",
    ),
    "nothing": (shutil.rmtree, "not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_folders_are_refused(names: Exported, tmp_path: Path, case: str) -> None:
    change, reason = REFUSED[case]
    change(names.folder)
    with pytest.raises(UserError, match=reason) as refusal:
        import_hf(names.folder, tmp_path / "back")
    assert len(str(refusal.value)) < 500
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "back").exists()


def test_a_record_that_does_not_fit_the_model_is_not_used(names: Exported, tmp_path: Path) -> None:
    values = json.loads((names.folder / "config.json").read_text("utf-8"))
    change_json(names.folder / "config.json", chargpt=values["chargpt"] | {"n_head": 1})
    import_hf(names.folder, tmp_path / "back")
    assert load(tmp_path / "back").model.config.n_head == 2


JUNK = [
    None, True, 0, -1, 1, 10**30, 1.5, float("nan"), float("inf"), "", "a", "\ud800", [], [[]], {},
    {"a": 1}, {"a": 0, "b": 1, "c": 2}, {"type": "BPE"}, ["GPT2LMHeadModel"],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each list or object in a JSON value, with each of its indices or keys."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_junk_in_json_is_read_or_refused_in_one_line(names: Exported, name: str) -> None:
    rng = random.Random(0)
    text = (names.folder / name).read_text("utf-8")
    refused = 0
    for _ in range(200):
        values = json.loads(text)
        parent, key = rng.choice([*places(values)])
        parent[key] = rng.choice(JUNK)
        (names.folder / name).write_text(json.dumps(values))
        try:
            load_hf(names.folder)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


# --- verification


def transposed(tensors: Any, n_layer: int) -> Any:
    weight = tensors["blocks.0.attention.sublayer.projection.weight"]
    tensors["blocks.0.attention.sublayer.projection.weight"] = weight.t()
    return to_hf_tensors(tensors, n_layer)


def without_bias(tensors: Any, n_layer: int) -> Any:
    result = to_hf_tensors(tensors, n_layer)
    del result["transformer.ln_f.bias"]
    return result


to_hf_tensors, to_hf_tokenizer = mapping.to_hf_tensors, hf_tokenizer.to_hf_tokenizer


def swapped(tokenizer: CharTokenizer) -> Any:
    text = to_hf_tokenizer(tokenizer).to_str()
    vocabulary = json.loads(text)["model"]["vocab"]
    assert vocabulary["a"] == 0
    changed = text.replace('"a":0', '"a":1').replace('"b":1', '"b":0')
    assert changed != text
    return tokenizers.Tokenizer.from_str(changed)


def without_decoder(tokenizer: CharTokenizer) -> Any:
    result = to_hf_tokenizer(tokenizer)
    result.decoder = None
    return result


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (mapping, "to_hf_tensors", transposed),
        (mapping, "to_hf_tensors", without_bias),
        (hf_tokenizer, "to_hf_tokenizer", swapped),
        (hf_tokenizer, "to_hf_tokenizer", without_decoder),
    ],
)
def test_a_wrong_export_leaves_nothing(
    names: Exported, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any
) -> None:
    shutil.rmtree(names.folder)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(VerificationError):
        export_hf(names.run, names.folder)
    assert [path.name for path in names.run.parent.iterdir()] == ["run"]


# --- the card


def test_the_card_has_the_results(result: TrainResult, tmp_path: Path) -> None:
    export_hf(result.run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    facts = gather_facts(result.run, *load(result.run))
    assert facts.baselines
    for baseline in facts.baselines:
        assert f"| {baseline.name} | {baseline.bits_per_char:.2f} |" in card
    assert (
        f"| {json.loads((result.run / 'summary.json').read_text())['bits_per_char']:.2f} |" in card
    )


def test_the_lines_in_the_card_work(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (exported.folder / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(exported.folder.parent)
    torch.manual_seed(0)
    exec(code.replace("this/folder", exported.folder.name), {})
    assert capsys.readouterr().out.strip("\n\t\r ")


def test_names_and_texts_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    evil = "# x\n---\nlicense: mit\n---\n<script>a()</script> ![a](http://b) [c](javascript:d) | `e"
    evil += " &lt;b&gt; www.evil.example *f* <!-- \u202e\x1b[31m "
    evil += "\n```\n<hr>\n\n````\n<hr>\n\n~~~\n<img src=x>"
    tokenizer = CharTokenizer(set(evil), end_of_text=True)
    make_run(tmp_path / "run", tokenizer, SHAPE)
    model, _ = load(tmp_path / "run")
    facts = gather_facts(tmp_path / "run", model, tokenizer)
    odd = {"name": evil, "texts": (evil,), "samples": (Sample(step=1, val_loss=1.0, text=evil),)}
    values = {name: getattr(facts, name) for name in facts.__dataclass_fields__} | odd
    card = model_card(type(facts)(**values), model.config, tokenizer)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() == {"library_name", "pipeline_tag", "tags"}
    page = markdown_it.MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body)
    for tag in ("<script", "<img", "<a ", "<!--", "<em", "<hr", "\u202e", "\x1b"):
        assert tag not in page
    assert page.count("<h1>") == 1
    title = page[page.index("<h1>") + 4 : page.index("</h1>")]
    assert html.unescape(title) == " ".join(visible(evil).split())
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        "## A text that it wrote during training", "## Use", "## Limits",
    ]  # fmt: skip


# --- the hub


class Hub(http.server.ThreadingHTTPServer):
    """A stand-in for the Hugging Face Hub: takes one commit, and keeps its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuse_commit = False


class Endpoints(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.headers["Authorization"] != "Bearer hf_test":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            return 200, {"url": f"{self.url}/me/tiny", "id": "me/tiny"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/me/tiny/preupload/main":
            files = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **mode} for file in files]}
        if path == "/api/models/me/tiny/commit/main" and not self.server.refuse_commit:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            commit = {"commitUrl": f"{self.url}/me/tiny/commit/1", "commitOid": "1" * 40}
            return 200, {"success": True, **commit}
        return 403, {"error": "You may not\nwrite here."}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server
        server.shutdown()
        thread.join()


def test_what_arrives_at_the_hub_is_the_folder(names: Exported, tmp_path: Path, hub: Hub) -> None:
    line = export_hf(names.run, tmp_path / "new", push="me/tiny")
    assert line.endswith("/me/tiny")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert [(made["organization"], made["name"]) for made in hub.repositories] == [("me", "tiny")]
    assert b'model="me/tiny"' in hub.files["README.md"]


@pytest.mark.parametrize("reason", ["token", "forbidden", "network"])
def test_a_failed_upload_is_one_line_and_the_folder_stays(
    names: Exported, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif reason == "forbidden":
        hub.refuse_commit = True
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="could not be uploaded to me/tiny") as failure:
        export_hf(names.run, tmp_path / "new", push="me/tiny")
    assert "\n" not in str(failure.value)
    assert hub.files == {}
    assert (tmp_path / "new" / "README.md").exists()


@pytest.mark.parametrize("name", ["tiny", "me/", "/tiny", "a/b/c", "me/ti ny", "me/-a", "me/a--b"])
def test_a_wrong_name_is_refused_before_any_work(
    names: Exported, tmp_path: Path, hub: Hub, name: str
) -> None:
    with pytest.raises(UserError, match="USER/NAME"):
        export_hf(names.run, tmp_path / "new", push=name)
    assert not (tmp_path / "new").exists()
    assert hub.repositories == []


def test_without_a_token_nothing_is_done(
    names: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        export_hf(names.run, tmp_path / "new", push="me/tiny")
    assert not (tmp_path / "new").exists()
